"""`restarts.json` in a stage's folder: the attempts of a job, and how many in a row came to nothing."""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megachat.files import write_json

KEPT = 20
"""Attempts whose last lines are remembered; of the others, all the rest: any number of them may count."""


@dataclass
class Attempt:
    """One start of the ranks."""

    restart: int
    """How often Slurm had requeued the job before it."""
    nodes: list[str]
    step: int
    """That of the newest checkpoint when it began; -1 without one."""
    began: str
    ended: str = ""
    reason: str = ""
    failed: bool = True
    """Until it is known better: one whose node died cannot say how it ended."""
    unfit: list[str] = field(default_factory=list)
    culprit: str = ""
    """The node of the rank that was the first to end badly, if that was one alone, and not rank 0."""
    last_lines: list[str] = field(default_factory=list)
    """The end of what the ranks said, unless all is done."""


@dataclass
class History:
    """The attempts of one job; those of an earlier job do not count against it."""

    job: str
    attempts: list[Attempt] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path, job: str) -> "History":
        """What is known of a job; nothing, if the file tells of another or cannot be read."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["job"] != job:
                return cls(job)
            return cls(job, [Attempt(**attempt) for attempt in found["attempts"]])
        except (OSError, ValueError, TypeError, KeyError):
            return cls(job)

    def write(self, path: Path) -> None:
        """Keeps it."""
        for one in self.attempts[:-KEPT]:
            one.last_lines = []
        write_json(path, {"job": self.job, "attempts": [asdict(one) for one in self.attempts]})

    def outlived(self, path: Path) -> bool:
        """Whether a newer start of the job has been there: one that Slurm has given up may live on."""
        found = History.read(path, self.job).attempts
        return bool(found) and found[-1].restart > self.attempts[-1].restart

    def begin(self, restart: int, nodes: list[str], step: int) -> Attempt:
        """A new attempt."""
        for one in self.attempts:
            one.reason = one.reason or "ended without a word: its node failed, or it was killed"
        self.attempts.append(Attempt(restart, nodes, step, _now()))
        return self.attempts[-1]

    def end(self, reason: str, failed: bool) -> None:
        """How the newest attempt ended."""
        last = self.attempts[-1]
        last.ended, last.reason, last.failed = _now(), reason, failed

    def fruitless(self, step: int, *, failed: bool = True) -> int:
        """Restarts in a row, at the end, that failed and left no checkpoint newer than they had found.

        `step` is that of the newest checkpoint now. An attempt that was asked to stop neither counts nor
        breaks the row; without `failed` those count, and failures do not. The first of all is no restart.
        """
        count, after = 0, step
        alike = [(index, one) for index, one in enumerate(self.attempts) if one.failed == failed]
        for index, one in reversed(alike):
            if after > one.step:
                break
            after = one.step
            count += index > 0
        return count

    def suspect(self) -> str:
        """The node that was the culprit of the last two attempts, both failed; empty if none was."""
        nodes = {one.culprit if one.failed else "" for one in self.attempts[-2:]}
        return nodes.pop() if len(nodes) == 1 < len(self.attempts) else ""


def newest_step(folder: Path) -> int:
    """The step of the newest complete checkpoint of a stage; -1 without one that can be seen."""
    try:
        found = [*(folder / "checkpoints").glob("step-*/manifest.json")]
    except OSError:
        return -1
    numbers = [path.parent.name.removeprefix("step-") for path in found]
    return max((int(number) for number in numbers if number.isdigit()), default=-1)


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
