"""Token shards: the bytes are Megatron's, derived here by hand; a damaged shard is refused."""

import struct
from pathlib import Path

import numpy as np
import pytest

from megachat.data.shards import Shard, ShardWriter


def write(prefix: Path, documents: list[list[int]], vocab: int = 300) -> None:
    with ShardWriter(prefix, vocab) as writer:
        for tokens in documents:
            writer.add(tokens)


def test_two_documents_have_the_bytes_of_megatrons_format(tmp_path: Path) -> None:
    write(tmp_path / "train", [[1, 258, 3], [7]])
    assert (tmp_path / "train.bin").read_bytes() == bytes([1, 0, 2, 1, 3, 0, 7, 0])
    assert (tmp_path / "train.idx").read_bytes() == (
        b"MMIDIDX\x00\x00"
        + struct.pack("<Q", 1)  # version
        + b"\x08"  # uint16
        + struct.pack("<QQ", 2, 3)  # sequences, document bounds
        + struct.pack("<ii", 3, 1)  # lengths
        + struct.pack("<qq", 0, 6)  # the bytes they start at
        + struct.pack("<qqq", 0, 1, 2)  # the first sequence of each document, and the end
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.bin", "train.idx"]


@pytest.mark.parametrize(("vocab", "kind", "bytes_each"), [(65_536, 8, 2), (65_537, 4, 4)])
def test_ids_are_as_narrow_as_the_vocabulary_allows(
    tmp_path: Path, vocab: int, kind: int, bytes_each: int
) -> None:
    write(tmp_path / "x", [[0, vocab - 1]], vocab)
    assert (tmp_path / "x.idx").read_bytes()[17] == kind
    assert (tmp_path / "x.bin").stat().st_size == 2 * bytes_each
    assert Shard(tmp_path / "x").tokens.tolist() == [0, vocab - 1]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path / "a.b", [[1, 2], [3], [4, 5, 6]])  # a point in the name is part of the name
    shard = Shard(tmp_path / "a.b")
    assert len(shard) == 3
    assert shard.documents.tolist() == [0, 2, 3, 6]
    assert shard.documents.dtype == np.int64
    assert shard.tokens.tolist() == [1, 2, 3, 4, 5, 6]


def test_a_shard_may_hold_nothing(tmp_path: Path) -> None:
    write(tmp_path / "empty", [])
    shard = Shard(tmp_path / "empty")
    assert (len(shard), shard.documents.tolist(), len(shard.tokens)) == (0, [0], 0)


def test_documents_of_several_sequences_as_megatron_writes_them_are_read(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1, 2], [3], [4, 5, 6]])
    data = (tmp_path / "x.idx").read_bytes()
    bounds = struct.pack("<qqq", 0, 2, 3)  # the first document holds the first two sequences
    (tmp_path / "x.idx").write_bytes(data[:26] + struct.pack("<Q", 3) + data[34 : 34 + 3 * 12] + bounds)
    assert Shard(tmp_path / "x").documents.tolist() == [0, 3, 6]


def test_an_error_while_writing_keeps_the_earlier_shard(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1]])
    with pytest.raises(AssertionError):
        write(tmp_path / "x", [[2], [3], [999]])
    assert Shard(tmp_path / "x").tokens.tolist() == [1]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("tokens", [[300], [-1], []])
def test_an_id_outside_the_vocabulary_and_an_empty_document_are_our_mistakes(
    tmp_path: Path, tokens: list[int]
) -> None:
    with pytest.raises(AssertionError):
        write(tmp_path / "x", [tokens])
    assert not list(tmp_path.iterdir())


def test_missing_and_damaged_files_are_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.idx is missing; `megachat encode` writes it"):
        Shard(tmp_path / "none")
    write(tmp_path / "x", [[1, 2, 3]])
    index, binary = tmp_path / "x.idx", tmp_path / "x.bin"
    data, ids = index.read_bytes(), binary.read_bytes()
    binary.write_bytes(ids[:-1])
    with pytest.raises(ValueError, match=r"x\.bin holds 5 bytes, its index 6; run `megachat encode` again"):
        Shard(tmp_path / "x")
    binary.write_bytes(ids)
    for damaged, message in (
        (data[:-8], "is not what it says of itself"),
        (data[:20], "is not the index of a token shard"),
        (b"x" + data[1:], "is not the index of a token shard"),
        (data[:9] + b"\x02" + data[10:], "has version 2"),
        (data[:17] + b"\x06" + data[18:], "ids of kind 6"),
        (data[:-8] + struct.pack("<q", 0), "do not cover its tokens"),
    ):
        index.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            Shard(tmp_path / "x")
