"""The stage `encode`: the cleaned text as shards of tokens, ready to train on.

Each document is `<s>`, its tokens, `</s>`. There is a shard for each source, `train/wiki.bin`, so that
pretraining can weigh them. Whether a document is for validation follows from its id alone: adding documents
to the corpus moves none from one side to the other. A process encodes one file of text after another, and
this one puts what they wrote together in the corpus's order, so the shards are the same whatever the number
of processes.

gigatoken's ids are compared with sentencepiece's at the start of every file of text; where they differ, that
file is encoded by sentencepiece, and the log says so.
"""

import multiprocessing
import os
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar
from urllib.parse import quote

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from megachat.data.conversations import share
from megachat.data.document import SHARDS, Document, read_shard
from megachat.data.shards import Shard, ShardWriter
from megachat.files import replacing, sha256, write_json
from megachat.log import progress, say
from megachat.run import Stage
from megachat.tokenizer.encoders import Encoder, Name, SentencePiece, encoder
from megachat.tokenizer.tokenizer import FILE, Tokenizer

BATCH = 1 << 20
"""Characters of text that are encoded at a time."""

PER_PROCESS = 1 << 22
"""Bytes of compressed text that make it worth starting one more process."""

SPLITS = ("train", "validation")

Key = tuple[str, str]
"""A split and a source."""


class Encode(Stage):
    """Turns text into tokens."""

    name: ClassVar[str] = "encode"
    neutral: ClassVar[tuple[str, ...]] = ("processes",)

    validation: Annotated[float, Field(gt=0, lt=1)]
    """The share of documents kept from training, to measure the model on."""
    encoder: Name
    """`sentencepiece`, or `gigatoken`, the same ids many times as fast (pip install 'megachat[fast]')."""
    compared: PositiveInt
    """With gigatoken: so many documents at the start of each file of text are encoded by both."""
    processes: NonNegativeInt
    """Processes that encode at once; 0: as many as there are CPU cores, at most one per 4 MB on disk."""

    def reads(self) -> list[str]:
        """The cleaned text and the tokenizer."""
        return ["clean", "tokenizer"]

    def execute(self) -> None:
        """Writes `train/<source>.bin`, `validation/<source>.bin`, their `.idx`, and `manifest.json`."""
        folder, path = self.input("clean"), self.input("tokenizer") / FILE
        tokenizer = Tokenizer.load(path)
        encoder(self.encoder, tokenizer)  # a missing package is found here, not by every process
        texts = sorted(folder.glob(SHARDS))
        if not texts:
            raise ValueError(f"{folder} has no {SHARDS}; `megachat clean` writes them")
        for left in self.folder.glob("*.tmp"):  # by one that was killed
            shutil.rmtree(left)
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            parts = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="parts.", suffix=".tmp", dir=self.folder)
            )
            # Whole or not at all: an encode that fails or is killed leaves the shards of the one before.
            folders = {split: stack.enter_context(replacing(self.folder / split)) for split in SPLITS}
            shards = _Shards(stack.enter_context(ExitStack()), folders, tokenizer.vocab)
            task = Task(path, self.encoder, self.compared, self.validation, Path(parts))
            with progress("encoding", sum(text.stat().st_size for text in texts), "B") as bar:
                for text, part in zip(
                    texts, encoded(texts, task, self.processes or processes_for(texts)), strict=True
                ):
                    shards.add(part)
                    if part.mistake:
                        say(f"encode: {part.mistake}; sentencepiece encodes all of {text.name}")
                    bar.update(text.stat().st_size)
            self._check(shards.counts)
            shards.close()
            manifest = shards.manifest(tokenizer)
        write_json(self.folder / "manifest.json", manifest)
        for split in SPLITS:
            say(f"{split}: {manifest[split]['documents']:,} documents, {manifest[split]['tokens']:,} tokens")

    def _check(self, counts: dict[Key, Counter[str]]) -> None:
        documents = {split: _total(counts, split)["documents"] for split in SPLITS}
        for split, count in documents.items():
            if not count:
                raise ValueError(
                    f"validation={self.validation} leaves none of the {sum(documents.values())} documents "
                    f"for {split}; use a {'larger' if split == 'validation' else 'smaller'} share or more "
                    "documents"
                )


@dataclass(frozen=True)
class Task:
    """What a process is told once."""

    tokenizer: Path
    encoder: Name
    compared: int
    validation: float
    folder: Path
    """Where it writes."""


@dataclass(frozen=True)
class Part:
    """What became of one file of text."""

    shards: dict[Key, Path]
    """Prefixes, in the order in which the sources come."""
    counts: dict[Key, Counter[str]]
    encoder: Name
    mistake: str
    """What gigatoken got wrong, if it did."""


class _Shards:
    """The shards of all sources, put together from parts."""

    def __init__(self, stack: ExitStack, folders: dict[str, Path], vocab: int) -> None:
        self.stack, self.folders, self.vocab = stack, folders, vocab
        self.writers: dict[Key, ShardWriter] = {}
        self.counts: dict[Key, Counter[str]] = {}
        self.encoders: Counter[str] = Counter()
        for folder in folders.values():
            folder.mkdir()

    def add(self, part: Part) -> None:
        """Takes a part in, and deletes it."""
        for key, prefix in part.shards.items():
            if key not in self.writers:
                split, source = key
                writer = ShardWriter(self.folders[split] / file_name(source), self.vocab)
                self.writers[key], self.counts[key] = self.stack.enter_context(writer), Counter()
            self.writers[key].append(Shard(prefix))
            self.counts[key] += part.counts[key]
            shutil.rmtree(prefix.parent)
        self.encoders[part.encoder] += 1

    def close(self) -> None:
        """Puts the shards in their places."""
        self.stack.close()

    def manifest(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """What there is, in the corpus's order."""
        shards = {}
        for (split, source), writer in self.writers.items():
            files = {kind: sha256(Path(f"{writer.prefix}.{kind}")) for kind in ("bin", "idx")}
            entry = {"split": split, "source": source, **self.counts[split, source], "sha256": files}
            shards[f"{split}/{writer.prefix.name}"] = entry
        about = {"tokenizer": tokenizer.sha256, "vocab": tokenizer.vocab, "encoders": dict(self.encoders)}
        return about | {split: dict(_total(self.counts, split)) for split in SPLITS} | {"shards": shards}


def file_name(source: str) -> str:
    """A name of a source as a name of a file, and another for another.

    Example: file_name("wiki/zh") -> "wiki%2Fzh"
    """
    return quote(source, safe=" ") or "%"


def encoded(texts: Sequence[Path], task: Task, processes: int) -> Iterator[Part]:
    """Encodes each file of text; the parts come in order."""
    if processes == 1:
        start(task)
        yield from map(encode_file, texts)
        return
    # spawn: a forked child inherits locks that threads of the parent held, and nobody to release them.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, start, (task,)) as pool:
        waiting: deque[Future[Part]] = deque()
        try:
            for text in texts:
                waiting.append(pool.submit(encode_file, text))
                if len(waiting) > 2 * processes:  # enough to keep all busy; parts need room on disk
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise ValueError(f"a process died, out of memory perhaps; set less than {processes=}") from None
        finally:
            pool.shutdown(cancel_futures=True)


def start(task: Task) -> None:
    """Makes a process ready to encode files."""
    global _task, _tokenizer, _encoder
    _task = task
    _tokenizer = Tokenizer.load(task.tokenizer)
    _encoder = encoder(task.encoder, _tokenizer)


_task: Task
_tokenizer: Tokenizer
_encoder: Encoder
"""Of this process: made once, not for every file."""


def encode_file(text: Path) -> Part:
    """Encodes one file of text to shards of its own."""
    plain = SentencePiece(_tokenizer)
    mistake = "" if _task.encoder == "sentencepiece" else compare(_encoder, plain, text, _task.compared)
    name: Name = "sentencepiece" if mistake else _task.encoder
    using = plain if mistake else _encoder
    counts: dict[Key, Counter[str]] = {}
    prefixes: dict[Key, Path] = {}
    with ExitStack() as stack:
        writers: dict[Key, ShardWriter] = {}
        for batch in batches(read_shard(text)):
            ids, lengths = using.encode([document.text for document in batch])
            stops = np.cumsum(lengths)
            for key, chosen in _by_key(batch, _task.validation).items():
                if key not in writers:
                    prefixes[key] = _task.folder / f"{text.stem}-{len(writers)}" / "part"
                    writers[key], counts[key] = ShardWriter(prefixes[key], _tokenizer.vocab), Counter()
                    stack.enter_context(writers[key])
                runs = [ids[stops[one] - lengths[one] : stops[one]] for one in chosen]
                writers[key].add_many(
                    ids if len(chosen) == len(batch) else np.concatenate(runs), lengths[chosen]
                )
                size = sum(len(batch[one].text.encode()) for one in chosen)
                tokens = int(lengths[chosen].sum())
                counts[key].update(documents=len(chosen), tokens=tokens, bytes=size)
    return Part(prefixes, counts, name, mistake)


def _by_key(batch: Sequence[Document], validation: float) -> dict[Key, list[int]]:
    found: dict[Key, list[int]] = {}
    for number, document in enumerate(batch):
        split = SPLITS[share(document.id) < validation]
        found.setdefault((split, document.source), []).append(number)
    return found


def compare(one: Encoder, other: Encoder, text: Path, count: int) -> str:
    """In which of the first documents of a file of text two encoders differ; "" if in none."""
    for document in islice(read_shard(text), count):
        (ids, _), (right, _) = one.encode([document.text]), other.encode([document.text])
        if not np.array_equal(ids, right):
            same = min(len(ids), len(right))
            at = int(np.append(np.flatnonzero(ids[:same] != right[:same]), same)[0])
            return f"gigatoken's ids of {document.id} in {text} differ from sentencepiece's at token {at}"
    return ""


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


def processes_for(texts: Sequence[Path]) -> int:
    """As many as there are cores and files to use, but starting one must pay."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    size = sum(path.stat().st_size for path in texts)
    return min(cores, len(texts), 1 + size // PER_PROCESS)


def _total(counts: dict[Key, Counter[str]], split: str) -> Counter[str]:
    return sum((count for (of, _), count in counts.items() if of == split), Counter())
