"""Learning-rate factors, by hand."""

import pytest

from megachat.config import ConfigError, decode
from megachat.train.schedules import Constant, Cosine, WarmupStableDecay


def test_cosine_is_half_way_down_in_the_middle() -> None:
    assert Cosine(warmup=0, floor=0).factor(5, 10) == pytest.approx(0.5)
    assert Cosine(warmup=0, floor=0.1).factor(5, 10) == pytest.approx(0.55)  # 0.1 + 0.9 / 2


def test_warm_up_reaches_the_peak_at_its_last_step() -> None:
    factors = [Cosine(warmup=0.2, floor=0).factor(step, 20) for step in range(5)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_every_schedule_ends_at_its_floor() -> None:
    for schedule in (Cosine(warmup=0.1, floor=0.2), WarmupStableDecay(warmup=0.1, decay=0.3, floor=0.2)):
        assert schedule.factor(1000, 1000) == pytest.approx(0.2)
        assert schedule.factor(5000, 1000) == pytest.approx(0.2)


def test_stable_decay_is_flat_until_the_decay_begins_and_linear_after() -> None:
    schedule = WarmupStableDecay(warmup=0.1, decay=0.5, floor=0)
    factors = [schedule.factor(step, 100) for step in (10, 30, 50, 75, 90)]
    assert factors == pytest.approx([1.0, 1.0, 1.0, 0.5, 0.2])


def test_constant_stays() -> None:
    assert Constant(warmup=0).factor(99, 100) == 1.0


def test_warm_up_and_decay_must_fit_into_the_run() -> None:
    tree = {"_target_": "megachat.train.schedules.WarmupStableDecay", "warmup": 0.6, "decay": 0.5, "floor": 0}
    with pytest.raises(ConfigError, match=r"warmup \(0.6\) and decay \(0.5\) together exceed the run"):
        decode(tree)
