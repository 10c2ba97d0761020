"""Samples of tokens in one order for all ranks: which ones a step reads depends on nothing else.

A sample is a window of a source's tokens, or a row of its documents. The samples of a source are shuffled
anew in each epoch, endlessly; a mixture says whose turn it is. A step takes the next so many of that order,
and each rank its slice, whether or not they divide; so world size, micro-batch and workers do not change what
is read, and where a run stands in its data is one number, the samples consumed. grain computes the shuffle
index by index: no list is ever in memory.
"""

import hashlib
import json
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from operator import sub
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from megachat.data.mixture import Phase, Schedule, Turns
from megachat.data.shards import Shards
from megachat.stages import did_you_mean

T = TypeVar("T")

WHOLE = "the whole corpus"
"""What the one source is called where sources are not told apart."""

OnChange = Literal["refuse", "extend", "restart"]


class Window(NamedTuple):
    """A row of tokens, the last of which is only a label."""

    tokens: NDArray[Any]
    """The ids, in as few bytes as the shard keeps them in."""
    edges: list[int]
    """Where each document begins, the first at 0, and where the last one ends; behind it is padding."""


class TokenWindows:
    """Tokens cut into windows of `length`, each with the label of its last token.

    Windows ignore where documents begin; `documents` tells, so that attention can stay inside one.
    """

    def __init__(self, shards: Shards, length: int) -> None:
        self.shards, self.length = shards, length
        if len(self) < 1:
            paths = ", ".join(str(shard.path) for shard in shards.shards)
            raise ValueError(
                f"{paths} has {shards.size:,} tokens, but one window of {length:,} and the label after it "
                f"take {length + 1:,}; add text, use a smaller context, or, if it is the validation shard "
                "that is short, encode again with a larger validation=..."
            )

    def __len__(self) -> int:
        return max(self.shards.size - 1, 0) // self.length

    def __getitem__(self, number: int) -> Window:
        start = int(number) * self.length
        if not 0 <= number < len(self):
            raise IndexError(f"window {number} of {len(self)}")
        stop = start + self.length + 1
        begins = [begin - start for begin in self.shards.within(start, stop)]
        return Window(self.shards.read(start, stop), [0, *begins, stop - start])


def documents_of(windows: Sequence[Window]) -> NDArray[np.int64]:
    """Which of its window's documents each token is of, [windows, tokens]; -1 is padding."""
    numbers, sizes = [], []
    for tokens, edges in windows:
        numbers += [*range(len(edges) - 1), -1]
        sizes += [*map(sub, edges[1:], edges), len(tokens) - edges[-1]]
    return np.repeat(np.array(numbers), sizes).reshape(len(windows), -1)


class Order:
    """The samples of an indexable source, shuffled, endlessly repeated, shuffled anew in each epoch.

    The order is that of grain's `MapDataset.source(source).shuffle(seed).repeat()`, whose objects around each
    sample would take longer than reading 2,000 tokens.
    """

    def __init__(self, source: Any, seed: int) -> None:
        # Imported here, for it takes a second; and it warns that there is no jax, which nothing here needs.
        logging.getLogger("absl").addFilter(lambda record: "jax" not in record.getMessage())
        from grain.experimental import index_shuffle

        self.source, self.seed, self.length, self.shuffle = source, seed, len(source), index_shuffle

    def __getitem__(self, number: int) -> Any:
        return self.source[self.row(number)]

    def row(self, number: int) -> int:
        """Which of the source's rows a sample is."""
        epoch, place = divmod(number, self.length)
        return int(self.shuffle(place, self.length - 1, (self.seed + epoch) % 2**32, 4))


class Mixed:
    """The samples of all sources, each in its own `Order`, in the turns that the plan gives them."""

    def __init__(self, sources: Mapping[str, Any], plan: "Plan") -> None:
        self.schedule = plan.schedule
        self.orders = [Order(sources[name], plan.seed_of(name)) for name in self.schedule.names]

    def __getitem__(self, number: int) -> Any:
        source, place = self.schedule[number]
        return self.orders[source][place]

    def name(self, number: int) -> str:
        """What a sample is, for a person: its source, and which of its rows."""
        source, place = self.schedule[number]
        return f"{self.schedule.names[source]} row {self.orders[source].row(place)}"


@runtime_checkable
class Samples(Protocol):
    """An endless sequence."""

    def __getitem__(self, number: int, /) -> Any:
        """The sample of this number."""
        raise NotImplementedError


def places(start: int, count: int, rank: int, ranks: int) -> range:
    """Which of the `count` samples from number `start` on are those of `rank`, as equally as they divide.

    Example: of 8 samples, 3 ranks have places(0, 8, 0, 3) -> range(0, 3), then range(3, 6), and range(6, 8).
    """
    each, left = divmod(count, ranks)
    first = start + rank * each + min(rank, left)
    return range(first, first + each + (rank < left))


def share(samples: Samples, start: int, count: int, rank: int, world: int) -> list[Any]:
    """What `rank` of `world` reads in the step that takes `count` samples, the first of them number `start`.

    Example: share(samples, start=8, count=4, rank=1, world=2) -> [samples[10], samples[11]]
    """
    return [samples[number] for number in places(start, count, rank, world)]


def ahead(read: Callable[[int], T], start: int, stride: int, steps: int) -> Iterator[T]:
    """`read(start)`, `read(start + stride)`, ... without end, `steps` of them read before they are asked for.

    A thread reads: numpy copies and the disk work while Python trains, and nothing is sent between processes.
    """
    if not steps:
        while True:
            yield read(start)
            start += stride
    with ThreadPoolExecutor(1, "loader") as pool:
        waiting: deque[Future[T]] = deque()
        try:
            while True:
                while len(waiting) <= steps:
                    waiting.append(pool.submit(read, start))
                    start += stride
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@dataclass(frozen=True)
class Plan:
    """What is read in which order, in names and numbers: what a checkpoint remembers of its data."""

    seed: int
    sources: dict[str, str]
    """The sha256 of what each source's samples are made of: its shards, and how they are cut."""
    phases: list[dict[str, Any]]
    """`samples` (null in the last one) and `weights` of each."""
    offsets: dict[str, int]
    """How far ahead of its turns a source stands; behind, where it came later."""

    @classmethod
    def of(
        cls,
        sources: Mapping[str, Shards],
        how: Sequence[Any],
        phases: Sequence[Phase],
        length: int,
        seed: int,
    ) -> "Plan":
        """The plan of a fresh run. `how`: what else samples follow from besides the shards and the seed."""
        for phase in phases:
            unknown = [name for name in phase.weights if name not in sources]
            if unknown:
                hint = did_you_mean(unknown[0], sources, f"there are {', '.join(map(repr, sources))}")
                raise ValueError(f"mixture: the corpus has no source {unknown[0]!r}; {hint}")
            if phase.tokens is not None and phase.tokens < length:
                raise ValueError(
                    f"mixture: a phase of tokens={phase.tokens} is shorter than one sample, {length}"
                )
        # By name: the order of the weights settles equal claims, and the fingerprint does not know it.
        entries = [
            {
                "samples": phase.tokens and phase.tokens // length,
                "weights": dict(sorted(phase.weights.items())),
            }
            for phase in phases
        ]
        entries = entries or [{"samples": None, "weights": dict.fromkeys(sources, 1.0)}]
        used = dict.fromkeys(name for phase in phases for name in phase.weights) or dict.fromkeys(sources)
        return cls(
            seed, {name: _digest([sources[name].sums, *how, length, seed]) for name in used}, entries, {}
        )

    @cached_property
    def schedule(self) -> Schedule:
        """Whose turn it is, and which of its samples."""
        phases = [Turns(phase["samples"], phase["weights"]) for phase in self.phases]
        return Schedule(phases, self.offsets)

    @property
    def fingerprint(self) -> str:
        """Two plans with the same one read the same samples in the same order."""
        return _digest([self.seed, self.sources, self.phases])

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, beside the number of samples consumed."""
        return asdict(self) | {"fingerprint": self.fingerprint}

    def seed_of(self, source: str) -> int:
        """Of a source's shuffle. Not seed + 1, + 2, ...: grain's own for the epochs."""
        return self.seed if source == WHOLE else int(_digest([self.seed, source])[:8], 16)

    def continued(self, state: Mapping[str, Any], samples: int, on_change: OnChange) -> "Plan":
        """This plan for a run that has consumed `samples` by the plan of that `state`.

        If they differ: `extend` goes on where each source stands that has not changed, and begins the others;
        `restart` begins all sources. Steps and phases go on in any case.
        """
        if not state:  # of a checkpoint from before there was any
            return self
        before = Plan(**{name: value for name, value in state.items() if name != "fingerprint"})
        if before.fingerprint == self.fingerprint:
            return replace(self, offsets=before.offsets)
        if on_change == "refuse":
            raise ValueError(
                f"the data is not what this run has been reading: {self._differences(before)}; go on with "
                "on_changed_data=extend (sources that are unchanged go on where they stand), with "
                "on_changed_data=restart (all are read from their beginning), or bring the old data back"
            )
        if on_change == "extend" and before.sources.keys() == self.sources.keys() == {WHOLE}:
            raise ValueError(
                "on_changed_data=extend cannot tell what is new, for mixture=all reads all sources as one; "
                "set on_changed_data=restart to read all of it from the beginning; mixture=weighted keeps "
                "sources apart"
            )
        stood = before.schedule.positions(samples) if on_change == "extend" else {}
        kept = {name: at for name, at in stood.items() if self.sources.get(name) == before.sources[name]}
        due = self.schedule.positions(samples)
        return replace(self, offsets={name: kept.get(name, 0) - count for name, count in due.items()})

    def _differences(self, before: "Plan") -> str:
        new = [f"{name} is new" for name in self.sources if name not in before.sources]
        gone = [f"{name} is gone" for name in before.sources if name not in self.sources]
        changed = [
            f"{name} has changed"
            for name, made_of in self.sources.items()
            if before.sources.get(name, made_of) != made_of
        ]
        return ", ".join([*new, *gone, *changed]) or "the weights of its mixture have changed"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
