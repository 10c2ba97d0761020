"""The stage `tokenizer`: learns a vocabulary from the cleaned text, by byte-pair encoding.

The idea is Sennrich et al.'s (2016, https://arxiv.org/abs/1508.07909), the program Kudo and Richardson's
sentencepiece (2018, https://arxiv.org/abs/1808.06226). It learns from a sample, in which every language has
its share: its bytes to a power below 1 (Conneau and Lample, 2019, https://arxiv.org/abs/1901.07291), so that
a small one gets tokens, too. Which documents are in it follows from their ids and the seed, so it is the same
however the corpus is ordered and cut into shards. The report of `clean` says how much there is of each
language, so budgets are known before the text is read, and no more is held than is learnt from. Runs of
spaces may be tokens: without that, indented code needs half as many tokens again. What no token covers falls
back to bytes, so there is no text it cannot encode.
"""

import heapq
import io
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import sentencepiece
from pydantic import Field, PositiveInt

from megachat.data.conversations import share
from megachat.data.document import Document, read_documents
from megachat.files import write_json
from megachat.log import say, track
from megachat.run import Stage
from megachat.tokenizer.tokenizer import BOS, CONTROLS, EOS, FILE, PAD, SPACE, UNKNOWN, Tokenizer

LINE = 4000
"""Bytes per line given to the trainer, which skips lines over 4,192 bytes without a word."""

RESERVED = "\u2585"
"""What sentencepiece writes for the unknown: it skips a line with one in it, without a word."""

CHECKED = 2_000_000
"""Bytes of the sample that are encoded and decoded again, and measured."""


class TrainTokenizer(Stage):
    """Learns a vocabulary."""

    name: ClassVar[str] = "tokenizer"

    vocab: Annotated[int, Field(ge=300)]
    """How many tokens: 4 special, 5 of the chat format, 256 bytes, and what is learnt."""
    character_coverage: Annotated[float, Field(gt=0.9, le=1)]
    """The share of the sample's characters that get tokens of their own; the others are written as bytes."""
    sample_bytes: PositiveInt
    """Bytes of text to learn from, at most; memory needed is some 25 times as much."""
    alpha: Annotated[float, Field(ge=0, le=1)]
    """A language's share of the sample is its bytes to this power; 1: as in the corpus, 0: all the same."""
    threads: PositiveInt
    """Of the trainer. The vocabulary does not depend on it, but the file records it, so its sha256 does."""

    def reads(self) -> list[str]:
        """The cleaned text."""
        return ["clean"]

    def execute(self) -> None:
        """Writes `tokenizer.model` and `report.json`."""
        clean = self.input("clean")
        corpus = track(read_documents(clean), "reading", unit="doc")
        documents = balanced(corpus, sizes_in(clean), self.sample_bytes, self.alpha, self.seed)
        size = sum(len(document.text.encode()) for document in documents)
        say(f"learning {self.vocab} tokens from {len(documents)} documents, {size / 1e6:.1f} MB")
        texts = [document.text for document in documents]
        tokenizer = train(texts, self.vocab, self.character_coverage, self.threads)
        measured = measure(tokenizer, sample(documents, CHECKED, self.seed))
        tokenizer.save(self.folder / FILE)
        report = {"vocab": tokenizer.vocab, "sha256": tokenizer.sha256}
        languages: Counter[str] = Counter()
        for document in documents:
            languages[document.language or "other"] += len(document.text.encode())
        about = {"documents": len(documents), "bytes": size, "languages": dict(sorted(languages.items()))}
        report |= {"sample": about, **measured}
        write_json(self.folder / "report.json", report)
        rates = [f"{language} {rate:.2f}" for language, rate in measured["bytes_per_token"].items()]
        say(f"bytes per token: {', '.join(rates)}")


Entry = tuple[float, str, str, str, str, int]
"""A document by its place in samples, the first largest: minus the hash of its id; source, id, and text, by
which those with one hash are told apart; language; and bytes."""


class Smallest:
    """The documents with the smallest hashes of their ids, together `most` bytes, which bounds the memory."""

    def __init__(self, most: int, seed: int) -> None:
        self.most, self.seed = most, seed
        self._heap: list[Entry] = []  # the largest hash on top
        self._size = 0

    def offer(self, document: Document) -> None:
        """Keeps the document if it is among the smallest so far."""
        size = len(document.text.encode())
        place = -share(f"{self.seed} {document.id}")
        entry = (place, document.source, document.id, document.text, document.language, size)
        heapq.heappush(self._heap, entry)
        self._size += size
        while self._heap and self._size - self._heap[0][-1] >= self.most:
            self._size -= heapq.heappop(self._heap)[-1]

    def taken(self) -> list[Entry]:
        """Those kept, in order. The last is cut to fit."""
        chosen = sorted(self._heap, reverse=True)
        if self._size > self.most:
            place, source, name, text, language, size = chosen[-1]
            text = text.encode()[: size - (self._size - self.most)].decode(errors="ignore")
            chosen[-1] = place, source, name, text, language, size
        return chosen


def sample(documents: Iterable[Document], most: int, seed: int) -> list[Document]:
    """The documents with the smallest hashes of their ids, together `most` bytes, in that order.

    The order of `documents` does not matter. The last one is cut to fit.
    """
    smallest = Smallest(most, seed)
    for document in documents:
        smallest.offer(document)
    return in_order(smallest.taken())


def balanced(
    documents: Iterable[Document], sizes: Mapping[str, int], most: int, alpha: float, seed: int
) -> list[Document]:
    """Like `sample`, with a budget of its own for each language, which follows from `sizes`, its bytes."""
    if alpha == 1:  # shares as in the corpus: what any sample has
        return sample(documents, most, seed)
    kept = {language: Smallest(given, seed) for language, given in budgets(sizes, most, alpha).items()}
    for document in documents:
        if document.language not in kept:
            raise ValueError(
                f"{document.id} of {document.source} is in {document.language!r}, of which the report of "
                "`clean` knows nothing; run `megachat clean` again"
            )
        kept[document.language].offer(document)
    return in_order(entry for one in kept.values() for entry in one.taken())


def in_order(entries: Iterable[Entry]) -> list[Document]:
    """The documents as they come in a sample."""
    return [
        Document(name, text, source, language)
        for _, source, name, text, language, _ in sorted(entries, reverse=True)
    ]


def sizes_in(clean: Path) -> dict[str, int]:
    """The bytes of each language, from the report of `clean`."""
    report = clean / "report.json"
    if not report.is_file():
        raise ValueError(f"{report} is missing; run `megachat clean` again")
    languages = json.loads(report.read_text(encoding="utf-8"))["languages"]
    return {language: counts["bytes"] for language, counts in languages.items()}


def budgets(sizes: Mapping[str, int], most: int, alpha: float) -> dict[str, int]:
    """`most` bytes shared out in proportion to each size to the power of `alpha`, to none more than it has.

    Example: budgets({"en": 900, "zh": 100}, 400, alpha=0.5) -> {"en": 300, "zh": 100}
    """
    if sum(sizes.values()) <= most:
        return dict(sizes)
    given: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: (sizes[name] ** (1 - alpha), name)):  # the soonest full first
        weights = {other: sizes[other] ** alpha for other in sizes if other not in given}
        share_of = int((most - sum(given.values())) * weights[name] / sum(weights.values()))
        given[name] = min(sizes[name], share_of)
    return {name: given[name] for name in sizes}


def train(texts: Iterable[str], vocab: int, character_coverage: float, threads: int) -> Tokenizer:
    """A tokenizer learnt from the texts. The same texts in the same order give the same one, to the byte."""
    model = io.BytesIO()
    sentences = (line for text in texts for line in lines(text))
    settings: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": vocab,
        "character_coverage": character_coverage,
        "num_threads": threads,
        # Exact round trips: the text is changed in no way on its way in.
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "control_symbols": list(CONTROLS),
        **{"pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3},
        **{"pad_piece": PAD, "unk_piece": UNKNOWN, "bos_piece": BOS, "eos_piece": EOS},
        "minloglevel": 2,
    }
    try:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=sentences, model_writer=model, **settings)
    except RuntimeError as error:
        raise ValueError(f"vocab={vocab} cannot be learnt from this text; {_remedy(str(error))}") from None
    return Tokenizer(model.getvalue())


def _remedy(error: str) -> str:
    if "too high" in error or "too large" in error:
        return f"it is too little text: use a smaller vocab or more text (sentencepiece: {error})"
    if "required_chars" in error or "smaller" in error:
        return f"its characters alone need more: use a larger vocab or a smaller character_coverage ({error})"
    return f"sentencepiece says: {error}"


def lines(text: str) -> Iterator[str]:
    """The text in pieces of at most `LINE` bytes without reserved characters, cut between lines if possible.

    Several lines stay together in a piece, so that tokens such as ")\\n" can be learnt.
    """
    piece: list[str] = []
    size = 0
    for line in text.replace(RESERVED, "\n").replace(SPACE, "\n").splitlines(keepends=True):
        for part in _cut(line):
            length = len(part.encode())
            if size + length > LINE:
                yield "".join(piece)
                piece, size = [], 0
            piece.append(part)
            size += length
    if piece:
        yield "".join(piece)


def _cut(line: str) -> Iterator[str]:
    if len(line) * 4 <= LINE or len(line.encode()) <= LINE:
        yield line
        return
    for start in range(0, len(line), LINE // 4):  # no character has more than 4 bytes
        yield line[start : start + LINE // 4]


def measure(tokenizer: Tokenizer, documents: Iterable[Document]) -> dict[str, Any]:
    """Bytes and characters per token by language, and proof that text comes back as it went in."""
    sizes: dict[str, int] = defaultdict(int)
    characters: dict[str, int] = defaultdict(int)
    tokens: dict[str, int] = defaultdict(int)
    round_trips = 0
    for document in track(documents, "checking", unit="doc"):
        encoded = tokenizer.encode(document.text)
        assert tokenizer.decode(encoded) == document.text, f"{document.id} does not come back as it went in"
        round_trips += 1
        for language in {"all", document.language or "other"}:
            sizes[language] += len(document.text.encode())
            characters[language] += len(document.text)
            tokens[language] += len(encoded)
    for text in torture(1000):
        assert tokenizer.decode(tokenizer.encode(text)) == text, f"{text!r} does not come back as it went in"
        round_trips += 1
    rates = {
        f"{unit}_per_token": {
            language: round(counts[language] / max(1, tokens[language]), 3) for language in sorted(counts)
        }
        for unit, counts in (("bytes", sizes), ("characters", characters))
    }
    return {**rates, "round_trips": round_trips}


def torture(count: int) -> Iterator[str]:
    """Texts of random characters of all of Unicode, among them those that tokenizers trip over."""
    dice = random.Random(0)
    pitfalls = [SPACE, RESERVED, *CONTROLS, PAD, UNKNOWN, BOS, EOS, "<0x41>", "\0", "\n", "\r\n", "\t", " "]
    pitfalls += ["    ", "\ufffd", "\ufeff", "\u2028", "e\u0301", "\u200d", "中文", "🙂"]
    for _ in range(count):
        text = []
        for _ in range(dice.randrange(40)):
            code = dice.choice((dice.randrange(0x80), dice.randrange(0x3000), dice.randrange(0x110000)))
            surrogate = 0xD800 <= code < 0xE000
            text.append(dice.choice(pitfalls) if surrogate or dice.random() < 0.3 else chr(code))
        yield "".join(text)
