"""Recall is exact match, to the letter."""

import pytest

from megachat.evals.recall import exact, recall


def test_space_around_an_answer_does_not_count_and_everything_else_does():
    truth = "Greatest Common Divisor."
    assert exact(" Greatest Common Divisor.\n", truth)
    for wrong in ("Greatest Common Divisor", "greatest Common Divisor.", "Greatest  Common Divisor.", ""):
        assert not exact(wrong, truth)


def test_two_of_three_is_two_thirds():
    score = recall(["a.", "b.", "c"], ["a.", "b.", "c."])
    assert (score.value, score.n) == (pytest.approx(2 / 3), 3)


def test_answers_and_truths_must_be_as_many():
    with pytest.raises(ValueError, match="longer"):
        recall(["a."], ["a.", "b."])
