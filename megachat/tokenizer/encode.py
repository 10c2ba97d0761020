"""The stage `encode`: the cleaned text as shards of tokens, ready to train on.

Each document is `<s>`, its tokens, `</s>`. There is a shard for each source, `train/wiki.bin`, so that
pretraining can weigh them. Whether a document is for validation follows from its id alone: adding documents
to the corpus moves none from one side to the other.

The work is one step (see `megachat/data/steps.py`) with a task for each file of text, which writes shards of
its own below `<run>/work`; this process puts them together in the corpus's order. So the shards are the same
whoever does the tasks, and however often they were interrupted.

Where gigatoken fails or its ids are not sentencepiece's, that file of text is encoded by sentencepiece; the
log and `notes.json` say so.
"""

import functools
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar
from urllib.parse import quote

import numpy as np
from pydantic import Field

from megachat.data.conversations import share
from megachat.data.document import SHARDS, Document, read_shard
from megachat.data.executor import Executor
from megachat.data.shards import Shard, ShardWriter
from megachat.data.steps import Record, Step, carry_out, folder
from megachat.files import replacing, sha256, sweep, write_json
from megachat.log import say, track
from megachat.run import Stage, finished
from megachat.tokenizer.encoders import Checked, Encoder, Ids, Mistake, Name, SentencePiece, encoder
from megachat.tokenizer.tokenizer import FILE, Tokenizer

BATCH = 1 << 20
"""Characters of text that are encoded at a time."""

SPLITS = ("train", "validation")

COUNTS = ("documents", "bytes", "tokens")

MISTAKES = 20
"""Files of text that sentencepiece encoded in gigatoken's place that are told of one by one."""

Key = tuple[str, str]
"""A split and a source."""


class Encode(Stage):
    """Turns text into tokens."""

    name: ClassVar[str] = "encode"
    neutral: ClassVar[tuple[str, ...]] = ("executor",)

    validation: Annotated[float, Field(gt=0, lt=1)]
    """The share of documents kept from training, to measure the model on."""
    encoder: Name
    """`sentencepiece`, or `gigatoken`, the same ids many times as fast (pip install 'megachat[fast]')."""
    compared: Annotated[float, Field(ge=0, le=1)]
    """With gigatoken: the share of documents that are encoded by both, besides the first of each batch."""
    executor: Executor
    """Who does the work. It does not change the result."""

    def reads(self) -> list[str]:
        """The cleaned text and the tokenizer."""
        return ["clean", "tokenizer"]

    def execute(self) -> None:
        """Writes `train/<source>.bin`, `validation/<source>.bin`, their `.idx`, and `manifest.json`."""
        clean, path = self.input("clean"), self.input("tokenizer") / FILE
        tokenizer = Tokenizer.load(path)
        encoder(self.encoder, tokenizer)  # a missing package is found here, not by every process
        texts = tuple(sorted(clean.glob(SHARDS)))
        if not texts:
            raise ValueError(f"{clean} has no {SHARDS}; `megachat clean` writes them")
        sums = finished(clean).get("outputs", {})
        read = [[text.name, sums.get(text.name) or sha256(text)] for text in texts]
        work = (self.run / "work").absolute()
        at = folder(work, "encode", tokenizer.sha256, self.encoder, self.compared, self.validation, read)
        step = EncodeTexts(
            "encode", at, len(texts), path, self.encoder, self.compared, self.validation, texts
        )
        try:
            carry_out(step, self.executor)
        finally:
            self.executor.close()
        self._check(step.records)
        sweep(self.folder)
        manifest = merge(step, self.folder, tokenizer)
        write_json(self.folder / "manifest.json", manifest)
        write_json(self.folder / "notes.json", notes(step.records))
        for left in work.glob("encode-*"):  # other settings' too
            for record in left.glob("*.json"):  # first: killed after this, a task without files is done again
                record.unlink()
            shutil.rmtree(left)
        for split in SPLITS:
            say(f"{split}: {manifest[split]['documents']:,} documents, {manifest[split]['tokens']:,} tokens")

    def _check(self, records: Sequence[Record]) -> None:
        """There must be something on both sides."""
        documents = dict.fromkeys(SPLITS, 0)
        for record in records:
            for shard in record["shards"]:
                documents[shard["split"]] += shard["documents"]
        for split, count in documents.items():
            if not count:
                raise ValueError(
                    f"validation={self.validation} leaves none of the {sum(documents.values())} documents "
                    f"for {split}; use a {'larger' if split == 'validation' else 'smaller'} share or more "
                    "documents"
                )


@dataclass(frozen=True)
class EncodeTexts(Step):
    """Encodes files of text; a task for each, which writes a shard for each split and source in it."""

    tokenizer: Path
    encoder: Name
    compared: float
    validation: float
    texts: tuple[Path, ...]

    @functools.cached_property
    def words(self) -> Tokenizer:
        """Of this process: made once, not for every file."""
        return Tokenizer.load(self.tokenizer)

    @functools.cached_property
    def fast(self) -> Encoder:
        """The encoder that was asked for."""
        return encoder(self.encoder, self.words)

    def work(self, task: int) -> Record:
        plain = SentencePiece(self.words)
        mistake = None
        if self.encoder != "sentencepiece":
            checked = Checked(self.fast, plain, self.words.vocab, self.compared)
            try:
                shards = self._write(task, checked.encode)
            except Mistake as why:
                mistake = f"{self.texts[task].name}: {why}"
            else:
                return {"encoder": self.encoder, "mistake": None, "compared": checked.count, "shards": shards}
        shards = self._write(task, lambda batch: plain.encode([document.text for document in batch]))
        return {"encoder": "sentencepiece", "mistake": mistake, "compared": 0, "shards": shards}

    def _write(self, task: int, encode: Callable[[Sequence[Document]], Ids]) -> list[dict[str, Any]]:
        """What there is of each split and source, in the order in which they come."""
        writers: dict[Key, ShardWriter] = {}
        counts: dict[Key, Counter[str]] = {}
        with ExitStack() as stack:
            for batch in batches(read_shard(self.texts[task])):
                ids, lengths = encode(batch)
                stops = np.cumsum(lengths)
                for key, chosen in _by_key(batch, self.validation).items():
                    if key not in writers:
                        prefix = self.folder / f"{task:05}-{len(writers)}"
                        writers[key] = stack.enter_context(ShardWriter(prefix, self.words.vocab))
                        counts[key] = Counter()
                    runs = [ids[stops[one] - lengths[one] : stops[one]] for one in chosen]
                    writers[key].add_many(
                        ids if len(chosen) == len(batch) else np.concatenate(runs), lengths[chosen]
                    )
                    size = sum(len(batch[one].text.encode()) for one in chosen)
                    tokens = int(lengths[chosen].sum())
                    counts[key].update(documents=len(chosen), bytes=size, tokens=tokens)
        return [
            {"split": split, "source": source, "name": writer.prefix.name, **counts[split, source]}
            for (split, source), writer in writers.items()
        ]


def _by_key(batch: Sequence[Document], validation: float) -> dict[Key, list[int]]:
    found: dict[Key, list[int]] = {}
    for number, document in enumerate(batch):
        split = SPLITS[share(document.id) < validation]
        found.setdefault((split, document.source), []).append(number)
    return found


def batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents by the megabyte."""
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


def merge(step: Step, target: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Puts together what the tasks wrote, as `train/` and `validation/` in `target`; returns the manifest.

    It says what there is, in the corpus's order, and nothing of how the corpus was cut or who encoded it: the
    same tokens are the same output.
    """
    writers: dict[Key, ShardWriter] = {}
    counts: dict[Key, Counter[str]] = {}
    totals: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    with ExitStack() as places:
        # Whole or not at all: an encode that fails or is killed leaves the shards of the one before.
        folders = {split: places.enter_context(replacing(target / split)) for split in SPLITS}
        for place in folders.values():
            place.mkdir()
        with ExitStack() as stack:
            for record in track(step.records, "merging", step.tasks, "file"):
                for part in record["shards"]:
                    split, source = key = part["split"], part["source"]
                    if key not in writers:
                        writer = ShardWriter(folders[split] / file_name(source), tokenizer.vocab)
                        writers[key], counts[key] = stack.enter_context(writer), Counter()
                    writers[key].append(Shard(step.folder / part["name"]))
                    own = {name: part[name] for name in COUNTS}
                    counts[key].update(own)
                    totals[split].update(own)
        shards = {}
        for (split, source), writer in writers.items():
            files = {kind: sha256(Path(f"{writer.prefix}.{kind}")) for kind in ("bin", "idx")}
            entry = {"split": split, "source": source, **counts[split, source], "sha256": files}
            shards[f"{split}/{writer.prefix.name}"] = entry
    about = {"tokenizer": tokenizer.sha256, "vocab": tokenizer.vocab}
    return about | {split: dict(total) for split, total in totals.items()} | {"shards": shards}


def notes(records: Sequence[Record]) -> dict[str, Any]:
    """Who encoded the files of text, how many documents both did, and what gigatoken got wrong."""
    mistakes = [record["mistake"] for record in records if record["mistake"]]
    for mistake in mistakes[:MISTAKES]:
        say(f"encode: {mistake}; sentencepiece encoded all of it")
    if len(mistakes) > MISTAKES:
        say(f"encode: so it was with {len(mistakes):,} of the {len(records):,} files of text")
    encoders = Counter(record["encoder"] for record in records)
    compared = sum(record["compared"] for record in records)
    return {"encoders": dict(encoders), "compared": compared, "mistakes": mistakes[:MISTAKES]}


def file_name(source: str) -> str:
    """A name of a source as a name of a file, and another for another.

    Example: file_name("wiki/zh") -> "wiki%2Fzh"
    """
    return quote(source, safe=" ") or "%"
