"""megachat with something wrong in it: patches a rank so that it fails at a chosen moment, then runs `main`.

    python -m tests.faults.inject '{"faults": [{"at": "backward", "do": "kill", "step": 5, "rank": 1}]}' \
        pretrain model=gpt_3m ...

A fault happens once, at a point of the program (`at`), in a step and on a rank. Where the moment is one of
writing files it is found by Python's audit events, so that it is what the disk sees, whatever the code is
called. A journal, one file for each rank, notes when a fault struck, and of every step when it was taken and
on which samples.
"""

import ctypes
import errno
import hashlib
import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

JOURNAL = "MEGACHAT_FAULTS_JOURNAL"
"""The environment variable with the folder in which a faulty rank may leave what it likes."""
CHECKPOINT = re.compile(r"checkpoints/step-(\d+)(\.[\w.]*tmp)?(?:/|$)")


@dataclass(frozen=True)
class Fault:
    """What goes wrong, where and when."""

    at: str
    """The point: `start`, `joined`, `prepare`, `data`, `forward`, `loss`, `gradient`, `backward`, `step`,
    `weights`, `stepped`, `validation`, or of saving: `save:folder`, `save:shard`, `save:manifest`,
    `save:rename`, `save:latest`, `save:delete`; before and after memory is taken for
    what is written in the background: `host`, `hosted`. Of PPO also `answers`, some of which are sampled,
    and `step:critic`: by then the policy is updated."""
    do: str
    """A name in `DEEDS`."""
    step: int = 0
    """The optimizer step (or the checkpoint's), the first being 1; 0: the first time the point is reached."""
    rank: int | None = None
    """None: every rank."""
    value: float = 0.0
    """Seconds, bytes, a signal's number, a factor: as the deed has it."""
    until: int = 0
    """Every time that the point is reached, from `step` up to this step; 0: once."""


def kill(_: Fault) -> None:
    """What the kernel does when memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)


def crash(_: Fault) -> None:
    """A null pointer in a C library."""
    ctypes.string_at(0)


def throw(_: Fault) -> None:
    """A bug."""
    raise RuntimeError("injected")


def read_fifo(_: Fault) -> None:
    """A file system that does not answer: opening a pipe that nobody writes to."""
    path = f"{os.environ.get(JOURNAL, '/tmp')}/fifo-{os.getpid()}"
    os.mkfifo(path)
    try:
        open(path).close()
    finally:
        os.unlink(path)


def hold_gil(fault: Fault) -> None:
    """A C library that does not let go of the interpreter: no thread of this process runs."""
    ctypes.PyDLL(None).sleep(int(fault.value))


def limit_files(fault: Fault, how: Any = signal.SIG_DFL) -> None:
    """From now on the kernel kills this process amid a write that makes a file larger than `value`."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, how)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(fault.value), resource.RLIM_INFINITY))


def limit_memory(fault: Fault) -> None:
    """From now on this process can have `value` bytes more than it has."""
    ctypes.CDLL(None).malloc_trim(0)  # nor what it has freed and kept
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + int(fault.value)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def unlimit(_: Fault) -> None:
    """What `limit`, `full` and `memory` have done is over."""
    for what in (resource.RLIMIT_FSIZE, resource.RLIMIT_AS):
        resource.setrlimit(what, (resource.getrlimit(what)[1],) * 2)


def shift_clock(fault: Fault) -> None:
    """This rank's clock is wrong."""
    real, real_ns = time.time, time.time_ns
    time.time = lambda: real() + fault.value  # type: ignore[assignment]
    time.time_ns = lambda: real_ns() + int(fault.value * 1e9)  # type: ignore[assignment]


def fail_io(fault: Fault) -> None:
    """A broken disk (5) or a full one (28)."""
    number = int(fault.value) or errno.EIO
    raise OSError(number, os.strerror(number))


def nothing(_: Fault) -> None:
    """The point itself does it: `loss` and `gradient` are multiplied by `value`."""


DEEDS: dict[str, Callable[[Fault], Any]] = {
    "kill": kill,
    "exit": lambda _: os._exit(3),
    "abort": lambda _: os.abort(),
    "crash": crash,
    "raise": throw,
    "freeze": lambda _: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda fault: time.sleep(fault.value),
    "fifo": read_fifo,
    "gil": hold_gil,
    "signal": lambda fault: os.kill(os.getpid(), int(fault.value)),
    "limit": limit_files,
    "full": lambda fault: limit_files(fault, signal.SIG_IGN),
    "memory": limit_memory,
    "unlimit": unlimit,
    "clock": shift_clock,
    "io": fail_io,
    "poison": nothing,
    "flip": nothing,
}


class Injector:
    """The faults of one rank in one attempt."""

    def __init__(self, faults: Sequence[Fault], journal: Path | None = None, attempt: int = 1) -> None:
        names = os.environ
        self.rank = int(names.get("RANK", names.get("SLURM_PROCID", "0")))
        self.faults = [fault for fault in faults if fault.rank in (None, self.rank)]
        self.attempt, self.step, self.deleting = attempt, 0, 0
        self.roles: dict[Any, str] = {}
        self.journal = None
        if journal is not None:
            os.environ[JOURNAL] = str(journal)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
            self.journal = os.open(journal / f"rank{self.rank}.jsonl", flags, 0o644)
        self.clock = time.time
        self.note("begin")

    def note(self, event: str, **facts: Any) -> None:
        """A line in the journal; it is in the kernel's hands before a signal can end this process."""
        if self.journal is not None:
            line = {"time": self.clock(), "attempt": self.attempt, "rank": self.rank, "event": event, **facts}
            os.write(self.journal, f"{json.dumps(line)}\n".encode())

    def due(self, point: str, step: int) -> list[Fault]:
        """The faults that are to happen here and now."""
        return [
            fault
            for fault in self.faults
            if fault.at == point and (fault.step in (0, step) or fault.step < step <= fault.until)
        ]

    def reach(self, point: str, step: int | None = None) -> Fault | None:
        """The program is at this point: does what is due, and returns the last of it."""
        step, last = self.step if step is None else step, None
        for last in self.due(point, step):
            if not last.until:
                self.faults.remove(last)
                self.note("fault", at=point, do=last.do, step=step)
            DEEDS[last.do](last)
        return last

    def arm(self) -> None:
        """Patches what a training stage calls."""
        from megachat.align import rollout
        from megachat.parallel.engine import Engine
        from megachat.parallel.saving import Saver
        from megachat.train import loop

        self._around(Saver, "_has_host", "host", "hosted")
        self._patch(loop, "fit", self._fit)
        self._around(loop, "start", "start", "joined")
        self._patch(rollout, "write", self._write)
        self._around(Engine, "__call__", "forward")
        self._patch(Engine, "backward", self._backward)
        self._patch(Engine, "step", self._engine_step)
        self._patch(loop, "train_step", self._train_step)
        sys.addaudithook(self._audit)

    def _patch(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        original = getattr(owner, name)

        def patched(*arguments: Any, **named: Any) -> Any:
            return around(original, *arguments, **named)

        setattr(owner, name, patched)

    def _around(self, owner: Any, name: str, before: str, after: str = "") -> None:
        def around(original: Any, *arguments: Any, **named: Any) -> Any:
            if before:
                self.reach(before)
            result = original(*arguments, **named)
            if after:
                self.reach(after)
            return result

        self._patch(owner, name, around)

    def _write(self, original: Any, *arguments: Any) -> Any:
        for written in original(*arguments):
            if written.last:
                self.reach("answers")
            yield written

    def _fit(self, original: Any, task: Any) -> None:
        """Only now it is known which stage it is."""
        stage = type(task)
        self._around(stage, "prepare", "prepare")
        self._around(stage, "measure", "validation")
        self._patch(stage, "batches", self._batches)
        self._patch(stage, "loss", self._loss)
        original(task)

    def _batches(self, original: Any, task: Any, run: Any) -> Any:
        steps = original(task, run)
        while True:
            self.step = run.progress.step + 1  # already now: PPO samples the answers of this step
            batches = next(steps)
            self.reach("data")
            yield batches

    def _loss(self, original: Any, task: Any, run: Any, batch: Any) -> Any:
        losses = original(task, run, batch)
        if fault := self.reach("loss"):
            for role in losses.losses:
                losses.losses[role] = losses.losses[role] * fault.value
        return losses

    def _backward(self, original: Any, engine: Any, loss: Any, last: bool) -> None:
        middle = [*engine.module.parameters()]
        middle = middle[len(middle) // 2]
        hooks = []
        if self.due("backward", self.step):
            hooks.append(middle.register_hook(lambda _: self.reach("backward") and None))
        if fault := self.reach("gradient"):
            hooks.append(middle.register_hook(lambda gradient: gradient * fault.value))
        original(engine, loss, last)
        for hook in hooks:
            hook.remove()

    def _engine_step(self, original: Any, engine: Any, rate: float) -> float:
        """`step`: this rank has new weights already, and the others have not heard of them."""
        optimizer = engine._basic_optimizer
        if not hasattr(optimizer, "_unharmed"):
            optimizer._unharmed = optimizer.step

            def step(*arguments: Any, **named: Any) -> Any:
                result = optimizer._unharmed(*arguments, **named)
                self.reach("step")
                self.reach(f"step:{self.roles[engine]}")
                return result

            optimizer.step = step
        norm: float = original(engine, rate)
        if fault := self.reach("weights"):
            self._flip(next(iter(engine.module.parameters())), int(fault.value))
        return norm

    def _flip(self, parameter: Any, bit: int) -> None:
        """One bit of the first number."""
        import torch

        parameter.data.view(-1)[:1].view(torch.int32).bitwise_xor_(1 << bit)

    def _train_step(self, original: Any, task: Any, run: Any, batches: Any, *more: Any, **named: Any) -> Any:
        self.roles = {engine: role for role, engine in run.engines.items()}
        samples = [
            hashlib.blake2b(row.numpy().tobytes(), digest_size=6).hexdigest()
            for batch in batches
            for row in (batch.inputs if hasattr(batch, "inputs") else batch.rows.tokens).cpu()
        ]
        result = original(task, run, batches, *more, **named)
        self.note("step", step=run.progress.step + 1, samples=samples)
        self.reach("stepped")
        return result

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.mkdir", "os.rename", "os.remove", "shutil.rmtree"):
            return
        if event == "os.remove" and self.deleting:
            self.deleting += 1
            if self.deleting == 3:  # one file has gone, the second is about to
                self.reach("save:delete")
            return
        path = arguments[1] if event == "os.rename" else arguments[0]
        if not isinstance(path, str | os.PathLike):
            return
        path = os.fspath(path)
        if event == "os.rename" and "latest.json" in path and "checkpoints" in path:
            self.reach("save:latest")
            return
        found = CHECKPOINT.search(os.fspath(arguments[0]) if event == "os.rename" else path)
        if not found:
            return
        step, unfinished, name = int(found[1]), found[2] or "", os.path.basename(path)
        if event == "os.mkdir" and unfinished:
            self.reach("save:folder", step)
        elif event == "open" and unfinished and name.startswith("tensors-"):
            self.reach("save:shard", step)
        elif event == "open" and unfinished and name.startswith("manifest.json"):
            self.reach("save:manifest", step)
        elif event == "os.rename" and unfinished and name.startswith("step-"):
            self.reach("save:rename", step)
        elif event == "shutil.rmtree" and unfinished == ".old.tmp":
            self.deleting = 1


def run(plan: dict[str, Any], arguments: Sequence[str]) -> None:
    """Arms the faults of a plan, then is megachat."""
    journal = Path(plan["journal"]) if "journal" in plan else None
    injector = Injector([Fault(**fault) for fault in plan["faults"]], journal, plan.get("attempt", 1))
    injector.arm()
    from megachat.__main__ import main

    main(arguments)


if __name__ == "__main__":
    run(json.loads(sys.argv[1]), sys.argv[2:])
