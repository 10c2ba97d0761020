"""What became of the documents of a corpus: the tables of the report, from the records of the steps."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from megachat.data.collect import EXACT, EXAMPLES, LENGTHS, NEAR, QUARANTINE
from megachat.data.copies import CLUSTERS, Corpus, Found
from megachat.data.index import agreement
from megachat.data.steps import Record

SAMPLES = 3
"""Documents of a cluster that the report shows."""

BEGINNING = 300
"""Characters of them."""


@dataclass(slots=True)
class Row:
    """One line of the table of what was removed, and why."""

    step: str
    reason: str
    documents_in: int = 0
    documents_removed: int = 0
    bytes_removed: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Funnel:
    """The documents that come to each step, and those that go there, by source."""

    reasons: Mapping[str, str]
    """The steps in order, and why documents go there."""
    entering: Mapping[str, int]
    """Documents of each source."""
    leaving: Mapping[str, Mapping[str, tuple[int, int]]]
    """For each step and source the documents that go, and their bytes."""

    @staticmethod
    def of(
        reasons: Mapping[str, str],
        collect: Sequence[Record],
        select: Sequence[Record],
        write: Sequence[Record],
    ) -> "Funnel":
        """From the records of three steps. `reasons` begins with what `collect` drops and ends with
        copies."""
        steps = [*reasons]
        entering: Counter[str] = Counter()
        leaving: dict[str, dict[str, tuple[int, int]]] = {step: {} for step in [*steps, NEAR]}

        def leave(step: str, source: str, documents: int, size: int) -> None:
            before = leaving[step].get(source, (0, 0))
            leaving[step][source] = before[0] + documents, before[1] + size

        for record in collect:
            for source, tally in record["tally"].items():
                entering[source] += tally.get("read", 0)
                leave(steps[0], source, tally.get("empty", 0), tally.get("empty bytes", 0))
        for record in select:
            for source, places in record["tally"].items():
                for place, (documents, size) in places.items():
                    if int(place):
                        leave(steps[int(place)], source, documents, size)
        for record in write:
            for step in (EXACT, NEAR):
                for source, languages in record[step].items():
                    for documents, size in languages.values():
                        leave(step, source, documents, size)
        return Funnel(reasons, +entering, leaving)

    def by_source(self) -> Iterator[tuple[str, Row]]:
        """Each source's way through the steps."""
        for source, documents in self.entering.items():
            for step, reason in self.reasons.items():
                removed, size = self.leaving[step].get(source, (0, 0))
                yield source, Row(step, reason, documents, removed, size)
                documents -= removed

    def rows(self, examples: Mapping[str, list[str]]) -> list[Row]:
        """All sources together."""
        rows = {
            step: Row(step, reason, examples=examples.get(step, [])) for step, reason in self.reasons.items()
        }
        for _, row in self.by_source():
            total = rows[row.step]
            total.documents_in += row.documents_in
            total.documents_removed += row.documents_removed
            total.bytes_removed += row.bytes_removed
        return [*rows.values()]


def removed_examples(write: Sequence[Record], corpus: Corpus) -> dict[str, list[str]]:
    """Some documents that went, for each step; copies with the one that stays."""
    found: dict[str, list[str]] = {}
    for record in write:
        for step, examples in record["examples"].items():
            for name, text, of in examples:
                own = found.setdefault(step, [])
                if len(own) < EXAMPLES:
                    stays = "" if of is None else f" ~ {document(corpus, of)['id']}"
                    own.append(f"{name}{stays}: {text!r}")
    return found


def kept(write: Sequence[Record]) -> dict[str, Any]:
    """How much stays, by language and by source."""
    groups: dict[str, dict[str, dict[str, int]]] = {"languages": {}, "sources": {}}
    for record in write:
        for source, languages in record["kept"].items():
            for language, counts in languages.items():
                for group, name in (("languages", language), ("sources", source)):
                    own = groups[group].setdefault(name, {"documents": 0, "bytes": 0})
                    for unit, count in zip(("documents", "bytes"), counts, strict=True):
                        own[unit] += count
    ordered = {group: dict(sorted(names.items())) for group, names in groups.items()}
    totals = {
        unit: sum(own[unit] for own in ordered["languages"].values()) for unit in ("documents", "bytes")
    }
    return ordered | totals


def lengths(write: Sequence[Record]) -> dict[str, Any]:
    """A histogram of bytes for each language."""
    total: dict[str, Any] = {}
    for record in write:
        for language, counts in record["lengths"].items():
            total[language] = np.array(counts) + total.get(language, 0)
    return {name: {"edges": LENGTHS, "counts": total[name].tolist()} for name in sorted(total)}


def clusters(settle: Sequence[Record], found: Found, corpus: Corpus) -> list[dict[str, Any]]:
    """The largest groups of near copies: how many, what stays, and some that go."""
    largest = sorted(
        (pair for record in settle for pair in record["clusters"]), key=lambda pair: (-pair[1], pair[0])
    )
    shown = []
    for head, copies in largest[:CLUSTERS]:
        members = found.copies_of(head, SAMPLES)
        alike = agreement(corpus.sketches(np.full_like(members, head)), corpus.sketches(members))
        samples = [
            document(corpus, int(member)) | {"agreement": round(float(share), 3)}
            for member, share in zip(members, alike, strict=True)
        ]
        shown.append({"size": copies + 1, "kept": document(corpus, head), "samples": samples})
    return shown


def quarantine(collect: Sequence[Record]) -> dict[str, Any]:
    """What could not be read."""
    count = sum(tally.get("unreadable", 0) for record in collect for tally in record["tally"].values())
    first = [broken for record in collect for broken in record["quarantine"]]
    return {"count": count, "first": first[:QUARANTINE]}


def document(corpus: Corpus, number: int) -> dict[str, str]:
    """The id of a document, its source, and how it begins."""
    shard = int(np.searchsorted(corpus.offsets, np.uint64(number), side="right")) - 1
    row = number - int(corpus.offsets[shard])
    file = pq.ParquetFile(corpus.shards[shard][0])
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        if row < size:
            table = file.read_row_group(group, columns=["id", "source", "text"]).slice(row, 1).to_pylist()
            return {name: value[:BEGINNING] for name, value in table[0].items()}
        row -= size
    raise AssertionError(f"document {number} of {len(corpus)}")


def table(rows: Sequence[Row]) -> str:
    """The removals as text."""
    lines = [f"{'step':<17}{'documents in':>14}{'removed':>10}{'MB removed':>12}   because"]
    for row in rows:
        counts = f"{row.documents_in:>14,}{row.documents_removed:>10,}{row.bytes_removed / 1e6:>12.3f}"
        lines.append(f"{row.step:<17}{counts}   {row.reason}")
    return "\n".join(lines)


def as_records(funnel: Funnel) -> list[dict[str, Any]]:
    """Each source's way through the steps, for the report."""
    return [
        {
            "source": source,
            **{key: value for key, value in asdict(row).items() if key not in ("reason", "examples")},
        }
        for source, row in funnel.by_source()
    ]
