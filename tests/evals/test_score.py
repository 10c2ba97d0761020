"""Scores and their intervals."""

import numpy as np
import pytest

from megachat.evals.score import Score, mean, ratio


def test_a_ratio_weighs_items_by_their_denominator():
    assert ratio([1, 5], [1, 2]).value == 2.0
    assert mean([1, 2.5]).value == 1.75


def test_items_that_are_all_alike_have_an_interval_without_width():
    assert mean([1.0] * 50) == Score(1.0, 1.0, 1.0, 50)


def test_the_interval_of_a_coin_is_what_the_binomial_says():
    # 400 tosses, half heads: the standard error is sqrt(0.25 / 400) = 0.025; 95 % is 1.96 of it either way.
    score = mean([0.0, 1.0] * 200)
    assert (score.value, score.n) == (0.5, 400)
    assert score.low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.004)
    assert score.high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.004)


def test_the_interval_holds_the_truth_about_95_times_in_100():
    generator = np.random.default_rng(7)
    scores = [mean(generator.normal(3.0, 1.0, 60)) for _ in range(200)]
    held = sum(score.low <= 3.0 <= score.high for score in scores)
    assert (
        180 <= held <= 198
    )  # a binomial of 200 and 0.95 has mean 190 and deviation 3; the bootstrap is a little short


def test_the_same_seed_gives_the_same_interval_however_it_is_cut_into_chunks(monkeypatch):
    values = list(np.random.default_rng(0).random(100))
    before = mean(values, seed=3)
    assert mean(values, seed=3) == before != mean(values, seed=4)
    monkeypatch.setattr("megachat.evals.score.CHUNK", 1000)
    assert mean(values, seed=3) == before


def test_a_score_of_nothing_is_our_mistake():
    with pytest.raises(AssertionError, match="at least one item"):
        mean([])
