"""Whose answer is closer to the truth."""

import pytest
from sacrebleu.metrics import CHRF

from megachat.evals.wins import closer, outcome, win_rate, win_rate_by_reward

TRUTH = "Return the greatest common divisor."


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (TRUTH, "Return the greatest common divisor", 1.0),  # exact beats what lacks a full stop
        ("Return the least common multiple.", TRUTH, 0.0),
        (TRUTH, f" {TRUTH}", 0.5),
        ("no", "no", 0.5),
        (
            "Return the greatest common.",
            "Open a file.",
            1.0,
        ),  # neither is exact: more of the same characters wins
        ("", "Return", 0.0),
    ],
)
def test_exact_comes_first_then_shared_characters(ours: str, theirs: str, expected: float):
    assert closer(ours, theirs, TRUTH, CHRF()) == expected
    assert closer(theirs, ours, TRUTH, CHRF()) == 1 - expected


def test_an_exact_answer_wins_even_where_chrf_sees_no_difference():
    # chrF ignores space, so "a b." scores 100 against "ab.": exactness has to be asked first.
    assert CHRF().sentence_score("a b.", ["ab."]).score == pytest.approx(100)
    assert closer("ab.", "a b.", "ab.", CHRF()) == 1.0


def test_a_win_a_loss_and_two_ties_make_one_half():
    score = win_rate([TRUTH, "x", "y", TRUTH], ["x", TRUTH, "y", TRUTH], [TRUTH] * 4)
    assert (score.value, score.n) == (0.5, 4)


def test_three_wins_and_a_tie_make_seven_eighths():
    assert win_rate_by_reward([1.0, 2.0, 3.0, 4.0], [0.0, 1.0, -3.0, 4.0]).value == 0.875
    assert outcome(1.0, 2.0) == 0.0
