"""The lines of the tool that predicts: batches too small, layouts that do not fit, and others' figures."""

from dataclasses import replace

import pytest

from tools.bench.predict import PUBLISHED, cell, layouts, published
from tools.recipes import RECIPES, Recipe


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    monkeypatch.setenv("WORLD_SIZE", "8")
    return [Recipe.read(name) for name in RECIPES]


def test_a_recipe_on_its_own_gpus_has_its_own_mfu(recipes: list[Recipe]) -> None:
    for recipe in recipes:
        assert cell(recipe, recipe.gpus, grown=False) == f"{recipe.step.mfu:.1%}"
        assert cell(recipe, recipe.gpus, grown=True) == f"{recipe.step.mfu:.1%}"


def test_a_batch_with_fewer_rows_than_ranks_is_a_dash_and_one_that_grows_is_not(
    recipes: list[Recipe],
) -> None:
    one = recipes[1]
    assert one.settings.batch == 256
    assert cell(one, 512, grown=False) == "-"
    assert cell(one, 512, grown=True) != "-"


def test_a_layout_that_does_not_fit_is_in_brackets(recipes: list[Recipe]) -> None:
    # 7 B on one node with ZeRO 1 holds 2 + 4 + 2 bytes a parameter beside 31 GiB of activations.
    seven = recipes[2]
    parallel = seven.settings.parallel.model_copy(update={"zero": 1})
    whole = replace(seven, settings=seven.settings.model_copy(update={"parallel": parallel}))
    assert cell(whole, 8, grown=False).startswith("(")
    assert not cell(seven, 256, grown=False).startswith("(")


def test_the_seconds_of_a_layout_are_those_of_its_parts(recipes: list[Recipe]) -> None:
    _, *lines = layouts(recipes[3])
    for line in lines:
        seconds, products, tensor, data = map(float, line.split()[-6:-2])
        assert seconds == pytest.approx(products + tensor + data, abs=0.02)


def test_each_published_run_has_a_line_with_both_figures(recipes: list[Recipe]) -> None:
    _, *lines = published(recipes)
    assert [line.split()[-2] for line in lines] == [f"{one.mfu:.1%}" for one in PUBLISHED]
    assert all(0.3 < float(line.split()[-1].rstrip("%")) / 100 < 0.6 for line in lines)
