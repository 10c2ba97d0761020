"""The steps that look at documents one by one: collect reads, mends and measures, select decides, filter
writes.

`collect` leaves Parquet files with every document that is not empty and, as columns, all that the rules want
to know of it. So `select`, which decides, never sees a text: with other bounds nothing is read again.
"""

import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megachat.data.boilerplate import Boilerplate
from megachat.data.contamination import Benchmarks, Index, Overlaps
from megachat.data.copies import Corpus, Found
from megachat.data.document import Broken, Document, write_shard
from megachat.data.filters import Filter
from megachat.data.language import LanguageId
from megachat.data.privacy import Privacy
from megachat.data.repair import Repair
from megachat.data.sources import Part, Source
from megachat.data.steps import Record, Step
from megachat.data.words import Transform
from megachat.files import replacing

GROUP = 8 << 20
"""Characters in a row group: about what a task holds in memory."""

ROWS = 20_000
"""Documents in a row group, for short ones: each takes some kB as Python has it."""

EXAMPLES = 5
"""Removed documents of each kind that the report shows."""

HITS = 100
"""What documents of a shard share with benchmarks that the report shows: the largest shares."""

HITS_OF_ONE = 5
"""How many of them may be of one document."""

SHARED = "contamination.share"
"""The column with the largest share of a benchmark's item."""

QUARANTINE = 20
"""Unreadable records of a shard that the report shows."""

LENGTHS = [0, *(2**power for power in range(6, 26))]
"""Edges of the histogram of lengths, in bytes; what is longer counts in the last."""

KEPT, EXACT, NEAR = "kept", "exact copies", "near copies"
"""What becomes of documents that pass the rules."""

SCHEMA = {
    "id": pa.string(),
    "text": pa.large_string(),
    "source": pa.string(),
    "language": pa.string(),
    "confidence": pa.float64(),
    "characters": pa.int64(),
    "bytes": pa.int64(),
}


@dataclass(frozen=True)
class Collect(Step):
    """Reads, mends and measures; a task for each shard, which is a run of the corpus's parts."""

    corpus: Mapping[str, Source]
    shards: tuple[tuple[tuple[str, Part], ...], ...]
    """For each shard its parts, each with the name of its source."""
    repair: Repair
    language: LanguageId
    boilerplate: Boilerplate
    privacy: Privacy
    filters: Mapping[str, Filter]
    benchmarks: Benchmarks
    transforms: Mapping[str, Transform]

    @functools.cached_property
    def index(self) -> Index:
        """What the benchmarks ask."""
        return self.benchmarks.index()

    def work(self, task: int) -> Record:
        tally: dict[str, Counter[str]] = {}
        quarantine: list[dict[str, str]] = []
        rules = measured(self.filters)
        names = [column for rule, filter in rules.items() for column in columns(rule, filter)]
        names += [SHARED] if self.benchmarks.paths else []
        overlaps = Overlaps(HITS, HITS_OF_ONE)
        schema = pa.schema({**SCHEMA, **dict.fromkeys(names, pa.float64())})
        count = 0
        with (
            replacing(self.folder / f"{task:05}.parquet") as path,
            pq.ParquetWriter(path, schema, compression="zstd") as file,
        ):
            rows: list[dict[str, Any]] = []
            size = 0
            for name, part in self.shards[task]:
                for item in self.corpus[name].read(part):
                    if isinstance(item, Broken):
                        tally.setdefault(name, Counter())["unreadable"] += 1
                        quarantine += [asdict(item)] if len(quarantine) < QUARANTINE else []
                        continue
                    own = tally.setdefault(item.source, Counter())
                    row = self._row(item, own, rules, overlaps)
                    if row is None:
                        continue
                    count += 1
                    rows.append(row)
                    size += row["characters"]
                    if size >= GROUP or len(rows) >= ROWS:
                        file.write_table(pa.Table.from_pylist(rows, schema))
                        rows, size = [], 0
            if rows or not count:
                file.write_table(pa.Table.from_pylist(rows, schema))
        shared = {"hits": overlaps.hits, "benchmarks": overlaps.documents}
        return {"documents": count, "tally": tally, "quarantine": quarantine, **shared}

    def _row(
        self, document: Document, tally: Counter[str], rules: Mapping[str, Filter], overlaps: Overlaps
    ) -> dict[str, Any] | None:
        """A document mended and measured, or None where nothing of it is left."""
        tally["read"] += 1
        text = self.repair.apply(document.text)
        language, confidence = (document.language, 1.0) if document.language else self.language.identify(text)
        text, lines = self.boilerplate.apply(text, language)
        text, masked = self.privacy.apply(text, language)
        tally.update(
            {"boilerplate lines": lines, **{f"masked {kind}": times for kind, times in masked.items()}}
        )
        if not text:
            tally["empty"] += 1
            tally["empty bytes"] += len(document.text.encode(errors="replace"))
            return None
        document = replace(document, text=text, language=language)
        row = {
            "id": document.id,
            "source": document.source,
            "language": language,
            "confidence": confidence,
            "characters": len(text),
            "bytes": len(text.encode()),
        }
        for rule, filter in rules.items():
            if filter.applies(language):
                row |= zip(columns(rule, filter), filter.measure(document), strict=True)
        if self.benchmarks.paths:
            found = self.index.hits(text)
            row[SHARED] = max((hit.share for hit in found), default=0.0)
            overlaps.add(document.id, found)
        for transform in self.transforms.values():
            text = transform.apply(text, language)
        return row | {"text": text}


def measured(filters: Mapping[str, Filter]) -> dict[str, Filter]:
    """The filters whose scores are columns: of those that measure alike, for the same languages, the
    first."""
    found: dict[str, Filter] = {}
    kinds = set()
    for name, filter in filters.items():
        kind = identity(filter)
        if kind not in kinds:
            found[name] = filter
            kinds.add(kind)
    return found


def identity(filter: Filter) -> str:
    """What a filter's scores depend on."""
    own = filter.model_dump_json(include={*filter.measured_by, "applies_to"})
    return f"{type(filter).__name__} {own}"


def columns(name: str, filter: Filter) -> list[str]:
    """The columns of a filter's scores."""
    return [f"{name}.{column}" for column in filter.columns]


@dataclass(frozen=True)
class Select(Step):
    """Which rule removes each document, from the columns alone: 0 for none, else its place among the
    rules."""

    texts: Path
    filters: Mapping[str, Filter]
    threshold: float | None
    """The share of a benchmark's item that a document may have; None where no benchmark is looked for."""

    def work(self, task: int) -> Record:
        table = pq.read_table(self.texts / f"{task:05}.parquet", columns=self._columns())
        languages, sources, sizes = (
            table.column(name).to_pylist() for name in ("language", "source", "bytes")
        )
        removed = np.zeros(len(languages), dtype=np.uint8)
        for place, (name, filter) in enumerate(self.filters.items(), 1):
            scores = [table.column(column).to_pylist() for column in self._scores(name)]
            for row in np.flatnonzero(removed == 0):
                if filter.applies(languages[row]) and not filter.keep(*(column[row] for column in scores)):
                    removed[row] = place
        if self.threshold is not None:
            shares = table.column(SHARED).to_numpy()
            removed[(removed == 0) & (shares >= self.threshold)] = len(self.filters) + 1
        with replacing(self.folder / f"{task:05}.npy") as path, path.open("wb") as file:
            np.save(file, removed, allow_pickle=False)
        tally: dict[str, dict[int, list[int]]] = {}
        for source, size, rule in zip(sources, sizes, removed.tolist(), strict=True):
            count = tally.setdefault(source, {}).setdefault(rule, [0, 0])
            count[0] += 1
            count[1] += size
        return {"tally": tally}

    def _columns(self) -> list[str]:
        scores = [column for name in self.filters for column in self._scores(name)]
        shared = [] if self.threshold is None else [SHARED]
        return ["language", "source", "bytes", *dict.fromkeys(scores), *shared]

    def _scores(self, name: str) -> list[str]:
        alike = identity(self.filters[name])
        first = next(other for other, filter in self.filters.items() if identity(filter) == alike)
        return columns(first, self.filters[first])


@dataclass(frozen=True)
class Write(Step):
    """The documents that stay, as text shards; and what there is to tell of those that do not."""

    corpus: Corpus
    found: Found
    rules: tuple[str, ...]
    """The names of the filters."""

    def work(self, task: int) -> Record:
        record: Record = {KEPT: {}, EXACT: {}, NEAR: {}, "examples": {}, "lengths": {}}
        exact, near = self.found.of(self.corpus, task)
        first = int(self.corpus.offsets[self.corpus.before + task])
        copies = {
            kind: dict(zip((pairs[0] - np.uint64(first)).tolist(), pairs[1].tolist(), strict=True))
            for kind, pairs in ((EXACT, exact), (NEAR, near))
        }
        removed = np.load(self.corpus.own.of(task)[2], allow_pickle=False)
        path = self.folder / f"text-{task:05}.jsonl.zst"
        write_shard(path, self._staying(task, removed.tolist(), copies, record))
        gone = removed.copy()
        gone[[row for pairs in copies.values() for row in pairs]] = 1
        with replacing(self.folder / f"{task:05}.npy") as marks, marks.open("wb") as file:
            np.save(file, gone, allow_pickle=False)
        return record

    def _staying(
        self, task: int, removed: list[int], copies: dict[str, dict[int, int]], record: Record
    ) -> Iterator[Document]:
        file = pq.ParquetFile(self.corpus.own.of(task)[0])
        row = -1
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=["id", "text", "source", "language", "bytes"])
            for entry in table.to_pylist():
                row += 1
                size = entry.pop("bytes")
                document = Document(**entry)
                why = next((kind for kind, pairs in copies.items() if row in pairs), KEPT)
                if removed[row]:
                    why = self.rules[removed[row] - 1]
                if why != KEPT:
                    examples = record["examples"].setdefault(why, [])
                    if len(examples) < EXAMPLES:
                        examples.append([document.id, document.text[:80], copies.get(why, {}).get(row)])
                if removed[row]:
                    continue
                count = record[why].setdefault(document.source, {}).setdefault(document.language, [0, 0])
                count[0] += 1
                count[1] += size
                if why == KEPT:
                    lengths = record["lengths"].setdefault(document.language, [0] * (len(LENGTHS) - 1))
                    lengths[min(int(np.searchsorted(LENGTHS, size, side="right")), len(lengths)) - 1] += 1
                    yield document
