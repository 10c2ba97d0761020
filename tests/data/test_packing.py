"""Packing: rows by hand, as good as the packing of conversations, no token lost, none predicted twice."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megachat.align.rows import pack as pack_one_by_one
from megachat.data import packing
from megachat.data.loader import documents_of
from megachat.data.packing import PackedRows, Packing, best_fit, cut, losses, pack
from megachat.data.shards import Shard, Shards, ShardWriter


def starts(lengths: list[int]) -> np.ndarray:
    return np.cumsum([0, *lengths])


def test_documents_go_where_they_leave_the_least_room() -> None:
    # 6 + 2 leave nothing, 4 + 3 leave one: rows of 8 are [6, 2] and [4, 3].
    rows, count = best_fit(np.array([4, 3, 6, 2], np.int32), 8)
    assert (rows.tolist(), count) == ([1, 1, 0, 0], 2)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 40), max_size=80), st.integers(40, 64))
def test_rows_are_as_full_as_those_packed_one_by_one(lengths: list[int], capacity: int) -> None:
    rows, count = best_fit(np.array(lengths, np.int32), capacity)
    filled = np.bincount(rows, weights=lengths, minlength=count) if lengths else np.empty(0)
    other = [sum(lengths[item] for item in row) for row in pack_one_by_one(lengths, capacity)]
    assert Counter(filled.tolist()) == Counter(map(float, other))


def test_only_documents_longer_than_a_row_are_cut_into_windows_that_share_a_token() -> None:
    pieces = cut(starts([4, 7, 1, 8]), 3)
    assert pieces.tolist() == [(0, 4), (4, 4), (7, 4), (12, 4), (15, 4), (18, 2)]


def test_rows_hold_whole_documents_then_padding(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "x", vocab=100) as writer:
        for document in ([10, 11, 12], [20, 21], [30, 31, 32, 33, 34], [40, 41]):
            writer.add(document)
    shards = Shards([Shard(tmp_path / "x")])
    packed = pack(shards.documents, 4)
    rows = PackedRows(shards, 4, packed)
    assert [(row.tokens.tolist(), row.edges) for row in (rows[0], rows[1], rows[2])] == [
        ([30, 31, 32, 33, 34], [0, 5]),
        ([10, 11, 12, 20, 21], [0, 3, 5]),
        ([40, 41, 0, 0, 0], [0, 2]),
    ]
    assert documents_of([rows[2]]).tolist() == [[0, 0, -1, -1, -1]]
    assert len(rows) == 3
    assert losses(shards.documents, packed, 4) == (pytest.approx(3 / 15), 0)
    with pytest.raises(IndexError):
        rows[3]
    packed.save(tmp_path / "packing")
    again = Packing.load(tmp_path / "packing")
    np.testing.assert_array_equal(again.pieces, packed.pieces)
    np.testing.assert_array_equal(again.rows, packed.rows)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(2, 12))
def test_an_epoch_predicts_every_token_but_a_documents_first_exactly_once(
    lengths: list[int], length: int
) -> None:
    documents = starts(lengths)
    packed = pack(documents, length)
    predicted: Counter[int] = Counter()
    for first, last in zip(packed.rows[:-1], packed.rows[1:], strict=True):
        row = packed.pieces[first:last]
        assert 0 < row["length"].sum() <= length + 1
        for start, size in row.tolist():
            predicted.update(range(start + 1, start + size))
    firsts = set(documents.tolist())
    assert predicted == Counter(token for token in range(documents[-1]) if token not in firsts)


def test_a_corpus_packed_in_parts_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.random.default_rng(0).integers(2, 20, 1000)
    whole = pack(starts(lengths.tolist()), 15)
    monkeypatch.setattr(packing, "TOGETHER", 70)
    parts = pack(starts(lengths.tolist()), 15)
    assert sorted(parts.pieces.tolist()) == sorted(whole.pieces.tolist())
    assert len(whole.rows) <= len(parts.rows)
    assert parts.rows[-1] == len(parts.pieces)
