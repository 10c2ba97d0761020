"""The table of faults, and that pytest prints it."""

from math import inf

import pytest

from tests import fault_table


@pytest.fixture(autouse=True)
def _own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fault_table, "_rows", {})


def test_records_of_one_fault_are_one_row_with_the_worst_of_them_in_the_order_of_the_numbers() -> None:
    fault_table.record("10 killed while saving", survived=True, lost=1, seconds=2.04)
    fault_table.record("9 a signal", survived=True, lost=0)
    fault_table.record("10 killed while saving", survived=False)
    fault_table.record("10 killed while saving", survived=True, lost=3, seconds=1.0)
    assert fault_table.lines() == [
        "fault                  | runs | survived | steps lost | seconds to recover",
        "-----------------------+------+----------+------------+-------------------",
        "9 a signal             |    1 |        1 |          0 |",
        "10 killed while saving |    3 |        2 |          3 |                2.0",
    ]


@pytest.mark.parametrize(
    ("fault", "limit"),
    [("1 one rank killed", 40), ("9 signal", 48), ("2 frozen", 56), ("5 a node dies", 112)],
)
def test_a_recovery_has_four_times_what_it_takes_on_an_idle_machine(fault: str, limit: int) -> None:
    fault_table.record(fault, survived=True, seconds=limit)
    with pytest.raises(AssertionError, match=f"{fault}: recovered after {limit + 1} s, .* {limit} s"):
        fault_table.record(fault, survived=True, seconds=limit + 1)
    fault_table.record(fault, survived=True, seconds=limit + 1, limit=inf)


def test_pytest_prints_it_only_when_there_is_something_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    from tests.conftest import pytest_terminal_summary

    class Terminal:
        write_sep = staticmethod(lambda line, title: print(line, title))
        write_line = staticmethod(print)

    pytest_terminal_summary(Terminal())  # type: ignore[arg-type]
    assert capsys.readouterr().out == ""
    fault_table.record("1 one rank killed", survived=True)
    pytest_terminal_summary(Terminal())  # type: ignore[arg-type]
    title, head, _, row = capsys.readouterr().out.splitlines()
    assert title == "= faults"
    assert head.startswith("fault")
    assert row.startswith("1 one rank killed")
