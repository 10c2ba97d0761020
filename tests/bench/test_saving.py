"""What the benchmark of checkpoints makes of its clocks; that its writers write the same."""

from pathlib import Path

import pytest

from tools.bench import saving
from tools.bench.saving import Took


def test_a_line_has_the_first_apart_and_the_median_of_the_others() -> None:
    took = [Took(9.0, 10.0), Took(3.0, 7.0), Took(1.0, 5.0), Took(1.5, 6.0)]
    # 3 GB in 1.5 s; 1.5 of 600 s.
    assert saving.line("x", took, 3 * 10**9).split() == ["x", "9.00", "1.50", "2.00", "0.25%", "6.00"]


def test_the_parts_of_a_recovery_add_up() -> None:
    marks = {"started": 103.0, "verify": 104.5, "verified": 105.0, "restored": 107.0, "stepped": 110.0}
    rows = [row.split()[-2] for row in saving.recovered(marks, killed=100.0)]
    assert rows == ["3.00", "1.50", "0.50", "2.00", "3.00", "7.00", "10.00"]


@pytest.mark.slow
def test_every_writer_writes_a_checkpoint_of_the_size(tmp_path: Path) -> None:
    from tests.spawn import on_ranks

    on_ranks(1)(_written)  # noqa: F841


def _written(tmp_path: Path) -> None:
    raise NotImplementedError
