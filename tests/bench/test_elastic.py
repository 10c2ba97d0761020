"""The table of layouts saved and loaded: cells that are missing, too far off, or not a number."""

from math import isnan, nan

import pytest

from tools.bench.elastic import Layout, difference, layouts, summary, table

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
