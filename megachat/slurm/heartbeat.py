"""For how long the ranks have stood still, judged from outside: a process cannot always say that it hangs.

Rank 0 rewrites `heartbeat.json` in the stage's folder as long as its training thread gets on, and says there
how long it may stand where it is. Only whether the file changes counts, by this process's own clock: the
clocks of nodes may be wrong.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PAUSE = 30.0
"""After so many seconds without a look the watch starts anew: the whole job was suspended, not one rank."""
MARGIN = 60.0
"""Seconds more than the ranks allow themselves: their own watch knows which rank it is, and comes first."""


@dataclass(frozen=True)
class Limits:
    """How many seconds without a change are too many."""

    start: float
    """Until the first sign of life: loading, and waiting for the slowest node."""
    hang: float | None
    """In a step, once the first is over; None goes by what the ranks allow themselves, as all else does."""


class Watch:
    """Looks at the file now and then."""

    def __init__(self, path: Path, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self.limits, self.clock = path, limits, clock
        self.mark = identity(self.path)
        """Which file was there; at first, perhaps one of an earlier attempt."""
        self.limit, self.last = limits.start, "there was none"
        self.since = self.looked = clock()

    def hung(self) -> str:
        """Where it has stood still for too long; empty if it has not."""
        now = self.clock()
        if now - self.looked > PAUSE:
            self.since = now
        self.looked = now
        mark = identity(self.path)
        if mark != self.mark:
            self.mark, self.since = mark, now
            self._read()
        if now - self.since <= self.limit:
            return ""
        return f"no sign of life for {self.limit:g} s: {self.last}"

    def _read(self) -> None:
        try:
            beat = json.loads(self.path.read_text(encoding="utf-8"))
            step, section, allowed = beat["step"], beat["section"], beat.get("limit")
            long = beat.get("long") or not beat.get("settled", True)
        except (OSError, ValueError, KeyError, TypeError):
            return  # it is being replaced, or the folder has been moved away
        self.last = f"the last was in {section!r} at step {step}"
        own = float("inf") if allowed is None else allowed + MARGIN
        self.limit = own if self.limits.hang is None or long else self.limits.hang


def identity(path: Path) -> tuple[int, int] | None:
    """What changes when a file is replaced; None without one."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_ino
