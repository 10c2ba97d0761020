"""Checkpoints are written whole or not at all, beside the training, by all ranks together.

Each rank copies its share of the tensors to host memory (training waits for that alone) and a thread writes
it to `step-N.<attempt>.tmp`: tensors, fsync. When all have done so rank 0 looks that no tensor is missing,
adds the manifest, renames the folder, and only then does `latest.json` name it. A save that fails is an
alarm: the training goes on, and the last good checkpoint stays.
"""

import hashlib
import heapq
import json
import os
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megachat.files import fsync, remove, write_json
from megachat.log import say
from megachat.parallel.attempt import Attempt
from megachat.parallel.checkpoint import LATEST, REPLACED, SAVED, steps, write_manifest
from megachat.parallel.engine import Engine
from megachat.parallel.mesh import Mesh
from megachat.run import Superseded

FILE_BYTES = 2**30
"""A file of tensors is written whenever so much is held, which bounds host memory."""

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
}
"""How safetensors calls them."""

Files = dict[str, dict[str, Any]]
"""What a manifest says of its files, by name."""


def write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]], writer: int = 0) -> Files:
    """Writes files of about FILE_BYTES, fsyncs them, and returns what the manifest says of them.

    It takes a tensor from the iterator only when it has room: it never holds more than FILE_BYTES and the
    tensor that no longer fitted.
    """
    files: Files = {}
    held: dict[str, Tensor] = {}
    size = 0

    def flush() -> None:
        path = folder / f"tensors-{writer:05d}-{len(files):05d}.safetensors"
        files[path.name] = _write_file(path, held)
        held.clear()

    for name, tensor in tensors:
        if held and size + tensor.nbytes > FILE_BYTES:
            flush()
            size = 0
        held[name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
        del tensor  # or this name would keep it alive while the next one is made
    if held:
        flush()
    return files


def _write_file(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """One safetensors file; the library's own writer copies all tensors before it writes the first.

    The sum is of what was meant to be written, so that a disk that swallows a bit is found out.
    """
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        facts = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = facts | {"data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    total = hashlib.sha256()
    with path.open("wb") as file:
        pieces: Iterator[Any] = (tensor.reshape(-1).view(torch.uint8).numpy() for tensor in tensors.values())
        for piece in (len(head).to_bytes(8, "little"), head, *pieces):
            file.write(piece)
            total.update(piece)
        file.flush()
        os.fsync(file.fileno())
    described = {name: {"dtype": facts["dtype"], "shape": facts["shape"]} for name, facts in header.items()}
    return {"bytes": 8 + len(head) + end, "sha256": total.hexdigest(), "tensors": described}


def deal(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """The rank that writes each tensor: the one with the fewest bytes so far.

    Example: deal({"a": 3, "b": 1, "c": 1}, 2) -> {"a": 0, "b": 1, "c": 1}
    """
    loads = [(0, rank) for rank in range(ranks)]
    owners = {}
    for name, size in sizes.items():
        load, owners[name] = heapq.heappop(loads)
        heapq.heappush(loads, (load + size, owners[name]))
    return owners


@dataclass
class _Save:
    """A checkpoint that is being written."""

    facts: dict[str, Any]
    """For the manifest; settled at the moment of saving."""
    folder: Path
    """The temporary one."""
    begun: float
    files: Files = field(default_factory=dict)
    """What this rank has written."""
    problem: str = "its writer ended without a word"
    """Why this rank has not."""
    thread: threading.Thread | None = None

    @property
    def step(self) -> int:
        return int(self.facts["progress"]["step"])


class Saver:
    """Writes a run's checkpoints. All ranks call each of its methods together.

    `save` at a step boundary, `ready` at every later one, `finish` when it is, and before leaving.
    """

    def __init__(
        self,
        folder: Path,
        engines: Mapping[str, Engine],
        about: Mapping[str, Any],
        mesh: Mesh,
        attempt: Attempt,
        *,
        interval: int,
        keep: int,
        keep_every: int,
        background: bool,
        step: int | None,
    ) -> None:
        """`about` is recorded in the manifest (`architecture`, `tokenizer`, `fingerprint`).

        `step` is that of the newest checkpoint, if there is one.
        """
        self.folder, self.engines, self.mesh, self.attempt = folder, engines, mesh, attempt
        self.about = dict(about)
        self.interval, self.keep, self.keep_every, self.background = interval, keep, keep_every, background
        self.step = step
        """Of the newest checkpoint that is whole on the disk."""
        self.tried = step or 0
        """Of the newest checkpoint that was begun."""
        self.failures = 0
        self._figures: dict[str, float] = {}
        self._pending: _Save | None = None
        self._host: Tensor | None = None
        """Where the copies lie that are written in the background; kept from one checkpoint to the next."""
        self._shapes = {
            f"{role}/{name}": shape
            for role, engine in engines.items()
            for name, shape in engine.tensors().items()
        }
        sizes = {name: 4 * shape.numel() for name, shape in self._shapes.items()}  # all are fp32
        self._bytes = sum(sizes.values())
        self._owners = deal(sizes, mesh.world)
        if mesh.rank == 0:
            self._sweep()

    def _sweep(self) -> None:
        """Deletes what attempts that were cut off have half written, and nothing of a newer one."""
        for left in self.folder.glob("*.tmp"):
            written = re.fullmatch(r"step-\d+\.(\d+)\.tmp", left.name)
            if written is None or int(written[1]) <= self.attempt.attempt:
                remove(left)

    def due(self, step: int) -> bool:
        """Whether a multiple of the interval has come since the last one was begun.

        Its multiples, wherever the run went on from: `keep_every` keeps checkpoints by their step.
        """
        return bool(self.interval) and step // self.interval > self.tried // self.interval

    def save(self, progress: Mapping[str, Any]) -> None:
        """Begins a checkpoint; when it does not write in the background, ends it, too.

        Raises Superseded when a newer start of this run has taken over.
        """
        self.finish()
        with self._stall():
            self._save(progress)

    def _save(self, progress: Mapping[str, Any]) -> None:
        begun = time.monotonic()
        facts = {
            **self.about,
            "attempt": asdict(self.attempt),
            "world": self.mesh.world,
            "layout": {role: engine.parallel.model_dump() for role, engine in self.engines.items()},
            "optimizer_steps": {role: engine.steps for role, engine in self.engines.items()},
            "progress": json.loads(json.dumps(progress)),  # training goes on and changes it
        }
        self.tried = step = facts["progress"]["step"]
        save = _Save(facts, self.folder / f"step-{step:08d}.{self.attempt.attempt}.tmp", begun)
        if problem := self._on_first(lambda: self._make_room(save)):
            self._alarm(save, problem)
            return
        if self.background and self._has_host():
            copies = self._copies()
            self._pending = save
            thread = threading.Thread(target=self._write, args=(save, copies), daemon=True)
            try:
                thread.start()
                save.thread = thread
            except RuntimeError as error:  # as many as this process may have; the other ranks write
                save.problem = str(error)
        else:
            self._write(save, share := self._share())
            deque(share, maxlen=0)  # after a failure the other ranks still gather what is left
            self._commit(save)

    def ready(self) -> bool:
        """Whether every rank has written its share of the checkpoint in the background: time to `finish`."""
        save = self._pending
        return save is not None and self.mesh.all(save.thread is None or not save.thread.is_alive())

    def finish(self) -> None:
        """Waits for the checkpoint in the background, if there is one, and completes it."""
        save, self._pending = self._pending, None
        if save is not None:
            with self._stall():
                if save.thread is not None:
                    save.thread.join()
                self._commit(save)

    @contextmanager
    def _stall(self) -> Iterator[None]:
        """Counts the time in which the training waits."""
        begun = time.monotonic()
        try:
            yield
        finally:
            stall = self._figures.get("checkpoint/stall", 0.0) + time.monotonic() - begun
            self._figures["checkpoint/stall"] = stall

    def take_figures(self) -> dict[str, float]:
        """What there is to log since it was asked last."""
        figures, self._figures = self._figures, {}
        return figures

    def _share(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that this rank writes; meanwhile all ranks gather all of them, one at a time."""
        for role, engine in self.engines.items():
            for name, tensor in engine.logical():
                if self._owners[f"{role}/{name}"] == self.mesh.rank:
                    yield f"{role}/{name}", tensor

    def _has_host(self) -> bool:
        """Whether every rank has memory for its copies: all go the same way, for they gather together."""
        if self._host is None:
            sizes = {name: shape.numel() for name, shape in self._shapes.items()}
            count = sum(size for name, size in sizes.items() if self._owners[name] == self.mesh.rank)
            problem = ""
            try:
                self._host = torch.empty(count, pin_memory=self.mesh.device.type == "cuda")
            except RuntimeError as error:
                problem = f"rank {self.mesh.rank}: {error}"
            if problem := next(filter(None, self.mesh.gather(problem)), ""):
                self._host = None
                say(
                    f"there is no memory for a copy of what is saved ({problem}), so the training waits "
                    "until it is written"
                )
        return self._host is not None

    def _copies(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's share, copied to where the one before it lay.

        To touch fresh memory takes several times as long as to copy (0.5 s into the same 1.6 GB, 1.5 to 3.6 s
        into new ones), and a GPU copies on its own into pinned memory alone.
        """
        assert self._host is not None, "save asks _has_host first"
        copies, end = [], 0
        for name, tensor in self._share():
            start, end = end, end + tensor.numel()
            copy = self._host[start:end].view(tensor.shape)
            copies.append((name, copy.copy_(tensor.detach(), non_blocking=True)))
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize()
        return iter(copies)

    def _write(self, save: _Save, tensors: Iterator[tuple[str, Tensor]]) -> None:
        try:
            save.files = write_tensors(save.folder, tensors, self.mesh.rank)
            save.problem = ""
        except (OSError, MemoryError, RuntimeError) as error:  # torch has no memory, either
            save.problem = str(error) or type(error).__name__

    def _make_room(self, save: _Save) -> None:
        self.attempt.check(self.folder.parent)
        self.folder.mkdir(parents=True, exist_ok=True)
        remove(save.folder)  # a failed one of the same step
        if shutil.disk_usage(self.folder).free < self._bytes and len(whole := steps(self.folder)) > 1:
            say(
                f"{self.folder} has no room for one more checkpoint: all but the newest are deleted before it"
            )
            self._prune(whole[-1], keep=1)
        free = shutil.disk_usage(self.folder).free
        if free < self._bytes:
            raise OSError(f"it takes {self._bytes:,} bytes, and {free:,} are free in {self.folder}")
        save.folder.mkdir()

    def _commit(self, save: _Save) -> None:
        """Makes a checkpoint of what the ranks have written, if they have."""
        parts = self.mesh.collect((save.files, save.problem))
        try:
            problem = self._on_first(lambda: self._complete(save, parts))
        finally:
            if self.mesh.rank == 0:
                remove(save.folder)
        if problem:
            self._alarm(save, problem)
            return
        self.step = save.step
        self._figures["checkpoint/seconds"] = time.monotonic() - save.begun
        self._figures["checkpoint/bytes"] = self._bytes

    def _complete(self, save: _Save, parts: list[tuple[Files, str]]) -> None:
        """On rank 0: everything is there, so it gets its manifest and its name."""
        self.attempt.check(self.folder.parent)  # whoever took over has swept our files away: say that instead
        for rank, (_, problem) in enumerate(parts):
            if problem:
                raise OSError(f"rank {rank}: {problem}")
        files = {name: facts for part, _ in parts for name, facts in part.items()}
        written = [tensor for facts in files.values() for tensor in facts["tensors"].items()]
        shapes = {name: facts["shape"] for name, facts in written}
        expected = {name: list(shape) for name, shape in self._shapes.items()}
        if shapes != expected or len(written) != len(expected):
            wrong = [name for name in expected | shapes if shapes.get(name) != expected.get(name)]
            raise OSError(f"{wrong[0] if wrong else 'a tensor'} is not in exactly one file, in its shape")
        for name, facts in files.items():
            size = (save.folder / name).stat().st_size
            if size != facts["bytes"]:
                raise OSError(f"{name} has {size:,} bytes instead of {facts['bytes']:,}")
        write_manifest(save.folder, save.facts | {"files": files})
        fsync(save.folder)
        self.attempt.check(self.folder.parent)
        self._name(save)

    def _name(self, save: _Save) -> None:
        """The moment in which the checkpoint comes to be."""
        target = self.folder / f"step-{save.step:08d}"
        replaced = target.with_name(f"{target.name}{REPLACED}")
        if target.exists():  # the run was rolled back, and has come here again
            remove(replaced)
            target.rename(replaced)
        try:
            save.folder.rename(target)
        except OSError:  # a newer start has swept it away in this very moment
            if replaced.exists() and not target.exists():
                replaced.rename(target)
            raise
        fsync(self.folder)
        remove(replaced)
        try:
            for path in (self.folder.parent / SAVED, self.folder / LATEST):
                write_json(path, {"checkpoint": target.name, "step": save.step})
            self._prune(target, self.keep)
        except OSError as error:
            say(f"the checkpoint {target} is complete, but not all around it: {error}")

    def _prune(self, newest: Path, keep: int) -> None:
        """Deletes all but the last `keep`, and what is kept for good."""
        for old in steps(self.folder)[:-keep]:
            if old != newest and not (self.keep_every and int(old.name[5:]) % self.keep_every == 0):
                # Under another name: half deleted it must not look like a damaged one.
                going = old.with_name(f"{old.name}.old.tmp")
                old.rename(going)
                shutil.rmtree(going)

    def _alarm(self, save: _Save, problem: str) -> None:
        self.failures += 1
        self._figures["checkpoint/failed"] = float(self.failures)
        last = "there is none before it" if self.step is None else f"the last good one is of step {self.step}"
        say(
            f"ALARM: the checkpoint of step {save.step} could not be written: {problem}; "
            f"{last}; make room in {self.folder}"
        )

    def _on_first(self, action: Callable[[], None]) -> str:
        """Does something on rank 0; every rank learns why it failed, if it did."""
        try:
            self.mesh.lead(action)
        except Superseded:
            raise
        except (OSError, ValueError) as error:
            return str(error)
        return ""
