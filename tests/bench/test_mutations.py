"""The bugs that `tools/bench/mutations.py` plants: that each still has a place."""

import ast

import pytest

from tools.bench.mutations import MUTATIONS, ROOT, Mutation


def test_bugs_have_names_of_their_own() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_bug_has_one_place_and_what_it_makes_is_python(mutation: Mutation) -> None:
    text = (ROOT / mutation.path).read_text(encoding="utf-8")
    assert text.count(mutation.right) == 1
    ast.parse(text.replace(mutation.right, mutation.wrong))
    for file in mutation.tests.split():
        assert (ROOT / "tests" / file).exists()
