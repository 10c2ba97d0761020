"""Finds what benchmarks ask in what a model learns from: runs of 13 words that both have.

As GPT-3 does (Brown et al., 2020, https://arxiv.org/abs/2005.14165, appendix C): lower case, no punctuation,
13 words, fewer for items that have no more. In Chinese a run has 20 characters: 12 words or so.
GPT-3 removed what is around a hit, and found that most hits are quotations that both have from a third; here
a document goes if it has a large share of one item's runs, and what it shares with so many items that it must
be their template is not looked for at all. What a record has under each key is an item of its own: a question
has leaked whether or not its choices stand beside it as the benchmark has them, or its answer does.

The index holds twelve bytes for each run of the benchmarks, whatever is searched. Hashes have 64 bits: in a
search of 10^12 runs for 10^7, chance finds half a run, which is no large share of anything.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from megachat.config import Config
from megachat.data.document import matching, open_bytes, read_lines
from megachat.data.words import UNSPACED
from megachat.log import say

Hashes = NDArray[np.uint64]

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_ascii_token = re.compile(r"[a-z0-9]+")
_token = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")
_unspaced = re.compile(f"[{UNSPACED}]")
_BLOCK = 1 << 16
"""Tokens looked up at a time, which bounds the memory for a document of any length."""


@dataclass(frozen=True, slots=True)
class Hit:
    """What a document has in common with one item of a benchmark."""

    benchmark: str
    item: str
    """Its file, its line, and its key there."""
    share: float
    """The share of the item's different runs that the document has."""
    text: str
    """The first of them, in lower case and without punctuation."""


class Benchmarks(Config):
    """What must not be learnt from."""

    paths: list[str]
    """Patterns of .jsonl, .parquet or text files (.gz and .zst, too), one item on a line or in a row."""
    keys: list[str]
    """Where text is in a record of JSON or Parquet. Under each of these that it has is an item of its own."""
    words: PositiveInt
    """Words in a run."""
    characters: PositiveInt
    """Characters in a run where there are no blanks between words."""
    shortest: PositiveInt
    """Words, or twice that many characters, that an item must have to be looked for; GPT-3 wants 8."""
    shared: PositiveInt
    """A run of more items than this is their template, and is not looked for."""
    threshold: Annotated[float, Field(gt=0, le=1)]
    """A document with this share of an item's runs is removed."""

    def index(self) -> "Index":
        """All items, ready to be looked for."""
        items: list[tuple[str, str]] = []
        hashes, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int32)]
        sizes = set[int]()
        records, skipped = Counter[str](), Counter[str]()
        for benchmark, record, texts in self._records():
            before = len(items)
            for key, text in texts.items():
                words = list(tokens(text))
                unspaced = 2 * sum(map(bool, map(_unspaced.match, words))) > len(words)
                longest, shortest = (
                    (self.characters, 2 * self.shortest) if unspaced else (self.words, self.shortest)
                )
                if len(words) < shortest:
                    continue
                ((size, found),) = runs(hashed(words), [min(longest, len(words))])
                hashes.append(np.unique(found))
                owners.append(np.full(len(hashes[-1]), len(items), np.int32))
                items.append((benchmark, f"{record} {key}".rstrip()))
                sizes.add(size)
            records[benchmark] += 1
            skipped[benchmark] += len(items) == before
        for benchmark in +skipped:
            say(
                f"benchmarks: {skipped[benchmark]:,} of {records[benchmark]:,} records of {benchmark} are "
                f"not looked for: nothing in them has {self.shortest} words; benchmarks.shortest may be lower"
            )
        return Index(
            np.concatenate(hashes), np.concatenate(owners), items, sorted(sizes), skipped, self.shared
        )

    def contaminated(self, hits: Iterable[Hit]) -> bool:
        """Whether a document with these hits is to be removed."""
        return any(hit.share >= self.threshold for hit in hits)

    def _records(self) -> Iterator[tuple[str, str, dict[str, str]]]:
        """Name of the benchmark, name of the record, and the text under each of its keys."""
        for pattern in self.paths:
            found = matching(pattern, "*.jsonl")
            if not found:
                raise ValueError(
                    f"no file matches {pattern!r} (from {Path.cwd()}); mend `paths` of the benchmarks"
                )
            for path in found:
                # Not the suffix alone: gsm8k/test.jsonl and mmlu/test.jsonl are two benchmarks.
                name = f"{path.absolute().parent.name}/{path.name}"
                for number, texts in self._texts(path):
                    if any(map(str.strip, texts.values())):
                        yield name.partition(".")[0], f"{name}:{number}", texts

    def _texts(self, path: Path) -> Iterator[tuple[int, dict[str, str]]]:
        suffixes = {*path.suffixes}
        if ".parquet" in suffixes:
            yield from self._rows(path)
            return
        for number, line in read_lines(path):
            if not suffixes & {".jsonl", ".json", ".ndjson"} or not line.strip():
                yield number, {"": line}
                continue
            try:
                record = json.loads(line)
            except ValueError as why:
                raise ValueError(f"{path}:{number}: not JSON ({why}); mend the line or delete it") from None
            if not isinstance(record, dict):
                raise ValueError(f"{path}:{number}: no JSON object but {line[:40]!r}; mend or delete it")
            yield number, self._under_keys(path, number, record)

    def _rows(self, path: Path) -> Iterator[tuple[int, dict[str, str]]]:
        import pyarrow
        import pyarrow.parquet

        number = 0
        try:
            with open_bytes(path) as file:
                packed = path.suffix in (".gz", ".zst")
                table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(file.read()) if packed else file)
                keys = [key for key in self.keys if key in table.schema_arrow.names]
                if not keys:
                    self._under_keys(path, 1, dict.fromkeys(table.schema_arrow.names))
                for batch in table.iter_batches(batch_size=1024, columns=keys):
                    for record in batch.to_pylist():
                        number += 1
                        yield number, self._under_keys(path, number, record)
        except (pyarrow.ArrowException, OSError) as why:
            raise ValueError(f"{path}:{number + 1}: cannot be read ({why}); fetch the file again") from None

    def _under_keys(self, path: Path, number: int, record: Mapping[str, Any]) -> dict[str, str]:
        texts = {key: "\n".join(_strings(record[key])) for key in self.keys if key in record}
        if not any(texts.values()):
            raise ValueError(
                f"{path}:{number}: no text under {', '.join(self.keys)}, only {', '.join(record)}; "
                "set benchmarks.keys"
            )
        return texts


def _strings(value: Any) -> Iterator[str]:
    """All text in a value: the choices of a question are often a list, or a list under a key."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)


def tokens(text: str) -> Iterator[str]:
    """The words of a text in lower case, without punctuation; characters where no blanks part words."""
    text = text.lower()
    return (found[0] for found in (_ascii_token if text.isascii() else _token).finditer(text))


class _TokenHashes(dict[str, int]):
    """64-bit hashes of tokens, remembered; forgotten when there are too many."""

    def __missing__(self, token: str) -> int:
        if len(self) >= 1_000_000:
            self.clear()
        self[token] = int.from_bytes(hashlib.blake2b(token.encode(), digest_size=8).digest(), "little")
        return self[token]


_hashes = _TokenHashes()


def hashed(words: list[str]) -> Hashes:
    """The hash of each token; the same in every process and run."""
    return np.fromiter(map(_hashes.__getitem__, words), np.uint64, len(words))


def runs(hashes: Hashes, sizes: Iterable[int]) -> Iterator[tuple[int, Hashes]]:
    """For each size, which must increase, a hash of each run of so many tokens, in order."""
    mixed, done = np.zeros(len(hashes), np.uint64), 0
    for size in sizes:
        count = max(0, len(hashes) - size + 1)
        mixed = mixed[:count]
        for offset in range(done, size):
            # A polynomial in an odd number, modulo 2^64: the order of the tokens counts.
            mixed = mixed * _MULTIPLIER + hashes[offset : offset + count]
        done = size
        yield size, mixed


class Index:
    """The runs of all items, sorted by their hash."""

    def __init__(
        self,
        hashes: Hashes,
        owners: NDArray[np.int32],
        items: list[tuple[str, str]],
        sizes: list[int],
        skipped: Counter[str],
        shared: int,
    ) -> None:
        self.items = items
        """Benchmark and name of each item."""
        self.sizes = sizes
        """How long the runs are, the shortest first."""
        self.skipped = skipped
        """How many records of each benchmark have nothing that is long enough to be looked for."""
        _, numbers, counts = np.unique(hashes, return_inverse=True, return_counts=True)
        own = counts[numbers] <= shared
        order = np.argsort(hashes[own], kind="stable")
        self.hashes = hashes[own][order]
        self.owners = owners[own][order]
        """The item of each run."""
        self.totals = np.bincount(self.owners, minlength=len(items))
        """How many runs each item has."""
        bits = max(10, (16 * len(self.hashes)).bit_length())
        self.shift = np.uint64(64 - bits)
        # Most runs are in no benchmark: one look at a table of their first bits says so for 15 of 16.
        self.occupied = np.zeros(1 << bits, bool)
        self.occupied[self.hashes >> self.shift] = True

    def hits(self, text: str) -> list[Hit]:
        """What a text has in common with each item that it shares a run with, the largest share first."""
        if not len(self.hashes):
            return []
        entries: list[NDArray[np.int64]] = []
        quotes: dict[int, str] = {}
        stream, words = tokens(text), list[str]()
        while block := list(islice(stream, _BLOCK)):
            words = [*words[-self.sizes[-1] + 1 :], *block] if words and self.sizes[-1] > 1 else block
            for size, hashes in runs(hashed(words), self.sizes):
                places = np.flatnonzero(self.occupied[hashes >> self.shift])
                left = np.searchsorted(self.hashes, hashes[places], "left")
                right = np.searchsorted(self.hashes, hashes[places], "right")
                there = left < right
                rows = (places[there].tolist(), left[there].tolist(), right[there].tolist())
                for place, first, end in zip(*rows, strict=True):
                    for owner in self.owners[first:end].tolist():
                        quotes.setdefault(owner, " ".join(words[place : place + size]))
                    entries.append(np.arange(first, end))
        if not entries:
            return []
        found = np.bincount(self.owners[np.unique(np.concatenate(entries))])
        hits = [
            Hit(*self.items[owner], float(found[owner] / self.totals[owner]), quotes[owner])
            for owner in np.flatnonzero(found).tolist()
        ]
        return sorted(hits, key=lambda hit: (-hit.share, hit.benchmark, hit.item))


class Overlaps:
    """What the documents of a shard share with benchmarks: the largest shares, and how many documents do."""

    def __init__(self, most: int, each: int) -> None:
        self.most, self.each = most, each
        """Hits that are kept of all documents, and of one."""
        self.documents = Counter[str]()
        """For each benchmark the documents that share a run with it."""
        self._hits: list[dict[str, Any]] = []

    def add(self, document: str, hits: Sequence[Hit]) -> None:
        """The hits of a document, the largest share first."""
        self.documents.update({hit.benchmark for hit in hits})
        self._hits += [
            {"benchmark": hit.benchmark, "item": hit.item, "share": round(hit.share, 3)}
            | {"document": document, "ngram": hit.text}
            for hit in hits[: self.each]
        ]
        if len(self._hits) > 10 * self.most:
            self._hits = self.hits

    @property
    def hits(self) -> list[dict[str, Any]]:
        """The hits with the largest shares; of equal ones those that came first."""
        return largest(self._hits, self.most)


def largest(hits: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """The hits with the largest shares; of equal ones those that came first."""
    return sorted(hits, key=lambda hit: -float(hit["share"]))[:most]
