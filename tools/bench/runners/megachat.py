"""megachat itself: with the numba kernel where the environment says COMPILED=1, else with NumPy."""

import functools
import os
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megachat.config import compose, decode
from megachat.data.collect import GROUP
from megachat.data.copies import Corpus, Shards, search
from megachat.data.dedup import Dedup
from megachat.data.executor import Local
from megachat.data.minhash import Texts
from megachat.data.steps import carry_out
from tools.bench.clock import serve, texts

TEXT = pa.schema([("text", pa.string())])


def megachat_removed(path: Path, compiled: bool) -> tuple[list[int], int]:
    """What megachat removes as a copy, exact or near, and the size of its index.

    By the steps of `megachat clean`, on files as there.
    """
    read = texts(path)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "texts").mkdir()
        (work / "passed").mkdir()
        with pq.ParquetWriter(work / "texts" / "00000.parquet", TEXT, compression="zstd") as file:
            for group in groups(read):
                file.write_table(pa.table({"text": group}, TEXT))
        np.save(work / "passed" / "00000.npy", np.zeros(len(read), dtype=np.uint8))
        corpus = Corpus(Shards((len(read),), work / "texts", work / "index", work / "passed"))
        steps = search(work, corpus, settings(), 1 << 30, compiled)
        while True:
            try:
                carry_out(next(steps), Local(processes=1))
            except StopIteration as end:
                exact, near = end.value.of(corpus, 0)
                size = sum(file.stat().st_size for file in corpus.own.indices.rglob("*.npy"))
                return [*exact[0].tolist(), *near[0].tolist()], size


def megachat_signatures(read: list[str], compiled: bool) -> object:
    """The MinHash of each text."""
    signer = settings().signer
    return [signer.sign(Texts.of(group), compiled) for group in groups(read)]


def groups(read: Iterable[str]) -> Iterator[list[str]]:
    """Texts as `collect` puts them together, which is how much of them is in memory at a time."""
    group: list[str] = []
    size = 0
    for text in read:
        group.append(text)
        size += len(text)
        if size >= GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


@functools.cache  # composing them takes as long as removing the copies of 10 MB
def settings() -> Dedup:
    """The default settings of deduplication."""
    found: Dedup = decode(compose("clean")["dedup"])
    return found


if __name__ == "__main__":
    compiled = os.environ.get("COMPILED") == "1"
    serve(partial(megachat_removed, compiled=compiled), partial(megachat_signatures, compiled=compiled))
