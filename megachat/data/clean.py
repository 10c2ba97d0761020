"""STAGE clean: from sources to text shards in which every document is worth reading, and is there once.

Each document is normalised, filtered and sketched on its own, by several processes, and then put on disk;
only its sketch stays in memory, half a kilobyte. The second pass knows all sketches, and copies what is no
duplicate. Which documents come out depends on nothing but the sources and the settings: not on the number of
processes.
"""

import multiprocessing
import os
import tempfile
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from megachat.data.dedup import SCHEME, Dedup, Indices, digest, exact_copies
from megachat.data.document import Document, read_documents, write_documents
from megachat.data.filters import Filter, language_of, normalise
from megachat.data.sources import Source
from megachat.files import write_json
from megachat.log import say, track
from megachat.run import Stage

BATCH = 1_000_000
"""Characters given to a process at a time. A corpus no larger is cleaned without other processes."""

EXAMPLES = 5
"""Removed documents of each kind that the report shows."""


@dataclass(slots=True)
class Row:
    """One line of the table of what was removed, and why."""

    step: str
    reason: str
    documents_in: int = 0
    documents_removed: int = 0
    bytes_removed: int = 0
    examples: list[str] = field(default_factory=list)

    def count(self, size: int, removed: bool, example: str) -> None:
        """Takes note of one document that came to this step."""
        self.documents_in += 1
        if removed:
            self.documents_removed += 1
            self.bytes_removed += size
            if len(self.examples) < EXAMPLES:
                self.examples.append(example)


@dataclass(frozen=True, slots=True)
class Examined:
    """A document, and what can be said of it without knowing the others."""

    document: Document
    size: int
    """Bytes of UTF-8."""
    passed: int
    """How many of the steps it passed; the next one removes it."""
    digest: bytes = b""
    signature: bytes = b""
    """Its MinHash; empty for a document removed, or too short to have one."""


class Clean(Stage):
    """Collects, cleans and deduplicates text."""

    name: ClassVar[str] = "clean"
    neutral: ClassVar[tuple[str, ...]] = ("processes",)

    corpus: dict[str, Source]
    """Where the text comes from; of two copies the one from the earlier source stays."""
    filters: dict[str, Filter]
    """The rules a document must pass, in this order."""
    dedup: Dedup
    """Which documents count as copies."""
    processes: NonNegativeInt
    """How many clean at once; 0: one per CPU core. It does not change the result."""
    documents_per_shard: PositiveInt
    """Documents in one file of the result."""

    def execute(self) -> None:
        """Writes `text-*.jsonl.zst` and, as `report.json`, what was removed and why."""
        rows = [Row("normalise", "empty, or nothing but control characters")]
        rows += [Row(name, rule.reason) for name, rule in self.filters.items()]
        exact = Row("exact copies", "the same text as an earlier document, but for blanks and letter case")
        near = Row("near copies", f"{self.dedup.threshold:.0%} or more of the MinHash of an earlier document")
        kept = Counter[tuple[str, ...]]()
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="filtered.", suffix=".tmp", dir=self.folder) as temporary:
            sketches = Sketches(self.dedup)
            # Closed here and now: the thread that collects garbage may be one that the pool waits for.
            with closing(self._filtered(rows, sketches)) as filtered:
                write_documents(Path(temporary), filtered, self.documents_per_shard)
            distinct = deduplicated(read_documents(Path(temporary)), sketches, exact, near, kept)
            write_documents(self.folder, distinct, self.documents_per_shard)
        rows += [exact, near] if self.dedup.near else [exact]
        write_json(self.folder / "report.json", report(rows, kept) | {"minhash": SCHEME})
        say(table(rows))

    def _filtered(self, rows: list[Row], sketches: "Sketches") -> Generator[Document, None, None]:
        """The documents that pass all filters, sketched; the others are counted in `rows`."""
        for examined in track(self._examined(), "clean", unit="doc"):
            document = examined.document
            example = f"{document.id}: {document.text[:80]!r}"
            for step, row in enumerate(rows[: examined.passed + 1]):
                row.count(examined.size, removed=step == examined.passed, example=example)
            if examined.passed == len(rows):
                sketches.add(examined)
                yield document
        if not rows[0].documents_in:
            raise ValueError("corpus: it names no source; choose one, as in corpus=python_library")
        if not sketches.digests:
            raise ValueError(f"no document is left; loosen the filter that removed the most\n{table(rows)}")

    def _examined(self) -> Iterator[Examined]:
        """Every document of the corpus in its order; processes work ahead, two batches each."""
        filters = list(self.filters.values())
        batches = batched(self._documents())
        head = list(islice(batches, 2))
        processes = self.processes or cores()
        if processes == 1 or len(head) < 2:
            for batch in chain(head, batches):
                yield from examine(batch, filters, self.dedup)
            return
        waiting: deque[Future[list[Examined]]] = deque()
        # spawn: the fork of a process with threads (NumPy's, the progress bar's) can hang.
        pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
        try:
            for batch in chain(head, batches):
                waiting.append(pool.submit(examine, batch, filters, self.dedup))
                if len(waiting) > 2 * processes:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BrokenProcessPool:
            raise ValueError(f"a process died, out of memory perhaps; set less than {processes=}") from None
        finally:
            pool.shutdown(cancel_futures=True)

    def _documents(self) -> Iterator[Document]:
        for name, source in self.corpus.items():
            empty = True
            for document in source.documents():
                empty = False
                yield document
            if empty:
                raise ValueError(f"corpus.{name}: holds no document; leave it out or mend its settings")


def cores() -> int:
    """The CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def batched(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """The documents in lists of about `BATCH` characters."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def examine(documents: list[Document], filters: list[Filter], dedup: Dedup) -> list[Examined]:
    """Normalises, filters and sketches; the work of one process."""
    return [_examine(document, filters, dedup) for document in documents]


def _examine(document: Document, filters: list[Filter], dedup: Dedup) -> Examined:
    raw = len(document.text.encode(errors="replace"))
    text = normalise(document.text)
    if not text:
        return Examined(document, raw, passed=0)
    document = replace(document, text=text, language=document.language or language_of(text))
    size = len(text.encode())
    for passed, rule in enumerate(filters, 1):
        if document.language in rule.applies_to and not rule.keep(document):
            return Examined(document, size, passed)
    signature = dedup.signature(text) if dedup.near else None
    return Examined(
        document, size, len(filters) + 1, digest(text), b"" if signature is None else signature.tobytes()
    )


class Sketches:
    """Digest and signature of every filtered document, in order: what finds the copies."""

    def __init__(self, dedup: Dedup) -> None:
        self.dedup = dedup
        self.digests: list[bytes] = []
        self.signed: list[int] = []
        """The numbers of the documents that have a signature."""
        self.signatures = bytearray()

    def add(self, examined: Examined) -> None:
        """Appends the next document."""
        if examined.signature:
            self.signed.append(len(self.digests))
            self.signatures += examined.signature
        self.digests.append(examined.digest)

    def copies(self) -> tuple[Indices, Indices]:
        """For each document the one that stays in its stead: by exact copies, and by near ones of the
        rest."""
        exact = exact_copies(self.digests)
        near = np.arange(len(exact))
        signed = np.array(self.signed, dtype=np.int64)
        rows = np.frombuffer(self.signatures, dtype=np.uint32).reshape(len(signed), self.dedup.permutations)
        once = exact[signed] == signed
        signed = signed[once]
        near[signed] = signed[self.dedup.near_copies(rows[once])]
        return exact, near


def deduplicated(
    documents: Iterable[Document], sketches: Sketches, exact: Row, near: Row, kept: Counter[tuple[str, ...]]
) -> Iterator[Document]:
    """The documents that are no copies; the others are counted in the rows, these in `kept`."""
    exact_of, near_of = sketches.copies()
    originals = {*exact_of[exact_of != np.arange(len(exact_of))].tolist()}
    originals |= {*near_of[near_of != np.arange(len(near_of))].tolist()}
    names: dict[int, str] = {}  # of documents that have copies
    for number, document in enumerate(documents):
        size = len(document.text.encode())
        if number in originals:
            names[number] = document.id
        of = int(exact_of[number])
        exact.count(size, of != number, f"{document.id} = {names.get(of)}")
        if of == number:
            of = int(near_of[number])
            near.count(size, of != number, f"{document.id} ~ {names.get(of)}")
        if of == number:
            for group in ("languages", document.language), ("sources", document.source):
                kept[*group, "documents"] += 1
                kept[*group, "bytes"] += size
            yield document


def report(rows: list[Row], kept: Counter[tuple[str, ...]]) -> dict[str, Any]:
    """What `report.json` says."""
    tree: dict[str, Any] = {"rows": [asdict(row) for row in rows], "languages": {}, "sources": {}}
    for (group, name, unit), count in sorted(kept.items()):
        tree[group].setdefault(name, {})[unit] = count
    for unit in ("documents", "bytes"):
        tree[unit] = sum(language[unit] for language in tree["languages"].values())
    return tree


def table(rows: list[Row]) -> str:
    """The removals as text."""
    lines = [f"{'step':<15}{'documents in':>14}{'removed':>10}{'MB removed':>12}   because"]
    for row in rows:
        counts = f"{row.documents_in:>14,}{row.documents_removed:>10,}{row.bytes_removed / 1e6:>12.3f}"
        lines.append(f"{row.step:<15}{counts}   {row.reason}")
    return "\n".join(lines)
