"""Who shares a key, however many shards and however little memory; and an index of under 300 bytes."""

import random
import subprocess
import sys
import tracemalloc
from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from megachat.data.index import Index, Open, Rows, agreement, band_keys, digests, sketches
from megachat.data.join import BEFORE, KEYS, Hot, Join
from megachat.data.minhash import Texts


def runs(keys: list[list[int]]) -> list[Open]:
    """An index for each shard, with one band; the i-th document has the i-th key."""
    made = []
    for shard in keys:
        own = np.array(shard, dtype=np.uint64)
        order = np.argsort(own, kind="stable")
        rows = order.astype(np.uint32)
        zeros = np.zeros(len(own), dtype=np.uint32)
        short = np.zeros((len(own), 1), np.uint8)
        made.append(partial(getattr, Index(own[order], zeros, rows, own[order][None], rows[None], short)))
    return made


def everyone(shard: int, rows: Rows) -> NDArray[np.bool_]:
    return np.ones(len(rows), dtype=bool)


def listed(pieces: Iterable[tuple[NDArray[np.uint64], NDArray[np.uint64]]]) -> list[tuple[int, int]]:
    return sorted(pair for sides in pieces for pair in zip(*(side.tolist() for side in sides), strict=True))


def join(keys: list[list[int]], memory: int = 1 << 20, most: int = 1000) -> Join:
    offsets = np.cumsum([0, *map(len, keys)][:-1], dtype=np.uint64).astype(np.uint64)
    return Join(offsets, everyone, memory, most)


def found(keys: list[list[int]], memory: int = 1 << 20, parts: int = 1) -> list[tuple[int, int]]:
    pairs = []
    for part in range(parts):
        span = KEYS * part // parts, KEYS * (part + 1) // parts
        pairs += listed(join(keys, memory).pairs(runs(keys), 0, *span))
    return sorted(pairs)


def paired(own: list[int]) -> set[tuple[int, int]]:
    """Each with the first and with some before it."""
    return {
        (own[other], own[place])
        for place in range(len(own))
        for other in {0, *range(place - BEFORE, place)}
        if 0 <= other < place
    }


def test_of_a_few_with_one_key_each_is_paired_with_each() -> None:
    keys = [[7, 9, 7, KEYS - 1], [7, 3, KEYS - 1, 7]]
    # Documents 0, 2, 4, 7 have key 7, of which 2 and 7 may be alike and unlike the others; 3 and 6 have the
    # largest key there is.
    assert found(keys) == [(0, 2), (0, 4), (0, 7), (2, 4), (2, 7), (3, 6), (4, 7)]


def test_of_many_with_one_key_each_is_paired_with_the_first_and_some_before_it() -> None:
    pairs = found([[7] * 1000])
    assert pairs == sorted(paired([*range(1000)]))
    assert len(pairs) < 1000 * (BEFORE + 1)


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
    assert expected == sorted(pair for own in by_key.values() for pair in paired(own))
    assert found(keys, memory, parts) == expected


@pytest.mark.parametrize("memory", [64, 1 << 20])
def test_a_key_of_too_many_pairs_nobody_and_is_told(memory: int) -> None:
    keys = [[5] * 30 + [8, 8], [5] * 11]
    joined = join(keys, memory, most=40)
    assert listed(joined.pairs(runs(keys), 0, 0, KEYS)) == [(30, 31)]
    assert joined.hot == [Hot(41, 0)]


def test_a_key_of_too_many_is_told_though_those_read_first_take_no_part() -> None:
    keys = [[5] * 10, [5] * 20]
    late = Join(np.array([0, 10], np.uint64), lambda shard, rows: np.full(len(rows), shard == 1), 640, most=3)
    assert listed(late.pairs(runs(keys), 0, 0, KEYS)) == []
    assert late.hot == [Hot(20, 10)]
    none = Join(np.array([0, 10], np.uint64), lambda shard, rows: np.zeros(len(rows), bool), 640, most=3)
    assert listed(none.pairs(runs(keys), 0, 0, KEYS)) == []


@pytest.mark.parametrize("memory", [64 * 5, 1 << 20])
def test_exact_copies_are_found_though_one_text_fills_the_memory(memory: int) -> None:
    keys = [[5] * 30 + [8, 8], [9, *[5] * 11]]
    copies, originals = zip(*listed(join(keys, memory).exact_copies(runs(keys), 0, KEYS)), strict=True)
    assert copies == (*range(1, 30), 31, *range(33, 44))
    assert originals == (*[0] * 29, 30, *[0] * 11)


@pytest.mark.slow
def test_a_hot_key_of_millions_stays_within_its_memory(tmp_path: Path) -> None:
    program = """
import functools, resource, numpy as np
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
join = Join(np.zeros(1, np.uint64), lambda shard, rows: np.ones(len(rows), bool), 20_000_000, 100_000)
found = sum(len(left) for left, right in join.pairs([functools.partial(getattr, index)], 0, 0, KEYS))
assert found == 0 and [hot.documents for hot in join.hot] == [many], (found, join.hot)
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


@pytest.mark.parametrize("fast", [False, True])
def test_exact_copies_differ_in_blanks_and_the_case_of_a_to_z_alone(fast: bool) -> None:
    texts = ["A  b\nc", "a b d", "", "a b c ", "A B D", "É", "é", "\0", " \n"]
    found = digests(Texts.of(texts), fast).tolist()
    assert [found.index(one) for one in found] == [0, 1, 2, 0, 1, 5, 6, 7, 2]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(max_size=60), max_size=8))
def test_with_and_without_numba_the_digests_are_the_same(texts: list[str]) -> None:
    encodable = Texts.of([text.encode(errors="replace").decode() for text in texts])
    assert np.array_equal(digests(encodable, fast=True), digests(encodable, fast=False))


def test_the_index_of_a_document_takes_less_than_300_bytes(tmp_path: Path) -> None:
    signatures = np.random.default_rng(0).integers(2**32, size=(2000, 112), dtype=np.uint32)
    texts = Texts.of([f"text {number}" for number in range(2000)])
    part = digests(texts, fast=False), signatures, np.ones(2000, dtype=bool)
    Index.make([part], 2000, bands=14, rows=8).write(tmp_path / "index")
    size = sum(path.stat().st_size for path in (tmp_path / "index").iterdir())
    assert 290 < size / 2000 < 300
    assert np.array_equal(Index.open(tmp_path / "index", "sketches"), signatures.astype(np.uint8))
    assert (np.diff(Index.open(tmp_path / "index", "bands").astype(object), axis=1) >= 0).all()


def test_an_index_is_the_same_in_parts_and_takes_under_400_bytes_a_document_to_make() -> None:
    signatures = np.random.default_rng(0).integers(2**32, size=(40_000, 112), dtype=np.uint32)
    signed = np.arange(40_000) % 5 > 0
    found = digests(Texts.of([f"text {number % 30_000}" for number in range(40_000)]), fast=False)

    def parts(size: int) -> Iterable[tuple[NDArray[Any], NDArray[np.uint32], NDArray[np.bool_]]]:
        for start in range(0, 40_000, size):
            part = slice(start, start + size)
            yield found[part], signatures[part], signed[part]

    whole = Index.make(parts(40_000), 40_000, 14, 8)
    tracemalloc.start()
    made = Index.make(parts(500), 40_000, 14, 8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400 * 40_000
    for name, values in vars(whole).items():
        assert np.array_equal(values, getattr(made, name))
    assert not made.sketches[~signed].any()


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
