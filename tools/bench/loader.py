"""How many tokens a second a loader reads, on one core: python tools/bench/loader.py [--length 2048]

Random rows of `length` tokens from shards of random tokens in documents of some 700, all in memory: what is
measured is the loader. Time is the processor's, of this process with its threads, held to one core; the best
of three. A program that is not there has `not installed` in its row.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megachat.data.loader import WHOLE, Mixed, Plan, TokenWindows, ahead, share
from megachat.data.mixture import Phase
from megachat.data.packing import PackedRows, pack
from megachat.data.shards import Shard, Shards, ShardWriter

WEIGHTS = {"web": 0.6, "zh": 0.3, "code": 0.1}
BATCH = 64


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=20_000_000, help="in the shards")
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        shards = write(Path(folder), given.tokens)
        print(f"{given.tokens:,} tokens, rows of {given.length:,}; one core", file=sys.stderr)
        print(f"{'':<52}{'rows/s':>10}{'M tokens/s':>12}")
        for name, run in programs(shards, given.length).items():
            try:
                read = run()
            except ImportError:
                print(f"{name:<52}not installed")
                continue
            rate = max(rows_per_second(read) for _ in range(given.repeat))
            print(f"{name:<52}{rate:10,.0f}{rate * given.length / 1e6:12.1f}")


def programs(shards: dict[str, Shards], length: int) -> dict[str, Callable[[], Callable[[int], object]]]:
    """Name -> what makes a function that reads the step of that number."""
    whole = Shards([shard for one in shards.values() for shard in one.shards])

    def memmap() -> Callable[[int], object]:
        tokens = shards["web"].shards[0].tokens
        starts = np.random.default_rng(0).permutation((len(tokens) - 1) // length) * length

        def read(step: int) -> object:
            some = [int(starts[(step * BATCH + row) % len(starts)]) for row in range(BATCH)]
            return [tokens[start : start + length + 1].astype(np.int64) for start in some]

        return read

    def grain_alone() -> Callable[[int], object]:
        import grain

        class Windows:
            def __init__(self, tokens: np.ndarray) -> None:
                self.tokens = tokens

            def __len__(self) -> int:
                return (len(self.tokens) - 1) // length

            def __getitem__(self, number: int) -> np.ndarray:
                return self.tokens[number * length : (number + 1) * length + 1].astype(np.int64)

        orders = [
            grain.MapDataset.source(Windows(one.shards[0].tokens)).shuffle(seed).repeat()
            for seed, one in enumerate(shards.values())
        ]
        samples = grain.MapDataset.mix(orders, [*WEIGHTS.values()])
        return lambda step: [samples[step * BATCH + row] for row in range(BATCH)]

    def ours(phases: list[Phase], packed: bool, steps: int) -> Callable[[], Callable[[int], object]]:
        def make() -> Callable[[int], object]:
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
                return lambda step: share(samples, step * BATCH, BATCH, 0, 1)
            stream = ahead(lambda start: share(samples, start, BATCH, 0, 1), 0, BATCH, steps)
            return lambda step: next(stream)

        return make

    mixture = [Phase(tokens=None, weights=WEIGHTS)]
    return {
        "memmap: windows of one shard": memmap,
        "grain: mixture": grain_alone,
        "megachat: the whole corpus, documents": ours([], False, 0),
        "megachat: mixture, documents": ours(mixture, False, 0),
        "megachat: mixture, documents, a thread reads ahead": ours(mixture, False, 2),
        "megachat: mixture, best fit, documents": ours(mixture, True, 0),
    }


def rows_per_second(read: Callable[[int], object]) -> float:
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
        with ShardWriter(folder / name, 32_000) as writer:
            writer.add_many(draw.integers(0, 32_000, int(lengths.sum())), lengths)
        found[name] = Shards([Shard(folder / name)])
    return found


if __name__ == "__main__":
    main()
