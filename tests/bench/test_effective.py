"""The model of effective training time, against sums done by hand."""

import pytest

from tools.bench.effective import HOUR, MINUTE, Costs, best_interval, effective, line, mean_time_to_failure


@pytest.mark.parametrize(
    ("detect", "restart", "interval", "gpus", "share"),
    [
        (10, 5, 30, 1024, 0.937),  # 1 - (10 + 5 + 15) / 474
        (1, 2, 10, 1024, 0.983),  # 1 - (1 + 2 + 5) / 474
        (10, 5, 30, 16_384, 0.722),  # 1 - 30 / 108
        (1, 2, 10, 16_384, 0.926),  # 1 - 8 / 108
        (10, 5, 30, 8, 0.9995),  # 1 - 30 / (474 * 128)
    ],
)
def test_a_failure_costs_noticing_restarting_and_half_an_interval(
    detect: float, restart: float, interval: float, gpus: int, share: float
) -> None:
    costs = Costs(detect * MINUTE, restart * MINUTE, save=0)
    assert effective(costs, interval * MINUTE, mean_time_to_failure(gpus)) == pytest.approx(share, abs=5e-4)


def test_saving_costs_its_share_of_the_interval() -> None:
    # A minute of every ten.
    assert effective(Costs(0, 0, save=60), 600, mttf=1e12) == pytest.approx(0.9)


def test_no_other_interval_beats_the_best_one() -> None:
    costs, mttf = Costs(60, 120, save=9), 8 * HOUR
    best = best_interval(costs.save, mttf)
    assert best == pytest.approx(720)  # sqrt(2 * 9 * 28,800)
    shares = [effective(costs, best * factor, mttf) for factor in (0.5, 0.9, 1.0, 1.1, 2.0)]
    assert max(shares) == shares[2]
    assert shares[0] == pytest.approx(shares[4])  # half as long costs as much as twice as long


def test_one_node_of_128_fails_once_in_42_days() -> None:
    assert mean_time_to_failure(8) / HOUR / 24 == pytest.approx(42.1, abs=0.1)


def test_a_line_says_where_the_time_goes() -> None:
    assert line(Costs(60, 120, 3), 600, 1024).split() == [
        "1,024", "7.9", "h", "0.2110%", "0.4219%", "1.0549%", "0.5000%", "97.812%", "6.9", "min", "97.915%",
    ]  # fmt: skip
