"""What the tests that break things on purpose have found: one row for each fault, after pytest's report.

    record("1 one rank killed", survived=True, lost=2, seconds=3.4)

A name begins with the fault's number, which orders the table. Several records of one fault are one row: how
many there were, how many were survived, and the worst of what was lost. Call it in the test itself: a rank
that `@on_ranks` started is another process.
"""

import re
from dataclasses import dataclass

BUSY = 4.0
"""How many times as long a recovery may take as on two idle cores. Much of it is importing torch and
DeepSpeed, 4 s of an idle core, for which ranks wait when other tests compute on the same two cores: a stop
under Slurm, 8 to 12 s there, has been seen to take 40 s; a killed rank, 10 s there, 30 s."""
KILL = 10 * BUSY
STOP = 12 * BUSY
NODE = 28 * BUSY
"""A dead node: Slurm has to notice."""
HANG = 8 + 12 * BUSY
"""Eight seconds is how long a rank may stand in these tests; they pass no slower on a busy machine."""
LIMITS = {2: HANG, 3: HANG, 4: HANG, 5: NODE, 6: NODE, 7: NODE, 9: STOP, 15: STOP}
"""Seconds within which a run has recovered, by the fault's number; the others end a rank, as a kill does."""
TITLES = ("fault", "runs", "survived", "steps lost", "seconds to recover")


@dataclass
class Row:
    """What is known of one fault."""

    runs: int = 0
    survived: int = 0
    lost: int | None = None
    """The most optimizer steps that had to be repeated."""
    seconds: float | None = None
    """The longest time from the fault to the next new step."""


_rows: dict[str, Row] = {}


def record(
    fault: str,
    *,
    survived: bool,
    lost: int | None = None,
    seconds: float | None = None,
    limit: float | None = None,
) -> None:
    """One injected fault; None where there is nothing to count (a refusal loses no step).

    `limit` is for one whose seconds cannot be held to those of `LIMITS`.
    """
    row = _rows.setdefault(fault, Row())
    row.runs += 1
    row.survived += survived
    row.lost = max((count for count in (row.lost, lost) if count is not None), default=None)
    row.seconds = max((time for time in (row.seconds, seconds) if time is not None), default=None)
    if limit is None:
        limit = LIMITS.get(_by_number(fault)[0], KILL)
    assert seconds is None or seconds <= limit, (
        f"{fault}: recovered after {seconds:.0f} s, which may take {limit:.0f} s"
    )


def lines() -> list[str]:
    """The table, by the faults' numbers; empty when nothing was recorded."""
    if not _rows:
        return []
    cells = [TITLES] + [
        (
            name,
            str(row.runs),
            str(row.survived),
            "" if row.lost is None else str(row.lost),
            "" if row.seconds is None else f"{row.seconds:.1f}",
        )
        for name, row in sorted(_rows.items(), key=lambda item: _by_number(item[0]))
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(len(TITLES))]
    left, *right = widths
    shown = [" | ".join([row[0].ljust(left), *map(str.rjust, row[1:], right)]).rstrip() for row in cells]
    return [shown[0], "-+-".join("-" * width for width in widths), *shown[1:]]


def _by_number(name: str) -> tuple[int, str]:
    number = re.match(r"\d+", name)
    return (int(number[0]) if number else 10**6, name)
