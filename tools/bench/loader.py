"""How many tokens a second training is given, on one core: python tools/bench/loader.py [--length 2048]

Batches of tensors as `pretrain` makes them: inputs, labels, and which document each token is of, in
micro-batches of 8 rows. Shards hold random tokens in documents of some 700, `<s>` to `</s>`, all in memory:
what is measured is the loader. Padding does not count as a token. Time is the processor's, of this process
with its threads, held to one core; the median of five seconds.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # of a script, only its own folder is there

from megachat.data.loader import WHOLE, Mixed, Plan, TokenWindows, Window, ahead, share
from megachat.data.mixture import Phase
from megachat.data.packing import PackedRows, pack
from megachat.data.shards import Shard, Shards, ShardWriter
from megachat.model.size import Work
from megachat.train.loop import parts
from megachat.train.pretrain import Tokens, collate

WEIGHTS = {"web": 0.6, "zh": 0.3, "code": 0.1}
BATCH, MICRO_BATCH = 64, 8
VOCAB, BOS, EOS = 32_000, 2, 3

Read = Callable[[int], list[Tokens]]
"""The micro-batches of the step of this number."""


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=200_000_000, help="in the shards")
    parser.add_argument("--repeat", type=int, default=5, help="seconds of each; the median counts")
    given = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        shards = write(Path(folder), given.tokens)
        print(f"{given.tokens:,} tokens, rows of {given.length:,}; one core", file=sys.stderr)
        print(f"{'':<52}{'rows/s':>10}{'padding':>10}{'M tokens/s':>12}")
        for name, make in programs(shards, given.length).items():
            read = make()
            filled = share_of_tokens(read)
            rate = median(rows_per_second(read) for _ in range(given.repeat))
            tokens = rate * given.length * filled / 1e6
            print(f"{name:<52}{rate:10,.0f}{1 - filled:10.1%}{tokens:12.1f}", flush=True)


def programs(shards: dict[str, Shards], length: int) -> dict[str, Callable[[], Read]]:
    """Name -> what makes a function that reads steps."""
    whole = Shards([shard for one in shards.values() for shard in one.shards])

    def grain_alone() -> Read:
        import grain

        orders = [
            grain.MapDataset.source(TokenWindows(one, length)).shuffle(seed).repeat()
            for seed, one in enumerate(shards.values())
        ]
        samples = grain.MapDataset.mix(orders, [*WEIGHTS.values()])
        return lambda step: collated(share(samples, step * BATCH, BATCH, 0, 1))

    def ours(phases: list[Phase], packed: bool, steps: int) -> Callable[[], Read]:
        def make() -> Read:
            sources = shards if phases else {WHOLE: whole}
            plan = Plan.of(sources, [], phases, length, 0)
            rows = {
                name: PackedRows(one, length, pack(one.documents, length))
                if packed
                else TokenWindows(one, length)
                for name, one in sources.items()
            }
            samples = Mixed(rows, plan)
            if not steps:
                return lambda step: collated(share(samples, step * BATCH, BATCH, 0, 1))
            stream = ahead(lambda start: share(samples, start, BATCH, 0, 1), 0, BATCH, steps)
            return lambda step: collated(next(stream))

        return make

    mixture = [Phase(tokens=None, weights=WEIGHTS)]
    return {
        "memmap: windows of one shard": lambda: memmap(shards["web"], length),
        "grain: mixture, megachat's windows": grain_alone,
        "megachat: the whole corpus, documents": ours([], False, 0),
        "megachat: mixture, documents": ours(mixture, False, 0),
        "megachat: mixture, documents, a thread reads ahead": ours(mixture, False, 2),
        "megachat: mixture, best fit, documents": ours(mixture, True, 0),
    }


def memmap(shards: Shards, length: int) -> Read:
    """The same tensors out of one mapped file, in a shuffled order, by NumPy alone."""
    tokens = shards.shards[0].tokens
    starts = np.random.default_rng(0).permutation((len(tokens) - 1) // length) * length

    def read(step: int) -> list[Tokens]:
        rows = [tokens[start : start + length + 1] for start in starts.take(numbers(step), mode="wrap")]
        return [batch(np.stack(some).astype(np.int64)) for some in parts(rows, MICRO_BATCH)]

    return read


def numbers(step: int) -> NDArray[np.int64]:
    """The numbers of a step's rows."""
    return np.arange(step * BATCH, (step + 1) * BATCH)


def batch(rows: NDArray[np.int64]) -> Tokens:
    """What training is given of rows of `length` tokens and one more."""
    documents = np.cumsum(rows == BOS, axis=1)
    labels = np.where(rows[:, 1:] == BOS, -100, rows[:, 1:])
    return Tokens(
        weight=float((labels != -100).sum()),
        work=Work.of([labels.shape[1]] * len(rows), labels.size),
        samples=len(rows),
        inputs=torch.from_numpy(np.ascontiguousarray(rows[:, :-1])),
        labels=torch.from_numpy(labels),
        documents=torch.from_numpy(np.ascontiguousarray(documents[:, :-1])),
    )


def collated(rows: Sequence[Window]) -> list[Tokens]:
    """What `Pretrain.batches` makes of a step's rows."""
    return [collate(some) for some in parts(rows, MICRO_BATCH)]


def share_of_tokens(read: Read) -> float:
    """The share of rows that is not padding, in the first steps."""
    documents = torch.cat([one.documents for step in range(16) for one in read(step)])
    return float((documents >= 0).float().mean())


def rows_per_second(read: Callable[[int], Any]) -> float:
    """Of one second of work."""
    read(0)
    steps, start = 0, time.process_time()
    while time.process_time() - start < 1:
        read(steps)
        steps += 1
    return steps * BATCH / (time.process_time() - start)


def write(folder: Path, tokens: int) -> dict[str, Shards]:
    """A shard for each source, of documents as long as those of the web."""
    draw = np.random.default_rng(0)
    found = {}
    for name, weight in WEIGHTS.items():
        count = int(tokens * weight)
        lengths = draw.lognormal(6.5, 1, count // 400).astype(np.int32) + 2
        lengths = lengths[: np.searchsorted(np.cumsum(lengths), count)]
        ids = draw.integers(EOS + 1, VOCAB, int(lengths.sum()), np.int32)
        ends = np.cumsum(lengths)
        ids[ends - lengths], ids[ends - 1] = BOS, EOS
        with ShardWriter(folder / name, VOCAB) as writer:
            writer.add_many(ids, lengths)
        found[name] = Shards([Shard(folder / name)])
    return found


if __name__ == "__main__":
    main()
