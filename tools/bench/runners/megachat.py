"""megachat itself: with the numba kernel where the environment says COMPILED=1, else with NumPy."""

import os
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megachat.config import compose, decode
from megachat.data.copies import Corpus, Shards, search
from megachat.data.dedup import Dedup
from megachat.data.executor import Local
from megachat.data.minhash import Texts
from megachat.data.steps import carry_out
from tools.bench.clock import serve, texts


def megachat_removed(path: Path, compiled: bool) -> list[int]:
    """What megachat removes as a copy, exact or near: the steps of `megachat clean`, on files as there."""
    read = texts(path)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "texts").mkdir()
        (work / "passed").mkdir()
        pq.write_table(pa.table({"text": read}), work / "texts" / "00000.parquet", compression="zstd")
        np.save(work / "passed" / "00000.npy", np.zeros(len(read), dtype=np.uint8))
        corpus = Corpus(Shards((len(read),), work / "texts", work / "index", work / "passed"))
        steps = search(work, corpus, settings(), 1 << 30, compiled)
        while True:
            try:
                carry_out(next(steps), Local(processes=1))
            except StopIteration as end:
                exact, near = end.value.of(corpus, 0)
                return [*exact[0].tolist(), *near[0].tolist()]


def megachat_signatures(read: list[str], compiled: bool) -> object:
    """The MinHash of each text."""
    return settings().signer.sign(Texts.of(read), compiled)


def settings() -> Dedup:
    """The default settings of deduplication."""
    found: Dedup = decode(compose("clean")["dedup"])
    return found


if __name__ == "__main__":
    compiled = os.environ.get("COMPILED") == "1"
    serve(partial(megachat_removed, compiled=compiled), partial(megachat_signatures, compiled=compiled))
