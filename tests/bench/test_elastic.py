"""The table of layouts saved and loaded: cells that are missing, too far off, or not a number."""

import shutil
from math import isnan, nan
from pathlib import Path

import pytest

from megachat.parallel import checkpoint
from tools.bench import elastic
from tools.bench.elastic import Layout, difference, gang, go_on, layouts, summary, table, told, train_and_save

ONE, TWO = Layout(0, 1, 1), Layout(3, 2, 2)
CELLS = {(ONE, ONE): 0.0, (ONE, TWO): 3.2e-6, (TWO, ONE): 1e-4, (TWO, TWO): 2e-7}


def test_there_are_sixteen_layouts_and_the_first_is_one_plain_process() -> None:
    assert len(set(layouts())) == 16
    assert layouts()[0] == ONE
    assert {layout.zero for layout in layouts()} == {0, 1, 2, 3}
    assert {layout[1:] for layout in layouts()} == {(1, 1), (1, 2), (2, 1), (2, 2)}


def test_a_line_is_a_layout_that_saved_and_a_column_one_that_went_on() -> None:
    heading, columns, *lines = table([ONE, TWO], {key: CELLS[key] for key in CELLS if key != (TWO, TWO)})
    assert "saved (lines), loaded (columns)" in heading
    assert columns.split() == ["0/1x1", "3/2x2"]
    assert [line.split() for line in lines] == [["0/1x1", "0", "3e-06"], ["3/2x2", "1e-04", "-"]]
    assert len({len(line) for line in (columns, *lines)}) == 1


def test_the_last_line_counts_the_cells_and_names_the_largest_difference() -> None:
    assert summary([ONE, TWO], CELLS, 1234.5) == (
        "4 of 4 cells; over 5 steps a loss differs by at most 1.0e-04 (limit 0.0001); 1,234 s",
        True,
    )


@pytest.mark.parametrize(
    "cells",
    [
        {key: CELLS[key] for key in CELLS if key != (ONE, TWO)},
        CELLS | {(ONE, TWO): 1.1e-4},
        CELLS | {(ONE, ONE): nan},
        CELLS | {(TWO, TWO): nan},
        {},
    ],
)
def test_an_empty_cell_or_one_beyond_the_limit_is_a_failure(
    cells: dict[tuple[Layout, Layout], float],
) -> None:
    assert not summary([ONE, TWO], cells, 1.0)[1]


def test_the_difference_is_the_largest_of_the_steps_and_no_number_stays_none() -> None:
    assert difference([2.0, 4.004, 5.0], [2.0, 4.0, 5.0]) == pytest.approx(0.001)
    assert isnan(difference([2.0, nan, 5.0], [2.0, 4.0, 5.0]))
    assert isnan(difference([2.0], [2.0, 4.0]))


def start_over(folder: Path, own: list[Layout], chosen: list[Layout]) -> None:
    """As `go_on`, by a rank that never finds a checkpoint."""
    checkpoint.newest = lambda *_: None
    go_on(folder, own, chosen)


@pytest.mark.slow
def test_a_run_that_starts_over_is_no_cell_though_its_losses_are_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elastic.write_run(tmp_path / "inputs")
    gang(1, 1, train_and_save, tmp_path, [ONE])
    gang(1, 1, start_over, tmp_path, [ONE], [ONE])
    assert "0/1x1 started over; it was to go on from step 3 of 0/1x1" in capsys.readouterr().err
    moved = tmp_path / "moved" / "0-1-1-0-1-1"
    assert elastic.losses(moved) == elastic.losses(tmp_path / "saved" / "0-1-1")
    assert told(tmp_path, [ONE], [ONE]) == {}
    shutil.rmtree(moved)
    gang(1, 1, go_on, tmp_path, [ONE], [ONE])
    assert told(tmp_path, [ONE], [ONE]) == {(ONE, ONE): 0.0}
