"""The stage `encode`: the cleaned text as shards of tokens, ready to train on.

Each document is `<s>`, its tokens, `</s>`. Whether a document is for validation follows from its id alone:
adding documents to the corpus moves none from one side to the other. Other processes encode; this one reads
and writes in the corpus's order, so the shards are the same whatever their number.
"""

import json
import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt

from megachat.data.conversations import share
from megachat.data.document import SHARDS, Document, read_documents
from megachat.data.shards import ShardWriter
from megachat.files import write_json
from megachat.log import progress, say
from megachat.run import Stage
from megachat.tokenizer.tokenizer import FILE, Tokenizer

BATCH = 1 << 20
"""Characters of text that a worker gets at a time."""

PER_PROCESS = 1 << 22
"""Bytes of compressed text that make it worth starting one more process."""

SPLITS = ("train", "validation")


class Encode(Stage):
    """Turns text into tokens."""

    name: ClassVar[str] = "encode"
    neutral: ClassVar[tuple[str, ...]] = ("processes",)

    validation: Annotated[float, Field(gt=0, lt=1)]
    """The share of documents kept from training, to measure the model on."""
    processes: NonNegativeInt
    """Processes that encode at once; 0: as many as there are CPU cores, at most one per 4 MB on disk."""

    def reads(self) -> list[str]:
        """The cleaned text and the tokenizer."""
        return ["clean", "tokenizer"]

    def execute(self) -> None:
        """Writes `train.bin`, `validation.bin`, their `.idx`, and `manifest.json`."""
        folder, path = self.input("clean"), self.input("tokenizer") / FILE
        tokenizer = Tokenizer.load(path)
        processes = self.processes or processes_for(folder)
        counts = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in SPLITS}
        with ExitStack() as shards, progress("encoding", None, "B") as bar:
            writers = {split: ShardWriter(self.folder / split, tokenizer.vocab) for split in SPLITS}
            for writer in writers.values():
                shards.enter_context(writer)
            for document, tokens in encoded(read_documents(folder), path, processes):
                split = SPLITS[share(document.id) < self.validation]
                writers[split].add(tokens)
                size = len(document.text.encode())
                for what, more in (("documents", 1), ("tokens", len(tokens)), ("bytes", size)):
                    counts[split][what] += more
                bar.update(size)
            self._check(counts)
        manifest = {"tokenizer": tokenizer.sha256, "vocab": tokenizer.vocab, **counts}
        write_json(self.folder / "manifest.json", manifest)
        for split, count in counts.items():
            say(f"{split}: {count['documents']:,} documents, {count['tokens']:,} tokens")

    def _check(self, counts: dict[str, dict[str, int]]) -> None:
        total = sum(count["documents"] for count in counts.values())
        for split, count in counts.items():
            if not count["documents"]:
                raise ValueError(
                    f"validation={self.validation} leaves none of the {total} documents for {split}; "
                    f"use a {'larger' if split == 'validation' else 'smaller'} share or more documents"
                )


def encoded(
    documents: Iterable[Document], tokenizer: Path, processes: int
) -> Iterator[tuple[Document, NDArray[np.int32]]]:
    """Each document with its tokens, in order."""
    if processes == 1:
        _start(tokenizer)
        for batch in batches(documents):
            yield from zip(batch, _tokens([document.text for document in batch]), strict=True)
        return
    # spawn: a forked child inherits locks that threads of the parent held, and nobody to release them.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, _start, (tokenizer,)) as pool:
        waiting: deque[tuple[list[Document], Future[list[NDArray[np.int32]]]]] = deque()
        try:
            for batch in batches(documents):
                waiting.append((batch, pool.submit(_tokens, [document.text for document in batch])))
                if len(waiting) > 2 * processes:  # enough to keep all busy; the corpus may not fit in memory
                    yield from _taken(waiting)
            while waiting:
                yield from _taken(waiting)
        except BrokenProcessPool:
            raise ValueError(f"a process died, out of memory perhaps; set less than {processes=}") from None


def _taken(
    waiting: deque[tuple[list[Document], Future[list[NDArray[np.int32]]]]],
) -> Iterator[tuple[Document, NDArray[np.int32]]]:
    batch, tokens = waiting.popleft()
    return zip(batch, tokens.result(), strict=True)


def _start(path: Path) -> None:
    global _tokenizer
    _tokenizer = Tokenizer.load(path)


def _tokens(texts: list[str]) -> list[NDArray[np.int32]]:
    """`<s>`, the text, `</s>`."""
    ends = _tokenizer.bos, _tokenizer.eos
    return [np.array([ends[0], *tokens, ends[1]], dtype=np.int32) for tokens in _tokenizer.encode_many(texts)]


_tokenizer: Tokenizer
"""Of this process: sent once, not with every batch."""


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
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


def processes_for(folder: Path) -> int:
    """As many as there are cores to use, but starting one must pay."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    size = sum(path.stat().st_size for path in folder.glob(SHARDS))
    return min(cores, 1 + size // PER_PROCESS)


def check_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Refuses shards that another tokenizer made: training on them would go on without complaint."""
    made_by = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["tokenizer"]
    if made_by != tokenizer.sha256:
        raise ValueError(
            f"{folder} was encoded with tokenizer {made_by[:12]}, but this run's is {tokenizer.sha256[:12]}; "
            "run the stages after `tokenizer` again"
        )
