"""Whole documents packed into rows of one length: which documents share a row, decided before training.

Best fit decreasing (Johnson, 1973): each document, longest first, goes where it leaves the least room. Ding
et al. (2024, https://arxiv.org/abs/2404.10830) train language models on such rows, for windows cut documents
off from what they go on about. Only a document longer than a row is cut, into windows that share one token,
so that every token but a document's first is predicted exactly once in an epoch. What rows leave empty is
padding.

The documents of one length are dealt with together, so a million take a second. A corpus is packed by the
million documents: memory is bounded, and hardly any room is lost.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megachat.data.loader import Window
from megachat.data.shards import Shards
from megachat.files import replacing

TOGETHER = 1 << 20
"""Documents packed at a time."""

PIECE = np.dtype([("start", "<i8"), ("length", "<i4")])
"""A run of tokens: a document, or a window of one that is longer than a row."""


@dataclass(frozen=True)
class Packing:
    """Which pieces stand in which row."""

    rows: NDArray[np.int64]
    """Where each row begins in `pieces`, and at the end how many pieces there are."""
    pieces: NDArray[Any]
    """Of dtype `PIECE`, row by row."""

    def save(self, folder: Path) -> None:
        """Writes two files, to be mapped into memory."""
        with replacing(folder) as temporary:
            temporary.mkdir()
            np.save(temporary / "rows.npy", self.rows, allow_pickle=False)
            np.save(temporary / "pieces.npy", self.pieces, allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> "Packing":
        """Maps what `save` wrote into memory."""
        return cls(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("rows", "pieces")))


class PackedRows:
    """Rows of `length` tokens and a label after the last one, of whole documents where they fit."""

    def __init__(self, shards: Shards, length: int, packing: Packing) -> None:
        self.shards, self.length, self.packing = shards, length, packing

    def __len__(self) -> int:
        return len(self.packing.rows) - 1

    def __getitem__(self, number: int) -> Window:
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        pieces = self.packing.pieces[self.packing.rows[number] : self.packing.rows[number + 1]]
        tokens, edges = np.zeros(self.length + 1, np.int32), [0]
        for start, length in pieces.tolist():
            edges.append(edges[-1] + length)
            tokens[edges[-2] : edges[-1]] = self.shards.read(start, start + length)
        return Window(tokens, edges)


def pack(documents: NDArray[np.int64], length: int) -> Packing:
    """Packs documents, given where each begins and the last one ends, into rows of `length` + 1 tokens."""
    rows, pieces, pieces_before = [np.zeros(1, np.int64)], [np.empty(0, PIECE)], 0
    for first in range(0, len(documents) - 1, TOGETHER):
        some = cut(documents[first : first + TOGETHER + 1], length)
        row_of, count = best_fit(some["length"], length + 1)
        pieces.append(some[np.argsort(row_of, kind="stable")])
        rows.append(np.cumsum(np.bincount(row_of, minlength=count)) + pieces_before)
        pieces_before += len(some)
    return Packing(np.concatenate(rows), np.concatenate(pieces))


def cut(documents: NDArray[np.int64], length: int) -> NDArray[Any]:
    """Documents as pieces of at most `length` + 1 tokens; one of a single token predicts nothing: no piece.

    Example: documents of 4 and 7 tokens, length 3 -> pieces (0, 4), and (4, 4), (7, 4): one token is shared.
    """
    sizes = np.diff(documents)
    counts = np.maximum(-(-(sizes - 1) // length), 0)
    nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    out = np.empty(len(nth), PIECE)
    out["start"] = np.repeat(documents[:-1], counts) + nth * length
    out["length"] = np.minimum(np.repeat(sizes, counts) - nth * length, length + 1)
    return out


def best_fit(lengths: NDArray[np.int32], capacity: int) -> tuple[NDArray[np.int64], int]:
    """The row of each item, and how many rows there are."""
    order = np.argsort(-lengths, kind="stable")
    row_of = np.empty(len(lengths), np.int64)
    by_room: dict[int, list[NDArray[np.int64]]] = {}  # rows by the room they have left
    rooms: list[int] = []  # its keys, sorted
    count = 0

    def put(room: int, rows: NDArray[np.int64]) -> None:
        if room and len(rows):
            if room not in by_room:
                insort(rooms, room)
            by_room.setdefault(room, []).append(rows)

    for items in _runs(order, lengths):
        size = int(lengths[items[0]])
        while len(items):
            place = bisect_left(rooms, size)
            room = rooms.pop(place) if place < len(rooms) else capacity
            each = room // size  # what a row has left only shrinks: it stays the best until nothing more fits
            if room < capacity:
                rows = np.concatenate(by_room.pop(room))
            else:
                rows = np.arange(count, count - (-len(items) // each))
                count += len(rows)
            taken = np.repeat(rows, each)[: len(items)]
            row_of[items[: len(taken)]] = taken
            items = items[len(taken) :]
            full, some = divmod(len(taken), each)  # rows that took all they can, and what the last one took
            put(room - each * size, rows[:full])
            put(room - some * size, rows[full : full + bool(some)])
            put(room, rows[full + bool(some) :])
    return row_of, count


def _runs(order: NDArray[np.int64], lengths: NDArray[np.int32]) -> Iterator[NDArray[np.int64]]:
    if len(order):
        yield from np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1)


def losses(documents: NDArray[np.int64], packing: Packing, length: int) -> tuple[float, int]:
    """What packing costs: the share of its rows that is padding, and how many documents it cut."""
    rows = len(packing.rows) - 1
    filled = int(packing.pieces["length"].sum(dtype=np.int64))
    return 1 - filled / (rows * (length + 1)), int((np.diff(documents) > length + 1).sum())
