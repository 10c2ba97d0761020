"""The bytes of a step as DeepSpeed sends them, and the lines that compare them."""

import pytest

from megachat.parallel.volume import LIVE, Layout
from tests.spawn import on_ranks
from tools.bench.volume import Cell, count, lines


def cell(zero: int, data: int, tensor: int, **changed: int) -> Cell:
    return Cell(
        Layout(zero, data, tensor, 2, 2, 32, **{"bf16": True, "checkpointing": False} | changed), LIVE
    )


def wrong(chosen: Cell) -> list[str]:
    return [line for line, fine in lines(chosen, count(chosen)) if not fine]


@pytest.mark.slow
@on_ranks(2)
def test_two_data_ranks_send_what_the_formula_says() -> None:
    for zero in (0, 1, 2, 3):
        assert wrong(cell(zero, 2, 1)) == []


@pytest.mark.slow
@on_ranks(2)
def test_two_tensor_ranks_send_what_the_formula_says() -> None:
    for chosen in (cell(1, 1, 2), cell(0, 1, 2), cell(1, 1, 2, checkpointing=True)):
        assert wrong(chosen) == []


@pytest.mark.slow
@on_ranks(2)
def test_two_ranks_that_share_rows_send_what_the_formula_says() -> None:
    for chosen in (cell(1, 1, 1, sequence=2), cell(0, 1, 1, sequence=2)):
        assert wrong(chosen) == []
    assert wrong(cell(3, 1, 1, sequence=2, checkpointing=True)) == []


def test_a_count_that_is_a_fiftieth_off_is_marked() -> None:
    # In ZeRO 0 without bf16 two ranks of 7,606,528 parameters reduce 30.4 MB.
    exact = 4 * 7_606_528
    assert [fine for _, fine in lines(cell(0, 2, 1, bf16=False), {"all_reduce": exact})] == [True]
    ((line, fine),) = lines(cell(0, 2, 1, bf16=False), {"all_reduce": exact * 51 // 50})
    assert not fine
    assert line.split()[-5:] == ["all_reduce", "30,426", "31,035", "1.0200", "!"]


def test_a_kind_that_no_formula_has_is_marked_unless_it_is_tiny() -> None:
    expected = {"all_reduce": 4 * 7_606_528}
    assert len([*lines(cell(0, 2, 1), expected | {"broadcast_": 999})]) == 1
    marked = [
        line.split() for line, fine in lines(cell(0, 2, 1), expected | {"broadcast_": 10**6}) if not fine
    ]
    assert [words[-5:] for words in marked] == [["broadcast_", "0", "1,000", "-", "!"]]
