"""Who shares a band, or everything: the pairs worth comparing, from the sorted indices of all shards.

A document's number is its place in the corpus: the documents of all shards before its own, and its row. One
call reads the same range of keys in every shard. A range that does not fit in memory is halved until it does.
A single key that more than `most` documents share (a template, a page of boilerplate) pairs nobody, and is
reported.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megachat.data.index import Index, Keys, Rows

Numbers = NDArray[np.uint64]
"""Documents, by their place in the corpus."""

KEYS = 1 << 64
"""Keys are below it."""

RECORD = 64
"""Bytes of memory that a key takes while it is sorted."""

Run = tuple[Keys, Rows, Rows]
"""Of one shard: sorted keys, the rest of each (the digest's; nothing for a band), and the rows they belong
to."""

Part = tuple[Keys, Rows, Numbers]
"""Sorted keys, the rest of each, and the documents they belong to."""


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
    alive: Callable[[Numbers], NDArray[np.bool_]]
    """Which documents take part."""
    memory: int
    """Bytes to keep to."""
    most: int
    """Documents that may share a band's key."""
    hot: list[Hot] = field(default_factory=list)
    """The keys with more."""

    def pairs(self, indices: Sequence[Index], band: int, low: int, high: int) -> tuple[Numbers, Numbers]:
        """Pairs (smaller, larger), sorted, that connect all documents with a key of [low, high) in common.

        Of those that share a key each is paired with the first and with the one before it, for all pairs
        would be quadratically many.
        """
        runs = [(index.bands[band], index.band_rows[band], index.band_rows[band]) for index in indices]
        found = [np.empty((2, 0), dtype=np.uint64)]
        for keys, _, numbers in self._groups(runs, low, high):
            first = first_of_run(keys)
            sizes = np.bincount(first, minlength=len(keys))
            self.hot += [
                Hot(int(sizes[start]), int(numbers[start])) for start in np.flatnonzero(sizes > self.most)
            ]
            later = np.flatnonzero((first != np.arange(len(keys))) & (sizes[first] <= self.most))
            found.append(np.stack([numbers[first[later]], numbers[later]]))
            found.append(np.stack([numbers[later - 1], numbers[later]]))
        return distinct(*np.concatenate(found, axis=1))

    def exact_copies(self, indices: Sequence[Index], low: int, high: int) -> tuple[Numbers, Numbers]:
        """Documents, sorted, whose digest with a key of [low, high) is that of an earlier one; and that
        one."""
        runs = [(index.exact, index.check, index.exact_rows) for index in indices]
        found = [np.empty((2, 0), dtype=np.uint64)]
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
            found.append(np.stack([numbers[copies], originals[copies]]))
        copy, original = np.concatenate(found, axis=1)
        order = np.argsort(copy)
        return copy[order], original[order]

    def _groups(self, runs: Sequence[Run], low: int, high: int, whole: bool = True) -> Iterator[Part]:
        """The keys of [low, high), sorted, and the documents they belong to, in order; as much as fits at
        once.

        All of a key come together. One that does not fit is hot, or, unless `whole`, comes in several parts.
        """
        spans = [tuple(_places(keys, low, high)) for keys, _, _ in runs]
        total = sum(end - begin for begin, end in spans)
        room = max(self.memory // RECORD, 1)
        if total > room and high - low > 1:
            middle = (low + high) // 2
            yield from self._groups(runs, low, middle, whole)
            yield from self._groups(runs, middle, high, whole)
        elif total > room:
            pieces = (
                self._sorted(
                    [runs[number]], [(start, min(start + room, end))], self.offsets[number : number + 1]
                )
                for number, (begin, end) in enumerate(spans)
                for start in range(begin, end, room)
            )
            yield from self._unless_hot(pieces) if whole else pieces
        elif total > 1:
            yield self._sorted(runs, spans, self.offsets)

    def _unless_hot(self, pieces: Iterable[Part]) -> Iterator[Part]:
        """The documents of one key together, unless they are too many."""
        found: list[Part] = []
        count = 0
        for piece in pieces:
            count += len(piece[0])
            if count <= self.most or not found:
                found.append(piece)
        if count > self.most:
            first = next(int(numbers[0]) for _, _, numbers in found if len(numbers))
            self.hot.append(Hot(count, first))
        else:
            keys, rest, numbers = (np.concatenate(column) for column in zip(*found, strict=True))
            yield keys, rest, numbers

    def _sorted(self, runs: Sequence[Run], spans: Sequence[tuple[int, ...]], offsets: Numbers) -> Part:
        parts = [
            (keys[begin:end], rest[begin:end], rows[begin:end] + offset)
            for (keys, rest, rows), (begin, end), offset in zip(runs, spans, offsets, strict=True)
        ]
        keys, rest, numbers = (np.concatenate(column) for column in zip(*parts, strict=True))
        there = self.alive(numbers)
        keys, rest, numbers = keys[there], rest[there], numbers[there]
        # Each shard's are sorted by key and row, and the shards are in order: stable keeps the documents so.
        order = np.argsort(keys, kind="stable")
        return keys[order], rest[order], numbers[order]


def distinct(left: Numbers, right: Numbers) -> tuple[Numbers, Numbers]:
    """The pairs, sorted, each once."""
    order = np.lexsort((right, left))
    left, right = left[order], right[order]
    fresh = np.ones(len(left), dtype=bool)
    fresh[1:] = (left[1:] != left[:-1]) | (right[1:] != right[:-1])
    return left[fresh], right[fresh]


def _places(keys: Keys, low: int, high: int) -> list[int]:
    """Where the keys of [low, high) begin and end."""
    # 2^64 is no uint64.
    return [
        len(keys) if bound >= KEYS else int(np.searchsorted(keys, np.uint64(bound))) for bound in (low, high)
    ]


def first_of_run(*columns: NDArray[np.unsignedinteger]) -> NDArray[np.int64]:
    """For each place the first one of the run of equal values that it is in."""
    fresh = np.ones(len(columns[0]), dtype=bool)
    fresh[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return np.flatnonzero(fresh)[np.cumsum(fresh) - 1]
