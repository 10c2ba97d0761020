"""The steps that find copies in a corpus of any size: sign, exact, alive, join, verify, components, settle.

Files are the shuffle. `sign` leaves an index of each shard. `exact` and `join` each take a range of keys and
read it in all indices. `verify` compares the pairs, `components` finds what hangs together, `settle` decides
who stays. Numbers of documents are their places in the corpus, so nothing depends on shards, workers, or who
came first.
"""

import functools
import unicodedata
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from numpy.typing import NDArray

from megachat.data.dedup import Dedup, alike, settle
from megachat.data.graph import Edges, forest, roots, stars, union
from megachat.data.index import Index, Open, Part, Rows, Sketches, band_keys, digests
from megachat.data.join import KEYS, RECORD, Hot, Join, Numbers, distinct, first_of_run
from megachat.data.minhash import SCHEME, Texts
from megachat.data.steps import Record, Step, folder
from megachat.files import replacing, telling

CLUSTERS = 20
"""How many of the largest clusters are reported."""

SPREAD = 64
"""Documents of a file of pairs that say where its pairs lie."""

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

    @property
    def indices(self) -> list[Open]:
        """The index of each shard."""
        return [functools.partial(Index.open, index) for _, index, _ in self.shards]

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def __getstate__(self) -> dict[str, Any]:
        """To other processes goes what it is made of, not what it has looked up."""
        return {"own": self.own, "earlier": self.earlier}

    def gather(self, numbers: Numbers, of_shard: Callable[[int], NDArray[Any]]) -> NDArray[Any]:
        """The rows of arrays, one for each shard, that belong to documents."""
        order = np.argsort(numbers, kind="stable")
        bounds = np.searchsorted(numbers[order], self.offsets)
        found: NDArray[Any] | None = None
        for shard in np.flatnonzero(np.diff(bounds)):
            own = order[bounds[shard] : bounds[shard + 1]]
            values = of_shard(int(shard))[numbers[own] - self.offsets[shard]]
            if found is None:
                found = np.empty((len(numbers), *values.shape[1:]), dtype=values.dtype)
            found[own] = values
        return of_shard(0)[:0] if found is None else found

    def sketches(self, numbers: Numbers) -> Sketches:
        """Of documents."""
        return self.gather(numbers, lambda shard: Index.open(self.shards[shard][1], "sketches"))

    def column(self, numbers: Numbers, name: str) -> NDArray[Any]:
        """What a column of the Parquet files says of documents."""
        return self.gather(numbers, lambda shard: _column(self.shards[shard][0], name))

    def unmarked(self, shard: int, rows: Rows, marks: Path | None = None) -> NDArray[np.bool_]:
        """Which rows take part; `marks` has later word of those to look at than their own."""
        path = self.shards[shard][2]
        values = _load(path if marks is None or shard < self.before else marks / path.name)
        found: NDArray[np.bool_] = values[rows] == 0
        return found

    def span(self, task: int) -> tuple[int, int]:
        """The documents of a shard to look at."""
        begin, end = self.offsets[self.before + task : self.before + task + 2].tolist()
        return begin, end


@dataclass(frozen=True)
class Pairs:
    """Pairs of documents in the files of a step, sorted within each: as many for a task as it needs."""

    folder: Path
    files: tuple[int, ...]
    """How many, for each task."""

    @staticmethod
    def of(step: Step) -> "Pairs":
        """What a step has saved, once it is done."""
        return Pairs(step.folder, tuple(len(record["files"]) for record in step.records))

    @staticmethod
    def save(folder: Path, task: int, found: Iterable[NDArray[np.uint64]], most: int) -> list[int]:
        """Writes pairs, a new file when there are `most`; returns how many are in each file."""
        counts = []
        for number, pairs in enumerate(_together(found, most)):
            _save(_piece(folder, task, number), pairs[:, np.lexsort((pairs[1], pairs[0]))])
            counts.append(pairs.shape[1])
        return counts

    def __iter__(self) -> Iterator[NDArray[np.uint64]]:
        """One file after the other, mapped into memory."""
        for task, count in enumerate(self.files):
            for number in range(count):
                yield _load(_piece(self.folder, task, number))

    def between(self, begin: int, end: int) -> NDArray[np.uint64]:
        """Those whose first document is of [begin, end), file by file; copied, for a slice would keep the
        file open."""
        found = [np.empty((2, 0), dtype=np.uint64)]
        for pairs in self:
            first, last = np.searchsorted(pairs[0], np.array([begin, end], dtype=np.uint64))
            found.append(np.array(pairs[:, first:last]))
        return np.concatenate(found, axis=1)


def _column(path: Path, name: str) -> NDArray[Any]:
    return pyarrow.parquet.read_table(path, columns=[name]).column(0).to_numpy()


@dataclass(frozen=True)
class Sign(Step):
    """An index for each shard. A task takes some 300 bytes of memory for each document of it, and what a row
    group takes."""

    shards: Shards
    dedup: Dedup
    fast: bool
    """Whether numba signs; it gives the same signatures."""

    def work(self, task: int) -> Record:
        path, index, _ = self.shards.of(task)
        file = pyarrow.parquet.ParquetFile(path)
        documents = file.metadata.num_rows
        made = Index.make(self._parts(file), documents, self.dedup.bands, self.dedup.rows)
        made.write(index)
        return {"documents": documents, "signed": made.bands.shape[1]}

    def _parts(self, file: Any) -> Iterator[Part]:
        for group in range(file.num_row_groups):
            texts = arrow_texts(file.read_row_group(group, columns=["text"]).column(0).combine_chunks())
            yield digests(texts, self.fast), *self.dedup.signer.sign(texts, self.fast)


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
    by_id: bool
    """Whether the one with the smallest id stays, not the first. Then the pairs of a task, and their ids, are
    in memory together."""

    def work(self, task: int) -> Record:
        join = Join(self.corpus.offsets[:-1], self.corpus.unmarked, self.memory, most=0)
        found = map(np.stack, join.exact_copies(self.corpus.indices, *_span(task, self.tasks)))
        pieces: Iterable[NDArray[np.uint64]] = (pairs[:, pairs[0] >= self.corpus.first] for pairs in found)
        if self.by_id:
            pieces = [self._smallest_stay(np.concatenate([np.empty((2, 0), np.uint64), *pieces], axis=1))]
        return {"files": Pairs.save(self.folder, task, pieces, max(join.room // 2, 1))}

    def _smallest_stay(self, pairs: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The same groups, each with its smallest id as what stays; but earlier runs' documents stay."""
        new = pairs[1] >= self.corpus.first
        heads = np.unique(pairs[1, new])
        members, groups = (np.concatenate([side[new], heads]) for side in pairs)
        order = np.lexsort((members, ranks(self.corpus.column(members, "id")), groups))
        members, stays = members[order], members[order][first_of_run(groups[order])]
        gone = members != stays
        return np.concatenate([pairs[:, ~new], np.stack([members[gone], stays[gone]])], axis=1)


def ranks(ids: NDArray[Any]) -> NDArray[np.int64]:
    """For each id its place among them, sorted; the same for the same."""
    return np.unique(ids, return_inverse=True)[1]


@dataclass(frozen=True)
class Alive(Step):
    """Who takes part in the search for near copies: passed the filters, and is no exact copy."""

    corpus: Corpus
    exact: Pairs

    def work(self, task: int) -> Record:
        gone = np.array(_load(self.corpus.own.of(task)[2]))
        begin, end = self.corpus.span(task)
        gone[self.exact.between(begin, end)[0] - np.uint64(begin)] = 1
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
        if self.dedup.keep == "id":  # whatever the order of the corpus
            join.intrinsic = self._by_sketch
        band, part = task % self.dedup.bands, task // self.dedup.bands
        span = _span(part, self.tasks // self.dedup.bands)
        found = map(np.stack, join.pairs(self.corpus.indices, band, *span))
        new = (pairs[:, pairs[1] >= self.corpus.first] for pairs in found)
        files = Pairs.save(self.folder, task, new, max(join.room // 2, 1))
        lefts = (_load(_piece(self.folder, task, number))[0] for number in range(len(files)))
        return {
            "files": files,
            "spread": [sample(left, SPREAD).tolist() for left in lefts],
            "hot": [[band, hot.documents, hot.example] for hot in join.hot],
        }

    def _by_sketch(self, numbers: Numbers) -> NDArray[np.uint64]:
        """A number for each document that follows from its sketch."""
        return band_keys(self.corpus.sketches(numbers).astype(np.uint32), 1)[0]


def sample(numbers: Numbers, most: int) -> Numbers:
    """Some of them, each in the middle of as many."""
    count = min(len(numbers), most)
    return numbers[(2 * np.arange(count) + 1) * len(numbers) // (2 * max(count, 1))]


def cuts(records: Sequence[Record], parts: int, documents: int) -> tuple[int, ...]:
    """Between which documents to cut, for parts with about as many pairs, by what files of pairs say of
    themselves."""
    files = [file for record in records for file in zip(record["files"], record["spread"], strict=True)]
    firsts = np.array([first for _, spread in files for first in spread], dtype=np.uint64)
    weights = np.array([count / len(spread) for count, spread in files for _ in spread])
    order = np.argsort(firsts, kind="stable")
    total = np.cumsum(weights[order])
    inner = firsts[order][np.searchsorted(total, weights.sum() * np.arange(1, parts) / parts)]
    return (0, *inner.tolist(), documents)


@dataclass(frozen=True)
class Verify(Step):
    """The pairs that are alike; a task for each range of first documents."""

    corpus: Corpus
    candidates: Pairs
    bounds: tuple[int, ...]
    """Of the ranges."""
    threshold: float

    def work(self, task: int) -> Record:
        left, right = distinct(*self.candidates.between(*self.bounds[task : task + 2]))
        like = alike(self.corpus.sketches, left, right, self.threshold)
        files = Pairs.save(self.folder, task, [np.stack([left[like], right[like]])], len(like) + 1)
        return {"compared": len(like), "files": files}


@dataclass(frozen=True)
class Components(Step):
    """What hangs together: the pairs, dealt to `ranges` files by the first document of their component."""

    corpus: Corpus
    pairs: Pairs
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
        counts = [0] * self.ranges
        with ExitStack() as stack:
            names = [self.folder / f"{number:05}.pairs" for number in range(self.ranges)]
            files = [stack.enter_context(replacing(name)) for name in names]
            for file in files:
                file.touch()
            for left, right in self._pieces():
                owner = owner_of[(label(left) // np.uint64(scale)).astype(np.int64)]
                for number in np.unique(owner):
                    pairs = np.stack([left, right], axis=1)[owner == number]
                    counts[number] += len(pairs)
                    with telling(names[number]), files[number].open("ab") as out:
                        pairs.tofile(out)
        for scratch in ("parents", "labels"):
            (self.folder / scratch).unlink(missing_ok=True)
        return {"pairs": counts}

    def _pieces(self) -> Iterator[Edges]:
        size = max(self.memory // (8 * RECORD), 1)
        for pairs in self.pairs:
            for start in range(0, pairs.shape[1], size):
                yield pairs[0, start : start + size], pairs[1, start : start + size]

    def _union(self) -> Callable[[Numbers], Numbers]:
        parents = forest(len(self.corpus), self.folder / "parents" if self.how == "disk" else None)
        for left, right in self._pieces():
            union(parents, left, right)
        return functools.partial(roots, parents)

    def _stars(self) -> Callable[[Numbers], Numbers]:
        path = self.folder / "labels"
        with telling(path), path.open("wb") as file:
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
    """Who goes and who stays in their stead; a task for each file of components. The largest component is in
    one file, however large."""

    corpus: Corpus
    pairs: Path
    counts: tuple[int, ...]
    """How many are in each file."""
    dedup: Dedup

    def work(self, task: int) -> Record:
        path = self.pairs / f"{task:05}.pairs"
        pairs = np.fromfile(path, dtype=np.uint64).reshape(-1, 2)
        if len(pairs) != self.counts[task]:
            raise ValueError(
                f"{path} has {len(pairs):,} pairs of {self.counts[task]:,}; delete {self.pairs} and run the "
                "same command again"
            )
        merit = None if self.dedup.keep == "first" else self._merit
        sides, first = (pairs[:, 0], pairs[:, 1]), self.corpus.first
        found = np.stack(settle(*sides, self.corpus.sketches, self.dedup.threshold, merit, first))
        files = Pairs.save(self.folder, task, [found], found.shape[1] + 1)
        heads, sizes = np.unique(found[1], return_counts=True)
        largest = np.lexsort((heads, -sizes))[:CLUSTERS]
        return {"files": files, "clusters": [[int(heads[n]), int(sizes[n])] for n in largest]}

    def _merit(self, numbers: Numbers) -> NDArray[np.float64]:
        if self.dedup.keep == "id":
            return -ranks(self.corpus.column(numbers, "id")).astype(np.float64)
        column = "characters" if self.dedup.keep == "longest" else self.dedup.score
        return self.corpus.column(numbers, column).astype(np.float64)


@dataclass(frozen=True)
class Found:
    """Where the copies are listed: files of (copy, what stays), sorted by the copy."""

    exact: Pairs
    near: Pairs
    join: Sequence[Record] = ()
    """What the steps tell of their work."""
    settle: Sequence[Record] = ()
    compared: int = 0
    """Pairs that share a band."""
    alike: int = 0
    """Those of them that are alike."""

    def of(self, corpus: Corpus, shard: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """The exact and the near copies among the documents of a shard."""
        span = corpus.span(shard)
        return self.exact.between(*span), self.near.between(*span)

    def copies_of(self, number: int, most: int) -> Numbers:
        """Some near copies of a document."""
        found = [copies[0][copies[1] == number][:most] for copies in self.near]
        return np.concatenate([np.empty(0, np.uint64), *found])[:most]


def signing(dedup: Dedup) -> dict[str, Any]:
    """What an index depends on, besides the texts. Python's Unicode says which characters are letters."""
    settings = dedup.model_dump(include={"words", "characters", "bands", "rows"})
    return settings | {"minhash": SCHEME, "unicode": unicodedata.unidata_version}


def search(work: Path, corpus: Corpus, dedup: Dedup, memory: int, fast: bool) -> Generator[Step, None, Found]:
    """The steps one by one, each when those before it have been carried out; at the end where the copies are.

    `memory` is for a task, in bytes.
    """
    shards = len(corpus.own.sizes)
    earlier = [[str(path) for path in (some.texts, some.marks)] for some in corpus.earlier]
    sign = Sign("sign", corpus.own.indices, shards, corpus.own, dedup, fast)
    yield sign

    parts = ranges(len(corpus), RECORD, memory)
    by_id = dedup.keep == "id"
    at = folder(work, "exact", sign.folder.name, corpus.own.marks.name, earlier, parts, by_id)
    exact = Exact("exact", at, parts, corpus, memory, by_id)
    yield exact
    same = Pairs.of(exact)
    if not dedup.near:
        return Found(same, Pairs(exact.folder, ()))
    alive = Alive("alive", folder(work, "alive", at.name), shards, corpus, same)
    yield alive

    tasks = dedup.bands * parts
    at = folder(work, "join", alive.folder.name, signing(dedup), dedup.largest_bucket, by_id, memory)
    join = Candidates("join", at, tasks, corpus, alive.folder, dedup, memory)
    yield join
    parts = ranges(_pairs(join), 2 * RECORD, memory)
    bounds = cuts(join.records, parts, len(corpus))
    at = folder(work, "verify", at.name, dedup.threshold)
    verify = Verify("verify", at, parts, corpus, Pairs.of(join), bounds, dedup.threshold)
    yield verify

    pairs = _pairs(verify)
    files = ranges(pairs, 4 * dedup.bands * dedup.rows, memory)
    room = 8 * len(corpus)
    how = "memory" if room <= memory else "disk" if room <= SPILL * memory else "stars"
    components = Components(
        "components",
        folder(work, "components", at.name, files, how),
        1,
        corpus,
        Pairs.of(verify),
        files,
        memory,
        how,
    )
    yield components
    at = folder(work, "settle", components.folder.name, dedup.keep, dedup.score)
    counts = tuple(components.records[0]["pairs"])
    near = Settle("settle", at, files, corpus, components.folder, counts, dedup)
    yield near
    compared = sum(record["compared"] for record in verify.records)
    return Found(same, Pairs.of(near), join.records, near.records, compared, pairs)


def ranges(items: int, size: int, memory: int) -> int:
    """Into how many parts to cut items of `size` bytes each, so that one fits."""
    return max(-(-items * size // memory), 1)


def _pairs(step: Step) -> int:
    return sum(count for record in step.records for count in record["files"])


def hot_buckets(records: Sequence[Record]) -> list[tuple[int, Hot]]:
    """The bands too many share, the largest first."""
    found = [
        (band, Hot(documents, example)) for record in records for band, documents, example in record["hot"]
    ]
    return sorted(found, key=lambda item: (-item[1].documents, item[0], item[1].example))


def _span(part: int, parts: int) -> tuple[int, int]:
    return KEYS * part // parts, KEYS * (part + 1) // parts


def _together(found: Iterable[NDArray[np.uint64]], most: int) -> Iterator[NDArray[np.uint64]]:
    """The same pairs in pieces of `most` or a little more, but for the last."""
    held: list[NDArray[np.uint64]] = []
    count = 0
    for pairs in found:
        held.append(pairs)
        count += pairs.shape[1]
        if count >= most:
            yield np.concatenate(held, axis=1)
            held, count = [], 0
    if count:
        yield np.concatenate(held, axis=1)


def _piece(folder: Path, task: int, number: int) -> Path:
    return folder / f"{task:05}-{number}.npy"


def _save(path: Path, values: NDArray[Any]) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, values, allow_pickle=False)


def _load(path: Path) -> NDArray[Any]:
    values: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return values
