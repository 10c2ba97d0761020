"""Who shares a band, or everything: the pairs worth comparing, from the sorted indices of all shards.

A document's number is its place in the corpus: the documents of all shards before its own, and its row. One
call reads the same range of keys in every shard. A range that does not fit in memory is halved until it does.
A single key that more than `most` documents share (a template, a page of boilerplate) pairs nobody, and is
reported. What is found comes in pieces that fit, too.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megachat.data.index import Open, Rows

Numbers = NDArray[np.uint64]
"""Documents, by their place in the corpus."""

KEYS = 1 << 64
"""Keys are below it."""

RECORD = 64
"""Bytes of memory that a key takes while it is sorted."""

BEFORE = 8
"""Documents of a bucket with which one is paired besides the first: with all, in a bucket of up to ten. A
document that is unlike the first finds its like so long as that is not further off, in one band of many."""

Columns = tuple[NDArray[Any], ...]
"""Sorted keys, for digests the rest of each, and the documents they belong to."""


@dataclass(frozen=True)
class Run:
    """Sorted keys of a shard and what lies beside them, the last column being rows; read when wanted."""

    shard: int
    open: Open
    names: tuple[str, ...]
    """Of the columns."""
    band: int | None = None
    begin: int = 0
    end: int = sys.maxsize

    def between(self, low: int, high: int) -> "Run":
        """The keys of [low, high)."""
        keys = self._column(self.names[0])
        # 2^64 is no uint64.
        begin, end = (
            len(keys) if bound >= KEYS else int(np.searchsorted(keys, np.uint64(bound)))
            for bound in (low, high)
        )
        return replace(self, begin=self.begin + begin, end=self.begin + end)

    def read(self) -> list[NDArray[Any]]:
        """The columns, copied: a slice would keep the file open."""
        return [np.array(self._column(name)) for name in self.names]

    def _column(self, name: str) -> NDArray[Any]:
        values = self.open(name)
        return (values if self.band is None else values[self.band])[self.begin : self.end]


@dataclass(frozen=True)
class Hot:
    """A key that too many documents share."""

    documents: int
    example: int
    """The first of them."""


@dataclass
class Join:
    """Finds the documents that have a key in common."""

    offsets: Numbers
    """For each shard the number of its first document."""
    alive: Callable[[int, Rows], NDArray[np.bool_]]
    """Which rows of a shard take part."""
    memory: int
    """Bytes to keep to."""
    most: int
    """Documents that may share a band's key."""
    hot: list[Hot] = field(default_factory=list)
    """The keys with more."""
    intrinsic: Callable[[Numbers], NDArray[np.uint64]] | None = None
    """What the documents of a bucket are ordered by, if not by their places in the corpus."""

    @property
    def room(self) -> int:
        """Keys that fit."""
        return max(self.memory // RECORD, 1)

    def pairs(
        self, indices: Sequence[Open], band: int, low: int, high: int
    ) -> Iterator[tuple[Numbers, Numbers]]:
        """Pairs (smaller, larger), each once, that connect all documents with a key of [low, high) in common.

        Of those that share a key each is paired with the first and with some before it, for all pairs would
        be quadratically many. In a small bucket these are all, so that only in others the order matters.
        """
        runs = [Run(shard, open, ("bands", "band_rows"), band) for shard, open in enumerate(indices)]
        step = max(self.room // (2 * BEFORE + 2), 1)
        for keys, numbers in self._groups(runs, low, high):
            first = first_of_run(keys)
            sizes = np.bincount(first, minlength=len(keys))
            self.hot += [
                Hot(int(sizes[start]), int(numbers[start])) for start in np.flatnonzero(sizes > self.most)
            ]
            if self.intrinsic is not None:
                numbers = self._reordered(numbers, first, sizes)
            later = np.flatnonzero((first != np.arange(len(keys))) & (sizes[first] <= self.most))
            for start in range(0, len(later), step):
                some = later[start : start + step]
                left, right = [first[some]], [some]
                for back in range(1, BEFORE + 1):
                    there = some - back > first[some]
                    left.append(some[there] - back)
                    right.append(some[there])
                one, other = numbers[np.concatenate(left)], numbers[np.concatenate(right)]
                yield np.minimum(one, other), np.maximum(one, other)

    def _reordered(self, numbers: Numbers, first: NDArray[np.int64], sizes: NDArray[np.int64]) -> Numbers:
        """The same buckets, in each of which all are not paired in an order of its own."""
        assert self.intrinsic is not None
        large = np.flatnonzero((sizes[first] > BEFORE + 2) & (sizes[first] <= self.most))
        some = max(self.room // 4, 1)
        keys = [self.intrinsic(numbers[large[start : start + some]]) for start in range(0, len(large), some)]
        out = numbers.copy()
        if keys:
            out[large] = numbers[large][np.lexsort((np.concatenate(keys), first[large]))]
        return out

    def exact_copies(self, indices: Sequence[Open], low: int, high: int) -> Iterator[tuple[Numbers, Numbers]]:
        """Documents whose digest with a key of [low, high) is that of an earlier one; and the first such."""
        names = ("exact", "check", "exact_rows")
        runs = [Run(shard, open, names) for shard, open in enumerate(indices)]
        seen: dict[tuple[int, int], int] = {}  # of the keys that come in several parts
        for keys, checks, numbers in self._groups(runs, low, high, whole=False):
            order = np.lexsort((numbers, checks, keys))
            keys, checks, numbers = keys[order], checks[order], numbers[order]
            first = first_of_run(keys, checks)
            originals = numbers[first]
            if len(keys) and keys[0] == keys[-1]:
                for start in np.unique(first):
                    digest = int(keys[start]), int(checks[start])
                    originals[first == start] = seen.setdefault(digest, int(numbers[start]))
            copies = originals != numbers
            yield numbers[copies], originals[copies]

    def _groups(self, runs: Sequence[Run], low: int, high: int, whole: bool = True) -> Iterator[Columns]:
        """The keys of [low, high), sorted, and the documents they belong to, in order; as much as fits at
        once.

        All of a key come together. One that does not fit is hot, or, unless `whole`, comes in several parts.
        """
        runs = [run for run in (run.between(low, high) for run in runs) if run.end > run.begin]
        total = sum(run.end - run.begin for run in runs)
        if total > self.room and high - low > 1:
            middle = (low + high) // 2
            yield from self._groups(runs, low, middle, whole)
            yield from self._groups(runs, middle, high, whole)
        elif total > self.room:
            pieces = (
                self._sorted([replace(run, begin=start, end=min(start + self.room, run.end))])
                for run in runs
                for start in range(run.begin, run.end, self.room)
            )
            yield from self._unless_hot(pieces) if whole else pieces
        elif total > 1:
            yield self._sorted(runs)

    def _unless_hot(self, pieces: Iterable[Columns]) -> Iterator[Columns]:
        """The documents of one key together, unless they are too many."""
        found: list[Columns] = []
        count = 0
        for piece in pieces:
            count += len(piece[0])
            if len(piece[0]) and (count <= self.most or not found):
                found.append(piece)
        if count > self.most:
            self.hot.append(Hot(count, int(found[0][-1][0])))
        elif found:
            yield tuple(np.concatenate(column) for column in zip(*found, strict=True))

    def _sorted(self, runs: Sequence[Run]) -> Columns:
        parts = []
        for run in runs:
            *columns, rows = run.read()
            there = self.alive(run.shard, rows)
            numbers = rows[there] + self.offsets[run.shard]
            parts.append([*(column[there] for column in columns), numbers])
        found = [np.concatenate(column) for column in zip(*parts, strict=True)]
        # Each shard's are sorted by key and row, and the shards are in order: stable keeps the documents so.
        order = np.argsort(found[0], kind="stable")
        return tuple(column[order] for column in found)


def distinct(left: Numbers, right: Numbers) -> tuple[Numbers, Numbers]:
    """The pairs, sorted, each once."""
    order = np.lexsort((right, left))
    left, right = left[order], right[order]
    fresh = np.ones(len(left), dtype=bool)
    fresh[1:] = (left[1:] != left[:-1]) | (right[1:] != right[:-1])
    return left[fresh], right[fresh]


def first_of_run(*columns: NDArray[np.unsignedinteger]) -> NDArray[np.int64]:
    """For each place the first one of the run of equal values that it is in."""
    fresh = np.ones(len(columns[0]), dtype=bool)
    fresh[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return np.flatnonzero(fresh)[np.cumsum(fresh) - 1]
