"""Finds what benchmarks ask in what a model learns from: runs of 13 words that both have.

As GPT-3 does (Brown et al., 2020, https://arxiv.org/abs/2005.14165, appendix C): lower case, no punctuation,
13 words, fewer for items that have no more. In Chinese a run is of 20 characters, for a word has 1.6 there.
GPT-3 removed what is around a hit, and found that most hits are quotations that both have from a third; here
a document goes if it has a large share of one item's runs, and what it shares with so many items that it must
be their template is not looked for at all.

The index holds twelve bytes for each run of the benchmarks, whatever is searched. Hashes have 64 bits: in a
search of 10^12 runs for 10^7, chance finds half a run, which is no large share of anything.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from megachat.config import Config
from megachat.data.document import matching, open_bytes, read_lines
from megachat.data.words import UNSPACED

Hashes = NDArray[np.uint64]

_MULTIPLIER = 0x9E3779B97F4A7C15
"""Odd, so that it has an inverse modulo 2^64."""

_ascii_token = re.compile(r"[a-z0-9]+")
_token = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")
_unspaced = re.compile(f"[{UNSPACED}]")
_CHUNK = 1 << 16
"""Runs looked up at a time, which bounds the memory of a document of any length."""


@dataclass(frozen=True, slots=True)
class Hit:
    """What a document has in common with one item of a benchmark."""

    benchmark: str
    item: str
    """Its file and line."""
    share: float
    """The share of the item's different runs that the document has."""
    text: str
    """The first of them, in lower case and without punctuation."""


class Benchmarks(Config):
    """What must not be learnt from."""

    paths: list[str]
    """Patterns of .jsonl, .parquet (.gz and .zst, too) or text files, one item on a line or in a row; the name
    of the file is that of the benchmark."""
    keys: list[str]
    """Where an item's text is, in JSON and Parquet: those of them that it has, joined in this order."""
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
        builder = _Builder(self)
        for benchmark, item, text in self._items():
            builder.add(benchmark, item, text)
        return builder.index()

    def contaminated(self, hits: Iterable[Hit]) -> bool:
        """Whether a document with these hits is to be removed."""
        return any(hit.share >= self.threshold for hit in hits)

    def _items(self) -> Iterator[tuple[str, str, str]]:
        """Name of the benchmark, name of the item, and its text."""
        for pattern in self.paths:
            found = matching(pattern, "*.jsonl")
            if not found:
                raise ValueError(
                    f"no file matches {pattern!r} (from {Path.cwd()}); mend `paths` of the benchmarks"
                )
            for path in found:
                # Not the suffix alone: gsm8k/test.jsonl and mmlu/test.jsonl are two benchmarks.
                name = f"{path.absolute().parent.name}/{path.name}"
                for number, text in self._texts(path):
                    if text.strip():
                        yield name.partition(".")[0], f"{name}:{number}", text

    def _texts(self, path: Path) -> Iterator[tuple[int, str]]:
        suffixes = {*path.suffixes}
        if ".parquet" in suffixes:
            yield from self._rows(path)
            return
        for number, line in read_lines(path):
            if not suffixes & {".jsonl", ".json", ".ndjson"} or not line.strip():
                yield number, line
                continue
            try:
                record = json.loads(line)
            except ValueError as why:
                raise ValueError(f"{path}:{number}: not JSON ({why}); mend the line or delete it") from None
            if not isinstance(record, dict):
                raise ValueError(
                    f"{path}:{number}: {line[:40]!r} is no JSON object; mend the line or delete it"
                )
            yield number, self._joined(path, number, record)

    def _rows(self, path: Path) -> Iterator[tuple[int, str]]:
        import pyarrow
        import pyarrow.parquet

        number = 0
        try:
            with open_bytes(path) as file:
                packed = path.suffix in (".gz", ".zst")
                table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(file.read()) if packed else file)
                keys = [key for key in self.keys if key in table.schema_arrow.names]
                if not keys:
                    self._joined(path, 1, dict.fromkeys(table.schema_arrow.names))
                for batch in table.iter_batches(batch_size=1024, columns=keys):
                    for number, record in enumerate(batch.to_pylist(), number + 1):
                        yield number, self._joined(path, number, record)
        except (pyarrow.ArrowException, OSError) as why:
            raise ValueError(f"{path}:{number + 1}: cannot be read ({why}); fetch the file again") from None

    def _joined(self, path: Path, number: int, record: Mapping[str, Any]) -> str:
        texts = [text for key in self.keys if key in record for text in _strings(record[key])]
        if not texts:
            raise ValueError(
                f"{path}:{number}: no text under {', '.join(self.keys)}; it has {', '.join(record)}: set `keys` "
                "of the benchmarks"
            )
        return "\n".join(texts)


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


def tokens(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation; single characters where no blanks part words."""
    text = text.lower()
    found: list[str] = (_ascii_token if text.isascii() else _token).findall(text)
    return found


def runs(hashes: Hashes, size: int) -> Hashes:
    """A hash for each run of `size` tokens, from the tokens' hashes."""
    count = len(hashes) - size + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    # Horner's rule for all places at once, by doubling: the hash of 2n tokens comes from two hashes of n.
    whole, done = np.zeros(len(hashes) + 1, np.uint64), 0
    power, width, factor = hashes, 1, _MULTIPLIER
    rest = size
    while rest:
        if rest & 1:
            whole = whole[: len(hashes) - done - width + 1] * np.uint64(factor) + power[done:]
            done += width
        rest >>= 1
        if rest:
            power = power[:-width] * np.uint64(factor) + power[width:]
            factor = factor * factor % 2**64
            width *= 2
    return whole[:count] ^ (whole[:count] >> np.uint64(29))


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
