"""The steps that find copies in a corpus of any size: sign, exact, alive, join, verify, components, settle.

Files are the shuffle. `sign` leaves an index of each shard. `exact` and `join` each take a range of keys and
read it in all indices. `verify` compares the pairs, `components` finds what hangs together, `settle` decides
who stays. Numbers of documents are their places in the corpus, so nothing depends on shards, workers, or who
came first.
"""

import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from numpy.typing import NDArray

from megachat.data.dedup import Dedup, alike, settle
from megachat.data.graph import Edges, forest, roots, stars, union
from megachat.data.index import Index, Sketches, digests
from megachat.data.join import KEYS, RECORD, Hot, Join, Numbers, distinct
from megachat.data.minhash import Texts
from megachat.data.steps import Record, Step, folder
from megachat.files import replacing

SIGNING = {"words", "characters", "bands", "rows"}
"""The settings that an index depends on."""

CLUSTERS = 20
"""How many of the largest clusters are reported."""

SPILL = 16
"""How many times the memory of a task the components may take in a file; beyond it, stars find them."""


@dataclass(frozen=True)
class Shards:
    """Documents in files that are numbered alike."""

    sizes: tuple[int, ...]
    """Documents in each."""
    texts: Path
    """Where they are, as Parquet."""
    indices: Path
    """Where their indices are."""
    marks: Path
    """Where a byte for each document says, by 0, that it takes part."""

    def of(self, shard: int) -> tuple[Path, Path, Path]:
        """The file of a shard's texts, its index, and its marks."""
        name = f"{shard:05}"
        return self.texts / f"{name}.parquet", self.indices / name, self.marks / f"{name}.npy"


@dataclass(frozen=True)
class Corpus:
    """Documents in shards, by their numbers: those of earlier runs, which stay, and then those to look at."""

    own: Shards
    earlier: tuple[Shards, ...] = ()

    @functools.cached_property
    def shards(self) -> list[tuple[Path, Path, Path]]:
        """The files of all shards."""
        return [some.of(shard) for some in (*self.earlier, self.own) for shard in range(len(some.sizes))]

    @functools.cached_property
    def before(self) -> int:
        """How many shards are earlier runs'."""
        return sum(len(some.sizes) for some in self.earlier)

    @functools.cached_property
    def first(self) -> int:
        """The number of the first document to look at."""
        return int(self.offsets[self.before])

    @functools.cached_property
    def offsets(self) -> NDArray[np.uint64]:
        """The number of each shard's first document, and at the end how many there are."""
        sizes = [size for some in (*self.earlier, self.own) for size in some.sizes]
        return np.concatenate([[0], np.cumsum(sizes, dtype=np.uint64)]).astype(np.uint64)

    @functools.cached_property
    def index(self) -> list[Index]:
        """Of each shard, mapped into memory."""
        return [Index.read(index) for _, index, _ in self.shards]

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def gather(self, numbers: Numbers, of_shard: Callable[[int], NDArray[Any]]) -> NDArray[Any]:
        """The rows of arrays, one for each shard, that belong to documents."""
        shards = np.searchsorted(self.offsets, numbers, side="right") - 1
        rows = numbers - self.offsets[shards]
        found: NDArray[Any] | None = None
        for shard in np.unique(shards):
            own = shards == shard
            values = of_shard(int(shard))[rows[own]]
            if found is None:
                found = np.empty((len(numbers), *values.shape[1:]), dtype=values.dtype)
            found[own] = values
        return of_shard(0)[:0] if found is None else found

    def sketches(self, numbers: Numbers) -> Sketches:
        """Of documents."""
        return self.gather(numbers, lambda shard: self.index[shard].sketches)

    def column(self, numbers: Numbers, name: str) -> NDArray[Any]:
        """What a column of the Parquet files says of documents."""
        return self.gather(numbers, lambda shard: _column(self.shards[shard][0], name))

    def unmarked(self, numbers: Numbers, marks: Path | None = None) -> NDArray[np.bool_]:
        """Which documents take part; `marks` has later word of those to look at than their own."""

        def of_shard(shard: int) -> NDArray[Any]:
            path = self.shards[shard][2]
            return _load(path if marks is None or shard < self.before else marks / path.name)

        found: NDArray[np.bool_] = self.gather(numbers, of_shard) == 0
        return found

    def within(self, pairs: NDArray[np.uint64], task: int) -> NDArray[np.uint64]:
        """The columns of `pairs` whose first document, by which they are sorted, is of a shard to look at."""
        begin, end = np.searchsorted(pairs[0], self.offsets[self.before + task : self.before + task + 2])
        return pairs[:, begin:end]


def _column(path: Path, name: str) -> NDArray[Any]:
    return pyarrow.parquet.read_table(path, columns=[name]).column(0).to_numpy()


@dataclass(frozen=True)
class Sign(Step):
    """An index for each shard."""

    shards: Shards
    dedup: Dedup
    fast: bool
    """Whether numba signs; it gives the same signatures."""

    def work(self, task: int) -> Record:
        path, index, _ = self.shards.of(task)
        file = pyarrow.parquet.ParquetFile(path)
        parts = []
        for group in range(file.num_row_groups):
            texts = arrow_texts(file.read_row_group(group, columns=["text"]).column(0).combine_chunks())
            parts.append((digests(texts), *self.dedup.signer.sign(texts, self.fast)))
        found, signatures, signed = (np.concatenate(column) for column in zip(*parts, strict=True))
        Index.make(found, signatures, signed, self.dedup.bands).write(index)
        return {"documents": len(found), "signed": int(signed.sum())}


def arrow_texts(column: Any) -> Texts:
    """Arrow's own buffers, without a copy."""
    wide = column.type == pyarrow.large_string()
    _, ends, data = column.buffers()
    bounds = np.frombuffer(ends, np.int64 if wide else np.int32)[
        column.offset : column.offset + len(column) + 1
    ]
    return Texts(np.frombuffer(data or b"", np.uint8), bounds.astype(np.int64))


@dataclass(frozen=True)
class Exact(Step):
    """Documents with the digest of an earlier one; a task for each range of keys."""

    corpus: Corpus
    memory: int

    def work(self, task: int) -> Record:
        join = Join(self.corpus.offsets[:-1], self.corpus.unmarked, self.memory, most=0)
        pairs = np.stack(join.exact_copies(self.corpus.index, *_span(task, self.tasks)))
        pairs = pairs[:, pairs[0] >= self.corpus.first]
        _save(self.folder / f"{task:05}.npy", pairs)
        return {"copies": pairs.shape[1]}


@dataclass(frozen=True)
class Alive(Step):
    """Who takes part in the search for near copies: passed the filters, and is no exact copy."""

    corpus: Corpus
    exact: Path
    ranges: int
    """Tasks of `exact`."""

    def work(self, task: int) -> Record:
        gone = _load(self.corpus.own.of(task)[2]).copy()
        for part in range(self.ranges):
            copies = self.corpus.within(_load(self.exact / f"{part:05}.npy"), task)[0]
            gone[copies - self.corpus.offsets[self.corpus.before + task]] = 1
        _save(self.folder / f"{task:05}.npy", gone)
        return {"alive": int((gone == 0).sum())}


@dataclass(frozen=True)
class Candidates(Step):
    """Pairs that share a band; a task for each band and range of keys."""

    corpus: Corpus
    alive: Path
    dedup: Dedup
    memory: int

    def work(self, task: int) -> Record:
        alive = functools.partial(self.corpus.unmarked, marks=self.alive)
        join = Join(self.corpus.offsets[:-1], alive, self.memory, self.dedup.largest_bucket)
        band, part = task % self.dedup.bands, task // self.dedup.bands
        span = _span(part, self.tasks // self.dedup.bands)
        pairs = np.stack(join.pairs(self.corpus.index, band, *span))
        pairs = pairs[:, pairs[1] >= self.corpus.first]
        _save(self.folder / f"{task:05}.npy", pairs)
        return {"pairs": pairs.shape[1], "hot": [[band, hot.documents, hot.example] for hot in join.hot]}


@dataclass(frozen=True)
class Verify(Step):
    """The pairs that are alike; a task for each range of first documents."""

    corpus: Corpus
    candidates: Path
    files: int
    """Tasks of the step before."""
    threshold: float

    def work(self, task: int) -> Record:
        begin, end = (len(self.corpus) * part // self.tasks for part in (task, task + 1))
        parts = [np.empty((2, 0), dtype=np.uint64)]
        for file in range(self.files):
            pairs = _load(self.candidates / f"{file:05}.npy")
            first, last = np.searchsorted(pairs[0], np.array([begin, end], dtype=np.uint64))
            parts.append(pairs[:, first:last])
        left, right = distinct(*np.concatenate(parts, axis=1))
        like = alike(self.corpus.sketches, left, right, self.threshold)
        _save(self.folder / f"{task:05}.npy", np.stack([left[like], right[like]]))
        return {"compared": len(like), "alike": int(like.sum())}


@dataclass(frozen=True)
class Components(Step):
    """What hangs together: the pairs, dealt to `ranges` files by the first document of their component."""

    corpus: Corpus
    pairs: Path
    files: int
    ranges: int
    memory: int
    how: str
    """memory, disk, or stars."""

    def work(self, task: int) -> Record:
        label = self._stars() if self.how == "stars" else self._union()
        width = np.zeros(1 << 12, dtype=np.int64)
        scale = max(-(-len(self.corpus) // len(width)), 1)
        for left, _ in self._pieces():
            width += np.bincount((label(left) // np.uint64(scale)).astype(np.int64), minlength=len(width))
        share = np.cumsum(width) * self.ranges // max(int(width.sum()), 1)
        owner_of = np.minimum(np.concatenate([[0], share[:-1]]), self.ranges - 1)
        files = [self.folder / f"{number:05}.pairs" for number in range(self.ranges)]
        for file in files:
            file.write_bytes(b"")
        for left, right in self._pieces():
            owner = owner_of[(label(left) // np.uint64(scale)).astype(np.int64)]
            for number in np.unique(owner):
                with files[number].open("ab") as out:
                    np.stack([left, right], axis=1)[owner == number].tofile(out)
        for scratch in ("parents", "labels"):
            (self.folder / scratch).unlink(missing_ok=True)
        return {"pairs": int(width.sum())}

    def _pieces(self) -> Iterator[Edges]:
        size = max(self.memory // (8 * RECORD), 1)
        for file in range(self.files):
            pairs = _load(self.pairs / f"{file:05}.npy")
            for start in range(0, pairs.shape[1], size):
                yield pairs[0, start : start + size], pairs[1, start : start + size]

    def _union(self) -> Callable[[Numbers], Numbers]:
        parents = forest(len(self.corpus), self.folder / "parents" if self.how == "disk" else None)
        for left, right in self._pieces():
            union(parents, left, right)
        return functools.partial(roots, parents)

    def _stars(self) -> Callable[[Numbers], Numbers]:
        path = self.folder / "labels"
        with path.open("wb") as file:
            for found in stars(self._pieces(), len(self.corpus), self.folder, self.ranges):
                np.stack(found, axis=1).tofile(file)
        empty = not path.stat().st_size
        labels = np.empty((0, 2), np.uint64) if empty else np.memmap(path, np.uint64, "r").reshape(-1, 2)

        def label(numbers: Numbers) -> Numbers:
            place = np.searchsorted(labels[:, 0], numbers)
            place[place == len(labels)] = 0
            found = labels[place] if len(labels) else np.zeros((len(numbers), 2), np.uint64)
            return np.where(found[:, 0] == numbers, found[:, 1], numbers)

        return label


@dataclass(frozen=True)
class Settle(Step):
    """Who goes and who stays in their stead; a task for each file of components."""

    corpus: Corpus
    pairs: Path
    dedup: Dedup

    def work(self, task: int) -> Record:
        pairs = np.fromfile(self.pairs / f"{task:05}.pairs", dtype=np.uint64).reshape(-1, 2)
        column = {"first": None, "longest": "characters", "best": self.dedup.score}[self.dedup.keep]
        merit = functools.partial(self.corpus.column, name=column) if column else None
        sides, first = (pairs[:, 0], pairs[:, 1]), self.corpus.first
        found = np.stack(settle(*sides, self.corpus.sketches, self.dedup.threshold, merit, first))
        _save(self.folder / f"{task:05}.npy", found)
        heads, sizes = np.unique(found[1], return_counts=True)
        largest = np.lexsort((heads, -sizes))[:CLUSTERS]
        return {"copies": found.shape[1], "clusters": [[int(heads[n]), int(sizes[n])] for n in largest]}


@dataclass(frozen=True)
class Found:
    """Where the copies are listed: files of (copy, what stays), sorted by the copy."""

    exact: Path
    exact_files: int
    near: Path
    near_files: int
    join: Sequence[Record] = ()
    """What the steps tell of their work."""
    settle: Sequence[Record] = ()

    def of(self, corpus: Corpus, shard: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """The exact and the near copies among the documents of a shard."""
        listed = (self.exact, self.exact_files), (self.near, self.near_files)
        exact, near = (
            np.concatenate(
                [np.empty((2, 0), np.uint64)]
                + [corpus.within(_load(folder / f"{file:05}.npy"), shard) for file in range(files)],
                axis=1,
            )
            for folder, files in listed
        )
        return exact, near

    def copies_of(self, number: int, most: int) -> Numbers:
        """Some near copies of a document."""
        pairs = (_load(self.near / f"{file:05}.npy") for file in range(self.near_files))
        return np.concatenate([copies[0][copies[1] == number][:most] for copies in pairs])[:most]


def search(work: Path, corpus: Corpus, dedup: Dedup, memory: int, fast: bool) -> Generator[Step, None, Found]:
    """The steps one by one, each when those before it have been carried out; at the end where the copies are.

    `memory` is for a task, in bytes.
    """
    shards = len(corpus.own.sizes)
    earlier = [[str(path) for path in (some.texts, some.marks)] for some in corpus.earlier]
    signing = dedup.model_dump(include=SIGNING)
    sign = Sign("sign", corpus.own.indices, shards, corpus.own, dedup, fast)
    yield sign

    parts = ranges(len(corpus), RECORD, memory)
    at = folder(work, "exact", sign.folder.name, corpus.own.marks.name, earlier, parts)
    exact = Exact("exact", at, parts, corpus, memory)
    yield exact
    if not dedup.near:
        return Found(exact.folder, parts, exact.folder, 0)
    alive = Alive("alive", folder(work, "alive", at.name), shards, corpus, exact.folder, parts)
    yield alive

    tasks = dedup.bands * parts
    at = folder(work, "join", alive.folder.name, signing, dedup.largest_bucket, memory)
    join = Candidates("join", at, tasks, corpus, alive.folder, dedup, memory)
    yield join
    parts = ranges(sum(record["pairs"] for record in join.records), 2 * RECORD, memory)
    at = folder(work, "verify", at.name, dedup.threshold)
    verify = Verify("verify", at, parts, corpus, join.folder, tasks, dedup.threshold)
    yield verify

    pairs = sum(record["alike"] for record in verify.records)
    files = ranges(pairs, 4 * dedup.bands * dedup.rows, memory)
    room = 8 * len(corpus)
    how = "memory" if room <= memory else "disk" if room <= SPILL * memory else "stars"
    components = Components(
        "components",
        folder(work, "components", at.name, files, how),
        1,
        corpus,
        verify.folder,
        parts,
        files,
        memory,
        how,
    )
    yield components
    at = folder(work, "settle", components.folder.name, dedup.keep, dedup.score)
    near = Settle("settle", at, files, corpus, components.folder, dedup)
    yield near
    return Found(exact.folder, exact.tasks, near.folder, files, join.records, near.records)


def ranges(items: int, size: int, memory: int) -> int:
    """Into how many parts to cut items of `size` bytes each, so that one fits."""
    return max(-(-items * size // memory), 1)


def hot_buckets(records: Sequence[Record]) -> list[tuple[int, Hot]]:
    """The bands too many share, the largest first."""
    found = [
        (band, Hot(documents, example)) for record in records for band, documents, example in record["hot"]
    ]
    return sorted(found, key=lambda item: (-item[1].documents, item[0], item[1].example))


def _span(part: int, parts: int) -> tuple[int, int]:
    return KEYS * part // parts, KEYS * (part + 1) // parts


def _save(path: Path, values: NDArray[Any]) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, values, allow_pickle=False)


def _load(path: Path) -> NDArray[Any]:
    values: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return values
