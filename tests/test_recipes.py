"""Recipes: settings are those of the rules that they name, and what they promise is what the formulas say."""

from collections.abc import Iterator

import pytest

from megachat.config import compose, decode
from megachat.stages import CONF
from megachat.train.memory import ROOM
from megachat.train.scaling import learning_rate, optimal_batch, optimal_tokens, weight_decay
from tools.recipes import READMES, RECIPES, Recipe, days

STALE = "run python tools/recipes.py --write"


@pytest.fixture(params=RECIPES)
def recipe(request: pytest.FixtureRequest) -> Iterator[Recipe]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "8")
        yield Recipe.read(request.param)


def test_every_experiment_for_a_number_of_gpus_is_a_recipe() -> None:
    assert {path.name for path in (CONF / "experiment").iterdir() if path.name.endswith("gpu")} == set(
        RECIPES
    )


def test_what_a_recipe_expects_is_what_the_formulas_say(recipe: Recipe) -> None:
    text = (CONF / "experiment" / recipe.name / "pretrain.yaml").read_text(encoding="utf-8")
    assert recipe.expected() in text.splitlines(), STALE


def test_the_readmes_have_the_same_figures(recipe: Recipe) -> None:
    for readme in READMES:
        assert recipe.row() in readme.read_text(encoding="utf-8").splitlines(), f"{readme.name}: {STALE}"


def test_tokens_are_compute_optimal_and_the_rest_follows_from_the_rules(recipe: Recipe) -> None:
    run, vocab, tokens = recipe.settings, recipe.vocab, recipe.tokens
    assert tokens == pytest.approx(optimal_tokens(run.model, vocab), rel=0.005)
    assert run.batch == optimal_batch(run.model, tokens, run.context)
    assert run.optimizer.lr == learning_rate(run.model, tokens, run.context, run.batch)
    decay = weight_decay(run.model, vocab, tokens, run.context, run.batch, run.optimizer.lr)
    assert run.optimizer.weight_decay == pytest.approx(decay, rel=0.02)


def test_a_recipe_fits_its_gpus_and_keeps_them_equally_busy(recipe: Recipe) -> None:
    assert recipe.job.memory.peak <= ROOM * 80 * 2**30
    assert recipe.gpus % recipe.settings.parallel.tensor == 0
    assert recipe.layout.gpus == recipe.gpus
    assert recipe.layout.tokens == recipe.settings.batch * recipe.settings.context


def test_days_are_flops_for_what_the_gpus_put_to_use(recipe: Recipe) -> None:
    # The predicted step, as often as there are steps.
    assert recipe.days == pytest.approx(recipe.steps * recipe.step.seconds / 86_400, rel=0.001)


def test_doctor_plans_a_recipe_for_the_gpus_in_its_name_and_predicts_the_same(recipe: Recipe) -> None:
    doctor = decode(compose("doctor", [f"experiment={recipe.name}"]))
    assert doctor.gpus == recipe.gpus
    mfu, _ = doctor.use(recipe.job)
    assert mfu == recipe.step.mfu


def test_less_than_a_day_is_told_in_hours() -> None:
    assert (days(0.5), days(0.0531), days(18.04)) == ("12 h", "1.3 h", "18 d")
