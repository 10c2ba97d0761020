"""For how long the ranks have stood still, judged from outside: a process cannot always say that it hangs.

Rank 0 rewrites `heartbeat.json` in the stage's folder as long as its main thread gets on. Only whether the
file changes counts, by this process's own clock: the clocks of nodes may be wrong.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PAUSE = 30.0
"""Seconds without a look after which the watch starts anew: the whole job was suspended, not a rank alone."""


@dataclass(frozen=True)
class Limits:
    """How many seconds without a change are too many."""

    start: float
    """Until the first step has been taken: loading, compiling, and waiting for the slowest node."""
    step: float
    """From then on."""


class Watch:
    """Looks at the file now and then."""

    def __init__(self, path: Path, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self.limits, self.clock = path, limits, clock
        self.mark = self._mark()
        """Which file was there; at first, perhaps one of an earlier attempt."""
        self.first_step: object = None
        self.stepped = False
        self.long = 0.0
        """How long it may take over what it is doing, where that is no part of a step: saving, a rollout."""
        self.last = ""
        self.since = self.looked = clock()

    def hung(self) -> str:
        """Where it has stood still for too long; empty if it has not."""
        now = self.clock()
        if now - self.looked > PAUSE:
            self.since = now
        self.looked = now
        mark = self._mark()
        if mark != self.mark:
            self.mark, self.since = mark, now
            self._read()
        limit = max(self.limits.step, self.long) if self.stepped else self.limits.start
        if now - self.since <= limit:
            return ""
        return f"no sign of life for {limit:g} s, {self.last or 'before the first one'}"

    def _mark(self) -> tuple[int, int] | None:
        try:
            facts = self.path.stat()
        except OSError:
            return None
        return facts.st_mtime_ns, facts.st_ino

    def _read(self) -> None:
        try:
            beat = json.loads(self.path.read_text(encoding="utf-8"))
            step, section = beat["step"], beat.get("section")
            # The ranks' own watch comes first: it says which of them it is. Its limit may be none at all.
            self.long = float(beat.get("limit") or math.inf) + 60 if beat.get("long") else 0.0
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return  # it is being replaced, or the folder has been moved away
        if self.first_step is None:
            self.first_step = step
        self.stepped = self.stepped or bool(beat.get("settled", step != self.first_step))
        self.last = f"the last in {section!r} at step {step}" if section else f"the last at step {step}"
