"""Batches whose loss or gradient is not finite, or whose loss jumps; and ranks whose weights come apart.

Such a batch is computed once more: if it is sound then, a chip has miscounted, and the second result counts.
If not, the batch is skipped: the step is taken without an update, on all ranks alike. Which samples were
skipped is written to `skipped.jsonl`, and a run that is told so in advance (`skip`) ends with the same
weights to the last bit. When batch after batch is bad, so are the weights: back to the newest checkpoint.
"""

import math
import socket
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor

from megachat.config import Config
from megachat.log import append, is_main, rewrite, rows
from megachat.parallel.engine import Engine
from megachat.parallel.mesh import Mesh


def _in_order(span: list[int]) -> list[int]:
    if span[0] > span[1]:
        raise ValueError(f"{span} ends before it begins; it is [first, last]")
    return span


Span = Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2), AfterValidator(_in_order)]
"""The numbers of the first and the last sample."""

LEAST = 0.01
"""The least deviation, as a share of the median: a loss that stands still does not make noise a jump."""


class Guard(Config):
    """When a step is not to be trusted, and how long a run puts up with it."""

    spike: NonNegativeFloat
    """A loss is a jump when it is so many deviations above the median of the last steps'; 0: none ever is."""
    window: Annotated[int, Field(ge=4)]
    """How many steps that median is of. Until there are so many, nothing is a jump."""
    rollback_after: PositiveInt
    """So many bad batches in a row, and the run goes back to its newest checkpoint and leaves them out."""
    give_up: NonNegativeInt
    """So often it goes back without getting further; then it ends with an error."""
    compare: NonNegativeInt
    """Optimizer steps between comparisons of the weights that several ranks should hold alike, besides the
    one before each checkpoint; 0: they are never compared. Under ZeRO 3 no rank holds what another does."""

    def objection(self, sums: Mapping[str, float], weight: float, recent: Sequence[float]) -> str:
        """What is wrong with a step of these sums, of losses and more; "" for nothing.

        `recent`: the losses of the last good steps.
        """
        for name, value in sums.items():
            if not math.isfinite(value):
                return f"{name} is {value / weight}"
        loss, limit = sums["loss"] / weight, highest(recent, self.spike)
        if not self.spike or len(recent) < self.window or loss <= limit:
            return ""
        return (
            f"loss is {loss:.4g}, above {limit:.4g}: the median of the last {len(recent)} steps "
            f"({statistics.median(recent):.4g}) and {self.spike:g} deviations"
        )


def highest(recent: Sequence[float], spike: float) -> float:
    """The highest loss that is no jump: the median, and `spike` times what noise moves a loss by.

    That is 1.4826 times the median distance from the median (a standard deviation, were it normal), which a
    few wild values cannot stretch. Example: highest([1, 2, 3, 4, 50], 10) -> 3 + 10 * 1.4826 * 1
    """
    if not recent:
        return math.inf
    median = statistics.median(recent)
    deviation = 1.4826 * statistics.median(abs(loss - median) for loss in recent)
    return median + spike * max(deviation, LEAST * abs(median))


@dataclass(frozen=True)
class Found:
    """A bad batch."""

    step: int
    first: int
    """Of its samples."""
    last: int
    why: str


class Skipped:
    """Which samples are left out: told to be, or found to be bad. All ranks hold the same."""

    def __init__(self, told: Sequence[Sequence[int]] = (), path: Path | None = None) -> None:
        """`path` is the `skipped.jsonl` to keep up to date; without one nothing is written."""
        self.path = path
        self.spans = [(first, last, "told by skip=...") for first, last in told]
        self.found: list[Found] = []
        """What this attempt found."""
        self.fingerprint = ""

    def recall(self, fingerprint: str, step: int, mesh: Mesh) -> None:
        """Reads what earlier attempts found, for a run that goes on from `step`.

        What other settings found bad from there on may be good now: it is forgotten.
        """
        assert self.path is not None
        self.fingerprint, entries = fingerprint[:16], []
        if mesh.rank == 0 and self.path.is_file():
            entries = [
                one
                for one in rows(self.path)
                if one["step"] <= step or one["fingerprint"] == self.fingerprint
            ]
            rewrite(self.path, entries)
        for entry in mesh.first(entries):
            if entry["step"] > step:
                self.spans.append((*entry["samples"], f"an earlier attempt found that {entry['why']}"))

    def why(self, first: int, last: int) -> str:
        """Why a batch of these samples is to be left out; "" when it is not."""
        return next((why for begin, end, why in self.spans if begin <= last and first <= end), "")

    def add(self, step: int, first: int, last: int, why: str) -> None:
        """A batch that was found bad at this step."""
        self.spans.append((first, last, f"it was found before that {why}"))
        self.found.append(Found(step, first, last, why))
        if self.path is not None and is_main():
            entry = {"step": step, "samples": [first, last], "why": why, "fingerprint": self.fingerprint}
            append(self.path, entry)


def culprits(first: Tensor, second: Tensor, mesh: Mesh) -> str:
    """Whose share of a batch came out other than at the second time: `rank 1 (host b7)`.

    Given are each rank's own sums, the losses and more. All ranks call it and get the same.
    """
    if mesh.world == 1:
        return f"rank 0 ({socket.gethostname()})"
    wrong = not bool(first.isfinite().all()) and bool(second.isfinite().all())
    moved = math.inf if wrong else float((first - second).abs().nan_to_num().max())
    found = mesh.gather([moved, socket.gethostname()])
    most = max(moved for moved, _ in found)
    if not most:
        return "a rank that cannot be told, after the losses were summed"
    return ", ".join(f"rank {rank} ({host})" for rank, (moved, host) in enumerate(found) if moved == most)


class Unequal(RuntimeError):
    """Ranks that should hold the same weights do not: a fault of the hardware, not of the user."""


def compare(engines: Mapping[str, Engine], mesh: Mesh, since: int) -> None:
    """Raises `Unequal` unless all replicas of every parameter are the same to the last bit.

    `since` is the step of the last comparison. One pass over the weights, and a number per parameter is sent.
    """
    sums = {f"{role}/{name}": value for role, engine in engines.items() for name, value in engine.bits()}
    if mesh.world == 1 or not sums:
        return
    own = torch.stack([total for total, _ in sums.values()])
    cut = torch.tensor([cut for _, cut in sums.values()], device=own.device)
    # The largest sum and the smallest, in one collective: equal when all are.
    ends = torch.stack([own, -own])
    dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=mesh.replica_group)
    if mesh.tensor > 1:
        across = torch.where(cut, torch.stack([own, -own]), ends)
        dist.all_reduce(across, op=dist.ReduceOp.MAX, group=mesh.tensor_group)
        ends = torch.where(cut, ends, across)
    if not mesh.any(bool((ends[0] != -ends[1]).any())):
        return
    everybody = mesh.gather([socket.gethostname(), own.tolist()])
    raise Unequal(_told(list(sums), cut.tolist(), everybody, mesh.tensor, since))


def _told(
    names: Sequence[str], cut: Sequence[bool], ranks: Sequence[Sequence[Any]], tensor: int, since: int
) -> str:
    """Who differs from most, and in what. `ranks`: of each its host and its sums."""
    differing: dict[int, list[str]] = {}
    tied = False
    for place, name in enumerate(names):
        for part in range(tensor if cut[place] else 1):
            alike = range(part, len(ranks), tensor) if cut[place] else range(len(ranks))
            counts = Counter(ranks[rank][1][place] for rank in alike)
            (value, most), *others = counts.most_common()
            tie = bool(others) and others[0][1] == most
            tied = tied or tie
            for rank in alike:
                if tie or ranks[rank][1][place] != value:
                    differing.setdefault(rank, []).append(name.removeprefix("model/"))
    lines = [
        f"rank {rank} ({ranks[rank][0]}): {', '.join(found[:3])}"
        + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        for rank, found in sorted(differing.items())
    ]
    which = "which of these is right cannot be told" if tied else "they differ from what most ranks hold"
    return (
        f"weights that should be the same on several ranks have come apart since step {since}; {which}:\n  "
        + "\n  ".join(lines)
        + "\nNothing was saved since then. A chip or its memory has erred: the same command goes on from the "
        "newest checkpoint; if this comes again on the same host, take that host out of service"
    )
