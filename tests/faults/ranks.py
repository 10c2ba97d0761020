"""A job of several ranks that is started again, as a launcher would, until it is done.

    story = Job(folder, inputs, ranks=2).go([Fault("backward", "kill", step=3, rank=1)])

Each list is what goes wrong in one attempt; one more attempt follows in which nothing does. Ranks fork from
the server of `tests/spawn.py`, so that an attempt takes two seconds and not ten.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from safetensors import safe_open

from tests.align import tiny
from tests.faults import inject
from tests.faults.inject import Fault
from tests.spawn import context, environment, free_port
from tests.tiny_run import TINY

Watcher = Callable[["Attempt"], None]


@dataclass
class Attempt:
    """The ranks of one start."""

    number: int
    folder: Path
    processes: list[Any] = field(default_factory=list)
    codes: list[int | None] = field(default_factory=list)
    """How each rank ended: a negative number is the signal that killed it, None: it stood still."""
    ended: float = 0.0

    def printed(self, rank: int = 0) -> str:
        """What a rank wrote to its terminal."""
        return (self.folder / f"rank{rank}.log").read_text(encoding="utf-8", errors="replace")

    @property
    def said(self) -> str:
        """What all ranks wrote."""
        return "\n".join(self.printed(rank) for rank in range(len(self.processes)))

    def reached(self, step: int, patience: float = 60.0) -> bool:
        """Waits until rank 0 has taken this step; False when it ended, or the time was up, before that."""
        deadline = time.monotonic() + patience
        journal = self.folder.parent / "journal" / "rank0.jsonl"
        while time.monotonic() < deadline and self.processes[0].is_alive():
            lines = journal.read_text().splitlines() if journal.exists() else []
            notes = [note for note in map(json.loads, lines) if note["attempt"] == self.number]
            if any(note["event"] == "step" and note["step"] >= step for note in notes):
                return True
            time.sleep(0.01)
        return False

    def send(self, number: int) -> None:
        """A signal to every rank."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, number)


@dataclass
class Story:
    """What happened in all attempts."""

    job: "Job"
    attempts: list[Attempt]

    @property
    def journal(self) -> list[dict[str, Any]]:
        """What the ranks noted, in the order of time."""
        files = sorted((self.job.folder / "journal").glob("*.jsonl"))
        lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        return sorted(lines, key=lambda line: line["time"])

    def of(self, event: str, attempt: int | None = None, rank: int | None = None) -> list[dict[str, Any]]:
        """The notes of one kind."""
        return [
            line
            for line in self.journal
            if line["event"] == event and attempt in (None, line["attempt"]) and rank in (None, line["rank"])
        ]

    @property
    def finished(self) -> bool:
        """Whether the stage is done."""
        return (self.job.stage / "done.json").is_file()

    def costs(self) -> list[tuple[int, float | None]]:
        """Of each attempt but the last: steps taken twice, seconds from its fault to the first new step."""
        found: list[tuple[int, float | None]] = []
        for number in range(1, len(self.attempts)):
            done = max((line["step"] for line in self.of("step") if line["attempt"] <= number), default=0)
            again = [line for line in self.of("step", rank=0) if line["attempt"] > number]
            new = [line["time"] for line in again if line["step"] > done]
            struck = self.of("fault", number)
            begin = struck[-1]["time"] if struck else self.attempts[number - 1].ended
            lost = max(0, done - again[0]["step"] + 1) if again else 0
            found.append((lost, new[0] - begin if new else None))
        return found

    def samples(self) -> dict[int, list[str]]:
        """What each step was taken on, by all ranks together; of a step taken twice, the last time."""
        by_step: dict[int, dict[int, list[str]]] = {}
        for line in sorted(self.of("step"), key=lambda line: line["attempt"]):
            by_step.setdefault(line["step"], {})[line["rank"]] = line["samples"]
        return {
            step: [one for rank in sorted(ranks) for one in ranks[rank]] for step, ranks in by_step.items()
        }


@dataclass
class Job:
    """A command and where it runs."""

    folder: Path
    """The run folder is `folder/run`; what the ranks print and note lies beside it."""
    inputs: Path
    """A run folder with what the stage reads."""
    settings: Sequence[str] = ()
    ranks: int = 2
    patience: float = 120.0
    """Seconds that an attempt may take."""
    grace: float = 1.0
    """Seconds that ranks have to end by themselves once one has failed."""
    variables: dict[str, str] = field(default_factory=dict)
    """Further environment variables."""
    name: str = "pretrain"
    """The stage."""

    def __post_init__(self) -> None:
        self.story = Story(self, [])

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / "run"

    @property
    def stage(self) -> Path:
        """The folder of its only stage."""
        return self.run / self.name

    def go(
        self,
        *attempts: Sequence[Fault],
        watch: Watcher | None = None,
        then: Sequence[Sequence[Fault]] = ((),),
    ) -> Story:
        """Attempts with these faults, watched, then others (one without any), not watched."""
        for faults in attempts:
            self.attempt(faults, watch)
        for faults in then:
            self.attempt(faults)
        return self.story

    def attempt(self, faults: Sequence[Fault] = (), watch: Watcher | None = None) -> Attempt:
        """Starts the ranks and waits for their end, as `srun --kill-on-bad-exit` does."""
        number = len(self.story.attempts) + 1
        attempt = Attempt(number, self.folder / f"attempt{number}")
        self.story.attempts.append(attempt)
        attempt.folder.mkdir(parents=True)
        (self.folder / "journal").mkdir(exist_ok=True)
        plan = {
            "faults": [asdict(fault) for fault in faults],
            "journal": str(self.folder / "journal"),
            "attempt": number,
        }
        if self.name == "pretrain":
            usual = ["model=gpt_3m", *TINY, f"inputs={self.inputs}"]
        else:
            usual = tiny.settings(self.name, self.inputs)
        command = [self.name, *usual, f"run={self.run}", *self.settings]
        port = free_port()
        for rank in range(self.ranks):
            variables = environment(rank, self.ranks, port, "cpu") | self.variables
            log = attempt.folder / f"rank{rank}.log"
            process = context("cpu").Process(target=be_rank, args=(plan, command, variables, log))
            process.start()
            attempt.processes.append(process)
        try:
            if watch is not None:
                watch(attempt)
            attempt.codes = self._wait(attempt)
        finally:
            for process in attempt.processes:  # a frozen one would stay for ever
                process.kill()
        attempt.ended = time.time()
        return attempt

    def _wait(self, attempt: Attempt) -> list[int | None]:
        deadline = time.monotonic() + self.patience
        running = {process.sentinel: process for process in attempt.processes}
        while running and time.monotonic() < deadline:
            for sentinel in wait(list(running), max(0.0, deadline - time.monotonic())):
                process = running.pop(sentinel)
                process.join()
                if process.exitcode:
                    deadline = min(deadline, time.monotonic() + self.grace)
        for process in running.values():
            process.kill()
            process.join()
        return [None if process in running.values() else process.exitcode for process in attempt.processes]


def be_rank(plan: dict[str, Any], command: list[str], variables: dict[str, str], log: Path) -> None:
    """One rank, in the forked process."""
    os.environ.clear()
    os.environ.update(variables)
    with log.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdin = open(os.devnull)  # noqa: SIM115
    import torch

    torch.set_num_threads(1)
    inject.run(plan, command)


def weights(run: Path) -> str:
    """The sha256 of all tensors of pretraining's newest checkpoint, whatever files they are in."""
    return hashlib.sha256(json.dumps(tensors(run / "pretrain"), sort_keys=True).encode()).hexdigest()


def tensors(stage: Path) -> dict[str, str]:
    """The sha256 of each tensor of a stage's newest checkpoint."""
    found = {}
    newest = sorted(path for path in (stage / "checkpoints").glob("step-*") if path.suffix != ".tmp")[-1]
    for path in newest.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118
                found[name] = hashlib.sha256(file.get_tensor(name).tobytes()).hexdigest()
    assert found, f"{newest} holds no tensors"
    return found
