"""Who shares a key, however many shards and however little memory; and an index of under 300 bytes."""

import itertools
import random
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from megachat.data.index import Index, agreement, band_keys, digests, sketches
from megachat.data.join import KEYS, Hot, Join
from megachat.data.minhash import Texts


def runs(keys: list[list[int]]) -> list[Index]:
    """An index for each shard, with one band; the i-th document has the i-th key."""
    made = []
    for shard in keys:
        own = np.array(shard, dtype=np.uint64)
        order = np.argsort(own, kind="stable")
        rows = order.astype(np.uint32)
        zeros = np.zeros(len(own), dtype=np.uint32)
        made.append(
            Index(own[order], zeros, rows, own[order][None], rows[None], np.zeros((len(own), 1), np.uint8))
        )
    return made


def everyone(numbers: NDArray[np.uint64]) -> NDArray[np.bool_]:
    return np.ones(len(numbers), dtype=bool)


def join(keys: list[list[int]], memory: int = 1 << 20, most: int = 1000) -> Join:
    offsets = np.cumsum([0, *map(len, keys)][:-1], dtype=np.uint64).astype(np.uint64)
    return Join(offsets, everyone, memory, most)


def found(keys: list[list[int]], memory: int = 1 << 20, parts: int = 1) -> list[tuple[int, int]]:
    pairs = []
    for part in range(parts):
        span = KEYS * part // parts, KEYS * (part + 1) // parts
        pairs += list(
            zip(*(side.tolist() for side in join(keys, memory).pairs(runs(keys), 0, *span)), strict=True)
        )
    return sorted(pairs)


def test_each_is_paired_with_the_first_of_its_key_and_the_one_before() -> None:
    keys = [[7, 9, 7, KEYS - 1], [7, 3, KEYS - 1, 7]]
    # Documents 0, 2, 4, 7 have key 7, and 3 and 6 the largest key there is.
    assert found(keys) == [(0, 2), (0, 4), (0, 7), (2, 4), (3, 6), (4, 7)]


@pytest.mark.parametrize("memory", [64, 640, 1 << 20])
@pytest.mark.parametrize("parts", [1, 5])
def test_neither_memory_nor_ranges_change_the_pairs(memory: int, parts: int) -> None:
    draw = random.Random(0)
    keys = [
        [draw.choice([draw.randrange(KEYS), 12345, 2**63, 2**63 + 1]) for _ in range(90)] for _ in range(3)
    ]
    by_key = defaultdict(list)
    for number, key in enumerate(key for shard in keys for key in shard):
        by_key[key].append(number)
    expected = found(keys)
    assert max(map(len, by_key.values())) > 640 // 64
    assert expected == sorted(
        {
            pair
            for own in by_key.values()
            for pair in [*itertools.pairwise(own), *((own[0], other) for other in own[1:])]
        }
    )
    assert found(keys, memory, parts) == expected


@pytest.mark.parametrize("memory", [64, 1 << 20])
def test_a_key_of_too_many_pairs_nobody_and_is_told(memory: int) -> None:
    keys = [[5] * 30 + [8, 8], [5] * 11]
    joined = join(keys, memory, most=40)
    left, right = joined.pairs(runs(keys), 0, 0, KEYS)
    assert (left.tolist(), right.tolist()) == ([30], [31])
    assert joined.hot == [Hot(41, 0)]


@pytest.mark.parametrize("memory", [64 * 5, 1 << 20])
def test_exact_copies_are_found_though_one_text_fills_the_memory(memory: int) -> None:
    keys = [[5] * 30 + [8, 8], [9, *[5] * 11]]
    copies, originals = join(keys, memory).exact_copies(runs(keys), 0, KEYS)
    assert copies.tolist() == [*range(1, 30), 31, *range(33, 44)]
    assert originals.tolist() == [0] * 29 + [30] + [0] * 11


@pytest.mark.slow
def test_a_hot_key_of_millions_stays_within_its_memory(tmp_path: Path) -> None:
    program = """
import resource, numpy as np
from megachat.data.index import Index
from megachat.data.join import KEYS, Join
many = 4_000_000
single = np.arange(1000, dtype=np.uint64) << np.uint64(50)
keys = np.sort(np.concatenate([np.full(many, 2**40, np.uint64), single]))
rows = np.arange(len(keys), dtype=np.uint32)
np.save("keys.npy", keys); np.save("rows.npy", rows)
del keys, rows
keys, rows = np.load("keys.npy", mmap_mode="r"), np.load("rows.npy", mmap_mode="r")
index = Index(keys, rows, rows, keys[None], rows[None], np.zeros((1, 1), np.uint8))
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + 100_000_000,) * 2)   # the keys alone would take 256 MB
join = Join(np.zeros(1, np.uint64), lambda numbers: np.ones(len(numbers), bool), 20_000_000, 100_000)
left, right = join.pairs([index], 0, 0, KEYS)
assert len(left) == 0 and [hot.documents for hot in join.hot] == [many], (len(left), join.hot)
"""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        environment = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr


def test_exact_copies_differ_in_blanks_and_the_case_of_a_to_z_alone() -> None:
    found = digests(Texts.of(["A  b\nc", "a b d", "a b c ", "A B D", "É", "é"])).tolist()
    assert [found.index(one) for one in found] == [0, 1, 0, 1, 4, 5]


def test_the_index_of_a_document_takes_less_than_300_bytes(tmp_path: Path) -> None:
    signatures = np.random.default_rng(0).integers(2**32, size=(2000, 112), dtype=np.uint32)
    texts = Texts.of([f"text {number}" for number in range(2000)])
    Index.make(digests(texts), signatures, np.ones(2000, dtype=bool), bands=14).write(tmp_path / "index")
    size = sum(path.stat().st_size for path in (tmp_path / "index").iterdir())
    assert 290 < size / 2000 < 300
    again = Index.read(tmp_path / "index")
    assert np.array_equal(again.sketches, signatures.astype(np.uint8))
    assert (np.diff(again.bands.astype(object), axis=1) >= 0).all()


def test_a_bands_key_is_that_of_its_eight_values_alone() -> None:
    signatures = np.random.default_rng(0).integers(2**32, size=(2, 112), dtype=np.uint32)
    signatures[1, 8:16] = signatures[0, 8:16]
    keys = band_keys(signatures, 14)
    assert (keys[:, 0] == keys[:, 1]).tolist() == [band == 1 for band in range(14)]


def test_eight_bits_estimate_what_the_whole_values_share() -> None:
    draw = np.random.default_rng(0)
    left = draw.integers(2**32, size=(4000, 112), dtype=np.uint32)
    right = np.where(
        draw.random((4000, 112)) < 0.7, left, draw.integers(2**32, size=(4000, 112), dtype=np.uint32)
    )
    estimate = agreement(sketches(left), sketches(right))
    # 448,000 draws of a share of 0.7: one standard error is 0.0007.
    assert estimate.mean() == pytest.approx(0.7, abs=0.003)
    assert agreement(sketches(left), sketches(left)).min() == 1.0
