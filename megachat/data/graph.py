"""Which documents hang together: the components of a graph that comes in pieces.

Union by smallest number on one array, edges streamed (Tarjan, 1975): 8 bytes a document in memory, or in a
file where that is too much. Above what a disk should be asked to answer at random, alternating stars (Kiveris
et al., 2014, "Connected Components in MapReduce and Beyond") do it with sorted files alone, some rounds of
them.
"""

import hashlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from megachat.data.jit import available, compiled
from megachat.data.join import Numbers, distinct, first_of_run
from megachat.files import remove, telling

Edges = tuple[Numbers, Numbers]

SMALL = 1_000_000
"""Edges for which compiling would take longer than doing without."""


def union(parents: Numbers, left: Numbers, right: Numbers) -> None:
    """Adds edges to a forest whose roots are the smallest of their trees; `parents` holds each one's
    parent."""
    if available() and len(left) >= SMALL:
        compiled(_union)(parents, left, right)
        return
    a, b = roots(parents, left), roots(parents, right)
    while True:
        apart = a != b
        if not apart.any():
            return
        a, b = a[apart], b[apart]
        # Where several trees would join one, the smallest wins, and the others come again.
        np.minimum.at(parents, np.maximum(a, b), np.minimum(a, b))
        a, b = roots(parents, a), roots(parents, b)


def roots(parents: Numbers, numbers: Numbers) -> Numbers:
    """The root of each; the way to it is made shorter."""
    found = parents[numbers]
    while True:
        above = parents[found]
        if np.array_equal(above, found):
            parents[numbers] = found
            return found
        found = above


def _union(parents: Numbers, left: Numbers, right: Numbers) -> None:
    """The same edge by edge, to be compiled."""
    for edge in range(len(left)):
        a = left[edge]
        b = right[edge]
        while parents[a] != a:
            parents[a] = parents[parents[a]]
            a = parents[a]
        while parents[b] != b:
            parents[b] = parents[parents[b]]
            b = parents[b]
        if a < b:
            parents[b] = a
        elif b < a:
            parents[a] = b


def forest(documents: int, spill: Path | None) -> Numbers:
    """A tree for each document by itself; in a file where `spill` names one."""
    if spill is None:
        return np.arange(documents, dtype=np.uint64)
    parents = np.memmap(spill, dtype=np.uint64, mode="w+", shape=(max(documents, 1),))
    for start in range(0, documents, 1 << 22):
        end = min(start + (1 << 22), documents)
        parents[start:end] = np.arange(start, end, dtype=np.uint64)
    return parents


def stars(pieces: Iterable[Edges], documents: int, folder: Path, ranges: int) -> Iterator[Edges]:
    """For every document with an edge to a smaller one: the document, and the smallest it is connected to.

    Edges lie in files of `folder`, by the range of their first document; one range is in memory at a time.
    """
    edges = Dealt(folder / "edges", documents, ranges)
    edges.deal((np.maximum(*piece), np.minimum(*piece)) for piece in pieces)
    before = ""
    while before != (before := edges.digest()):
        both = Dealt(folder / "both", documents, ranges)
        both.deal(way for left, right in edges.read() for way in ((left, right), (right, left)))
        large = Dealt(folder / "large", documents, ranges)
        large.deal(map(_large_star, both.read()))
        edges = Dealt(folder / "edges", documents, ranges)
        edges.deal(map(_small_star, large.read()))
    yield from edges.read()
    for name in ("edges", "both", "large"):
        remove(folder / name)


def _large_star(edges: Edges) -> Edges:
    """The larger neighbours of each document now hang on the smallest of all."""
    node, neighbour = edges
    smallest = np.minimum(node, neighbour[first_of_run(node)])
    larger = neighbour > node
    return neighbour[larger], smallest[larger]


def _small_star(edges: Edges) -> Edges:
    """Each document and its smaller neighbours, all it has, now hang on the smallest of these."""
    node, neighbour = edges
    smallest = neighbour[first_of_run(node)]
    rest = neighbour != smallest
    return np.concatenate([node, neighbour[rest]]), np.concatenate([smallest, smallest[rest]])


class Dealt:
    """Edges in files, one for each range of first documents."""

    def __init__(self, folder: Path, documents: int, ranges: int) -> None:
        self.folder, self.ranges = folder, ranges
        self.width = -(-documents // ranges)

    def deal(self, pieces: Iterable[Edges]) -> None:
        """Writes the edges, in place of what was there."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        for first, second in pieces:
            owner = first // np.uint64(self.width)
            order = np.argsort(owner, kind="stable")
            bounds = np.searchsorted(owner[order], np.arange(self.ranges + 1))
            pairs = np.stack([first, second], axis=1)[order]
            for number in np.flatnonzero(np.diff(bounds)):
                path = self._file(int(number))
                with telling(path), path.open("ab") as file:
                    pairs[bounds[number] : bounds[number + 1]].tofile(file)

    def read(self) -> Iterator[Edges]:
        """The edges, range by range, each edge once, sorted."""
        for number in range(self.ranges):
            path = self._file(number)
            if path.is_file():
                pairs = np.fromfile(path, dtype=np.uint64).reshape(-1, 2)
                yield distinct(pairs[:, 0], pairs[:, 1])

    def digest(self) -> str:
        """Of the set of edges, however they lie in the files."""
        whole = hashlib.sha256()
        for left, right in self.read():
            whole.update(left.tobytes() + right.tobytes())
        return whole.hexdigest()

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:05}.pairs"
