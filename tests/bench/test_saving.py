"""What the benchmark of checkpoints makes of its clocks, and that its writers write what they say."""

from pathlib import Path

import pytest

from tests.spawn import on_ranks
from tools.bench.saving import Took, line, programs, recovered


def test_a_line_has_the_first_apart_and_the_median_of_the_others() -> None:
    took = [Took(9.0, 10.0), Took(3.0, 7.0), Took(1.0, 5.0), Took(1.5, 6.0)]
    # 3 GB in 1.5 s; 1.5 of 600 s.
    assert line("x", took, 3 * 10**9).split() == ["x", "9.00", "1.50", "2.00", "0.25%", "6.00"]


def test_the_parts_of_a_recovery_add_up() -> None:
    marks = {"started": 103.0, "verify": 104.5, "verified": 105.0, "restored": 107.0, "stepped": 110.0}
    rows = [row.split()[-2] for row in recovered(marks, killed=100.0)]
    assert rows == ["3.00", "1.50", "0.50", "2.00", "3.00", "7.00", "10.00"]


@pytest.mark.slow
@on_ranks(1)
def test_every_writer_writes_as_many_bytes_as_are_counted(tmp_path: Path) -> None:
    writers, size = programs(tmp_path, "gpt_3m", 1)
    for number, (name, write) in enumerate(writers.items()):
        place = tmp_path / ("checkpoints" if name.startswith("megachat") else str(number))
        took = write(place, number + 1)
        assert 0 < took.stall <= took.total
        written = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        # DeepSpeed keeps the weights that compute as well: a third more. The rest is names.
        factor = 4 / 3 if name.startswith("DeepSpeed") else 1
        assert written == pytest.approx(factor * size, rel=1e-3), name
