"""A corpus of any size that nobody has to download: English and Chinese text, a fifth of it near-duplicates.

    python tools/bench/make_text.py --gb 1 --out runs/text

Sentences are words drawn by Zipf's law from made-up vocabularies, documents as long as those of the web (3.5
kB in the mean, most shorter). `_truth.jsonl` names for every copy its original, what was done to it, and
their true Jaccard similarity: of runs of five words, or of eight Chinese characters.

The same seed gives the same bytes on every machine: all is drawn from the raw bits of a PCG64, which NumPy
promises never to change, with integers alone.
"""

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import NormalDist
from typing import IO

import numpy as np
import zstandard
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # of a script, only its own folder is there

from megachat.files import replacing
from tools.bench.planted import CHARACTERS, KINDS, RATES, WORDS

Ids = NDArray[np.int64]
Bits = NDArray[np.uint64]

FILES = 16
VOCABULARY = 20_000
BLOCK = 500
"""Documents of a language made at a time."""
POOL = 2000
"""Documents of a language that can still be copied; a new one takes the place of any."""
SHORTEST = 50
"""Words that a document needs to be copied."""
LENGTHS = [round(2000 * math.exp(1.05 * NormalDist().inv_cdf((i + 0.5) / 1024))) for i in range(1024)]
"""Quantiles of the length of documents in bytes."""

# A piece is a word with what follows it, as it stands in JSON; the second six begin a sentence.
ENDINGS = {
    "en": (" ", ", ", ". ", "? ", ".\\n\\n", "."),
    "zh": ("", "，", "。", "？", "。\\n\\n", "。"),
}
PLAIN, COMMA, STOP, QUESTION, PARAGRAPH, LAST, CAPITAL = range(7)
FORMS = 12

FREQUENT = {
    "en": "the of and to in a is that for it as was with be by on not he this are or his from at which but "
    "have an had they you were there one all we can her has been if more when will would who so no "
    "out up into them about than its time only could new some these two may then do first any my now "
    "such like our over most even after also did many before must through back years where much your "
    "way down should because long each just state those people how too little good world very still "
    "see men work here get both between",
    "zh": "的 了 是 在 和 有 不 我 他 这 也 就 都 人 一 上 个 中 大 为 到 说 们 来 地 "
    "着 要 与 对 会 年 而 以 后 你 她 它 那 可以 没有 我们 他们 自己 什么 一个 这个 "
    "因为 所以 但是 如果 问题 工作 时间 中国 现在 已经 可能 需要 进行 发展 使用 通过 开始 "
    "知道 看到 不同 重要 其中 以及 对于 关于 或者 并且 这些 那些",
}
SYLLABLES = (
    "b c d f g h j k l m n p r s t v w br ch cl dr fl gr pl pr qu sh sp st str th tr".split(),
    "a e i o u a e i o ai ea ee ie io oo ou".split(),
    [*[""] * 12, *"n r s t l m d ck nd ng nt rd rs st th".split()],
)


class Draws:
    """Random numbers that are the same everywhere."""

    def __init__(self, *seed: int) -> None:
        self.bits = np.random.PCG64(np.random.SeedSequence(seed))

    def raw(self, count: int) -> Bits:
        return self.bits.random_raw(count)

    def below(self, limit: int) -> int:
        return int(self.bits.random_raw()) % limit


class Language:
    """A vocabulary, and what can be written with it. A text is an array of `word * FORMS + form`."""

    def __init__(self, name: str, words: Sequence[str]) -> None:
        self.name = name
        pieces = [
            (word if form < CAPITAL else word.capitalize()) + ENDINGS[name][form % CAPITAL]
            for word in words
            for form in range(FORMS)
        ]
        self.pieces = np.array([piece.encode() for piece in pieces])  # of one width, filled up with zeros
        # Zipf's law in integers: a number of 20 bits -> the word that holds this place.
        weights = 2**36 // (np.arange(len(words), dtype=np.int64) + 3)
        ends = np.cumsum(weights)
        self.places = np.searchsorted(ends, (np.arange(2**20) * int(ends[-1])) >> 20, side="right")
        # What shingles are made of: words, or the characters of words.
        self.size = WORDS if name == "en" else CHARACTERS
        units = [[number] if name == "en" else [*map(ord, word)] for number, word in enumerate(words, 1)]
        self.units = np.zeros((len(words), max(map(len, units))), dtype=np.uint64)  # filled up with zeros
        for row, of in zip(self.units, units, strict=True):
            row[: len(of)] = of
        lengths = np.array([len((word + ENDINGS[name][PLAIN]).encode()) for word in words])
        self.bytes_per_1000 = 1000 * int(lengths[self.places].sum()) // 2**20 + 300  # 300: punctuation

    def words(self, bits: Bits) -> Ids:
        """Words drawn by their frequency, one for each number."""
        return self.places[(bits & np.uint64(2**20 - 1)).astype(np.int64)]

    def documents(self, draws: Draws, number: int) -> list[Ids]:
        """New texts."""
        quantiles = (draws.raw(number) >> np.uint64(54)).astype(np.int64)
        lengths = np.maximum(1000 * np.array(LENGTHS)[quantiles] // self.bytes_per_1000, 3)
        total = int(lengths.sum())
        bits = draws.raw(total)
        forms = np.where((bits >> np.uint64(20)) % np.uint64(10) == 0, COMMA, PLAIN)
        sentences = np.cumsum(6 + (draws.raw(total // 6 + 1) % np.uint64(22)).astype(np.int64))
        stops = sentences[: np.searchsorted(sentences, total)]
        chance = (bits[stops] >> np.uint64(32)) % np.uint64(32)
        forms[stops] = np.select([chance < 6, chance < 8], [PARAGRAPH, QUESTION], STOP)
        ends = np.cumsum(lengths)
        forms[ends - 1] = LAST
        opens = np.zeros(total, dtype=np.int64)
        opens[0] = CAPITAL
        opens[1:][forms[:-1] >= STOP] = CAPITAL
        ids = self.words(bits) * FORMS + forms + opens
        return [ids[end - length : end] for end, length in zip(ends, lengths, strict=True)]

    def body(self, text: Ids) -> bytes:
        """A text as it stands in JSON."""
        return self.pieces[text].tobytes().translate(None, b"\0")

    def shingles(self, text: Ids) -> Bits:
        """The distinct shingles, as 64-bit numbers: polynomials in an odd number."""
        units = self.units[text // FORMS].ravel()
        units = units[units != 0]
        count = max(len(units) - self.size + 1, 0)
        mixed = np.zeros(count, dtype=np.uint64)
        for offset in range(self.size):
            mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + units[offset : offset + count]
        mixed.sort()
        return mixed[np.diff(mixed, prepend=~mixed[:1]) != 0]

    def jaccard(self, left: Ids, right: Ids) -> float:
        """The share of all shingles of two texts that both have."""
        one, other = self.shingles(left), self.shingles(right)
        both = np.sort(np.concatenate([one, other]))
        shared = int((both[1:] == both[:-1]).sum())
        return shared / (len(one) + len(other) - shared)


@functools.cache
def language(name: str) -> Language:
    """One of en, zh."""
    frequent = FREQUENT[name].split()
    draws = Draws(0)
    found = dict.fromkeys(frequent)
    characters = [
        bytes([row, column]).decode("gb2312") for row in range(0xB0, 0xD7) for column in range(0xA1, 0xFA)
    ]
    while len(found) < VOCABULARY:
        # Rare words are longer: up to two syllables or characters at first, four at last.
        parts = 1 + draws.below(2 + 3 * len(found) // VOCABULARY)
        if name == "en":
            word = "".join(kind[draws.below(len(kind))] for _ in range(parts) for kind in SYLLABLES)[:16]
        else:
            # Some characters are far more frequent than others.
            picks = [draws.below(len(characters)) * draws.below(1024) // 1024 for _ in range(parts)]
            word = "".join(characters[pick] for pick in picks)
        found[word] = None
    return Language(name, list(found))


def generated(name: str, size: float) -> list[str]:
    """Texts in one language, of about so many bytes, without copies."""
    draws, of = Draws(1), language(name)
    texts: list[str] = []
    while size > 0:
        for document in of.documents(draws, BLOCK):
            if size > 0:
                texts.append(json.loads(b'"' + of.body(document) + b'"'))
                size -= len(texts[-1].encode())
    return texts


@dataclass(frozen=True, slots=True)
class Made:
    """A document, and if it is a copy: of which one, changed how, and how alike they are."""

    id: str
    body: bytes
    """Its text as it stands in JSON."""
    of: str = ""
    kind: str = ""
    jaccard: float = 0.0


def documents(seed: int) -> Iterator[Made]:
    """The corpus, without end: two documents in English for each one in Chinese."""
    numbers = count()
    english, chinese = (written(language(name), Draws(seed, i), numbers) for i, name in enumerate(ENDINGS))
    for each in zip(english, english, chinese, strict=True):
        yield from each


def written(of: Language, draws: Draws, numbers: Iterator[int]) -> Iterator[Made]:
    """The documents in one language: every fifth a copy, and three tenths of these of a few popular ones."""
    pool: list[tuple[str, Ids]] = []
    popular: list[tuple[str, Ids]] = []
    headers = [of.words(draws.raw(8 + draws.below(33))) * FORMS for _ in range(32)]
    while True:
        for text in of.documents(draws, BLOCK):
            while pool and draws.below(5) == 0:
                shelf = popular if popular and draws.below(10) < 3 else pool
                name, original = shelf[draws.below(len(shelf))]
                kind = KINDS[draws.below(len(KINDS))]
                changed = edited(of, original, kind, headers, draws)
                body = of.body(changed)
                if kind == "retyped":
                    body = retyped(of, body, draws)
                yield Made(f"{next(numbers):09}", body, name, kind, of.jaccard(original, changed))
            made = Made(f"{next(numbers):09}", of.body(text))
            yield made
            if len(text) >= SHORTEST:
                keep(pool, POOL, (made.id, text), draws)
                if draws.below(400) == 0:
                    keep(popular, 64, (made.id, text), draws)


def keep(shelf: list[tuple[str, Ids]], limit: int, book: tuple[str, Ids], draws: Draws) -> None:
    """Puts a document where it can be copied from; in place of any, if there is no room."""
    if len(shelf) < limit:
        shelf.append(book)
    else:
        shelf[draws.below(limit)] = book


def edited(of: Language, text: Ids, kind: str, headers: Sequence[Ids], draws: Draws) -> Ids:
    """A text with words changed at one of some rates, or cut, or with a header and a footer."""
    if kind == "truncated":
        return text[: len(text) * (60 + draws.below(38)) // 100]
    if kind == "framed":
        header, footer = (headers[draws.below(len(headers))] for _ in range(2))
        return np.concatenate([header, text, footer])
    if kind == "retyped":
        return text
    rate = RATES[draws.below(len(RATES))]
    touched = np.flatnonzero(draws.raw(len(text)) % np.uint64(10_000) < round(rate * 10_000))
    if not len(touched):
        touched = np.array([draws.below(len(text))])
    if kind == "deleted":
        return np.delete(text, touched)
    new = of.words(draws.raw(len(touched))) * FORMS
    if kind == "inserted":
        return np.insert(text, touched, new)
    changed = text.copy()
    changed[touched] = new + text[touched] % FORMS
    return changed


def retyped(of: Language, body: bytes, draws: Draws) -> bytes:
    """The same words with other case, punctuation or blanks; the body stays JSON."""
    if of.name == "en":
        ways = (bytes.lower, _shouted, _without_commas, _wide)
    else:
        ways = (_ascii, _without_commas, _spread, _close)
    return ways[draws.below(len(ways))](body)


def _shouted(body: bytes) -> bytes:
    return body.upper().replace(b"\\N", b"\\n")


def _without_commas(body: bytes) -> bytes:
    return body.replace(b",", b"").replace("，".encode(), b" ")


def _wide(body: bytes) -> bytes:
    return body.replace(b" ", b"  ")


def _ascii(body: bytes) -> bytes:
    return body.replace("，".encode(), b", ").replace("。".encode(), b". ").replace("？".encode(), b"? ")


def _spread(body: bytes) -> bytes:
    return body.replace("，".encode(), " ， ".encode()).replace("。".encode(), "。\\n".encode())


def _close(body: bytes) -> bytes:
    return body.replace(b"\\n\\n", b"")


def write(folder: Path, size: float, seed: int, compressed: bool) -> str:
    """Writes about `size` bytes to `FILES` files, and the truth beside them; returns what share is unique."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; empty it, or name another folder with --out")
    written = unique = copies = made = 0
    with ExitStack() as stack:
        truth = stack.enter_context(stack.enter_context(replacing(folder / "_truth.jsonl")).open("wb"))
        files = [stack.enter_context(opened(folder, number, compressed)) for number in range(FILES)]
        for made, document in enumerate(documents(seed), 1):
            line = b'{"id": "%s", "text": "%s"}\n' % (document.id.encode(), document.body)
            files[made % FILES].write(line)
            written += len(line)
            if document.of:
                copies += 1
                told = {"id": document.id, "of": document.of, "kind": document.kind}
                truth.write(json.dumps(told | {"jaccard": round(document.jaccard, 6)}).encode() + b"\n")
            else:
                unique += len(line)
            if written >= size:
                break
    return (
        f"{folder}: {made:,} documents, {written / 1e9:.3f} GB, of which {unique / written:.1%} unique; "
        f"{copies:,} planted copies ({copies / made:.1%} of the documents) in _truth.jsonl"
    )


@contextmanager
def opened(folder: Path, number: int, compressed: bool) -> Iterator[IO[bytes]]:
    """One of the files, which appears when it is whole."""
    suffix = ".jsonl.zst" if compressed else ".jsonl"
    with replacing(folder / f"text-{number:02}{suffix}") as path, path.open("wb") as file:
        if compressed:
            compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)
            with compressor.stream_writer(file) as stream:
                yield stream
        else:
            yield file


def main() -> int:
    """Writes the corpus."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gb", type=float, default=1.0, help="gigabytes, uncompressed (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("runs/text"), help="the folder (default: runs/text)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--zst", action="store_true", help="compress the files")
    arguments = parser.parse_args()
    started = time.perf_counter()
    try:
        said = write(arguments.out, arguments.gb * 1e9, arguments.seed, arguments.zst)
    except ValueError as why:
        print(f"make_text.py: {why}", file=sys.stderr)
        return 1
    print(f"{said}; {arguments.gb * 1e3 / (time.perf_counter() - started):.0f} MB/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
