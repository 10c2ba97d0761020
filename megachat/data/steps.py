"""Work in steps, each of many tasks that know nothing of one another: how a stage runs on one core or a
thousand.

A task reads files and writes files, and its result depends on nothing else; so it does not matter who does
it, when, or how often. Its record, `00003.json`, is written last: a task with a record is done, and any other
is done again. A step's folder is named for the hash of all that its result depends on.
"""

import functools
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megachat import __version__
from megachat.data.executor import Executor
from megachat.files import sweep, write_json
from megachat.log import progress, say

Record = dict[str, Any]
"""What a task tells of its work."""


@dataclass(frozen=True)
class Step:
    """Some tasks. A subclass adds what they need, and `work`; it is sent to other processes whole."""

    name: str
    folder: Path
    tasks: int

    def work(self, task: int) -> Record:
        """Does one task: writes files beside the record it returns."""
        raise NotImplementedError

    def perform(self, task: int) -> None:
        """Does one task and records it."""
        write_json(self._record(task), self.work(task))

    def missing(self) -> list[int]:
        """The tasks without a record."""
        return [task for task in range(self.tasks) if not self._record(task).is_file()]

    @functools.cached_property
    def records(self) -> list[Record]:
        """Of all tasks, once they are done."""
        return [json.loads(self._record(task).read_text(encoding="utf-8")) for task in range(self.tasks)]

    def _record(self, task: int) -> Path:
        return self.folder / f"{task:05}.json"


def folder(work: Path, name: str, *depends: Any) -> Path:
    """Where a step works: the same path for the same dependencies alone."""
    text = json.dumps([__version__, *depends], sort_keys=True, default=str)
    return work / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def carry_out(step: Step, executor: Executor, share: tuple[int, int] = (0, 1)) -> None:
    """Does the tasks that are missing; for a share of (i, n) those of every n-th task from the i-th on."""
    own = range(share[0], step.tasks, share[1])
    tasks = [task for task in step.missing() if task in own]
    step.folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with progress(step.name, len(own), "task", len(own) - len(tasks)) as bar:
        for _ in executor.run(step.perform, tasks):
            bar.update()
    if (seconds := time.monotonic() - started) > 1:
        say(f"{step.name}: {len(tasks):,} tasks in {seconds:,.1f} s")
    if not step.missing():
        sweep(step.folder)
