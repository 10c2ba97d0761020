"""Token shards: the bytes are Megatron's, derived here by hand; a damaged shard is refused."""

import json
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megachat.data import shards
from megachat.data.shards import Shard, ShardWriter
from megachat.files import sha256


def write(prefix: Path, documents: list[list[int]], vocab: int = 300) -> None:
    with ShardWriter(prefix, vocab) as writer:
        for tokens in documents:
            writer.add(tokens)


# What megatron-core 0.16.1 wrote; per kind of ids, with docs = [[1, 258, 3], [7]] or [[1, 70000, 3], [7]]:
#   builder = IndexedDatasetBuilder("x.bin", dtype=numpy.uint16 or numpy.int32)
#   for doc in docs: builder.add_document(torch.tensor(doc), [len(doc)])
#   builder.finalize("x.idx")
COUNTS = "02000000000000000300000000000000" + "0300000001000000"  # sequences, bounds; lengths
BOUNDS = "000000000000000001000000000000000200000000000000"
MEGATRON = {
    300: (
        "0100020103000700",
        "4d4d49444944580000"
        + "0100000000000000"
        + "08"
        + COUNTS
        + "00000000000000000600000000000000"
        + BOUNDS,
    ),
    70_001: (
        "01000000701101000300000007000000",
        "4d4d49444944580000"
        + "0100000000000000"
        + "04"
        + COUNTS
        + "00000000000000000c00000000000000"
        + BOUNDS,
    ),
}


@pytest.mark.parametrize(("vocab", "second"), [(300, 258), (70_001, 70_000)])
def test_a_shard_is_to_the_byte_what_megatron_core_writes(tmp_path: Path, vocab: int, second: int) -> None:
    write(tmp_path / "x", [[1, second, 3], [7]], vocab)
    written = tuple((tmp_path / f"x.{kind}").read_bytes().hex() for kind in ("bin", "idx"))
    assert written == MEGATRON[vocab]


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


def test_a_mask_stands_beside_and_is_read_with_its_tokens(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "chat", 300, masked=True) as writer:
        writer.add([5, 6, 7], [0, 1, 1])
        writer.add([8], [0])
    assert (tmp_path / "chat.mask.bin").read_bytes() == bytes([0, 1, 1, 0])
    mask = Shard(tmp_path / "chat").mask
    assert mask is not None
    assert mask.tolist() == [0, 1, 1, 0]
    (tmp_path / "chat.mask.bin").write_bytes(bytes(3))
    with pytest.raises(ValueError, match=r"chat\.mask\.bin holds 3 bytes for 4 tokens"):
        _ = Shard(tmp_path / "chat").mask
    write(tmp_path / "text", [[1]])
    assert Shard(tmp_path / "text").mask is None


@pytest.mark.parametrize("mask", [None, [0, 1], [0, 1, 2]])
def test_a_mask_that_does_not_fit_its_tokens_is_our_mistake(tmp_path: Path, mask: list[int] | None) -> None:
    with pytest.raises(AssertionError), ShardWriter(tmp_path / "x", 300, masked=True) as writer:
        writer.add([1, 2, 3], mask)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_a_shard_put_together_from_parts_is_the_one_written_at_once(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "CHUNK", chunk)
    documents = [[1, 2], [3], [4, 5, 6, 7, 8], [9], [10, 11]]
    write(tmp_path / "whole", documents)
    write(tmp_path / "a", documents[:3])
    write(tmp_path / "none", [])
    write(tmp_path / "b", documents[3:])
    with ShardWriter(tmp_path / "joined", 300) as writer:
        for name in ("a", "none", "b"):
            writer.append(Shard(tmp_path / name))
    for kind in ("bin", "idx"):
        assert (tmp_path / f"joined.{kind}").read_bytes() == (tmp_path / f"whole.{kind}").read_bytes()


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


def test_where_documents_begin_is_read_for_any_part(tmp_path: Path) -> None:
    lengths = [1, 5, 1, 1, 7, 2] * 40
    write(tmp_path / "x", [[1] * length for length in lengths])
    shard = Shard(tmp_path / "x")
    begins = [0, *np.cumsum(lengths).tolist()]
    assert shard.starts(0, 241).tolist() == begins
    assert shard.starts(7, 9).tolist() == begins[7:9]
    for start in range(0, begins[-1], 3):
        for stop in {start + 1, start + 20, begins[-1]}:
            found = shard.within(start, stop)
            assert found == [begin for begin in begins[:-1] if start < begin < stop]


def test_opening_a_shard_and_reading_a_window_holds_none_of_its_index(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "x", 300) as writer:
        writer.add_many(np.ones(3_000_000, np.int64), np.full(1_000_000, 3))
    tracemalloc.start()
    shard = Shard(tmp_path / "x")
    assert shard.within(1_500_000, 1_500_010) == [1_500_003, 1_500_006, 1_500_009]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000  # the index takes 20 MB


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
    remedy = "copy the file again, or delete the folder and run `megachat encode` again"
    with pytest.raises(ValueError, match=rf"x\.bin holds 5 bytes, its index 6; {remedy}"):
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


def test_a_file_that_is_not_as_it_was_written_is_named_by_the_rank_whose_share_it_is(tmp_path: Path) -> None:
    entries = {}
    for prefix, documents in (("train/a", [[1, 2, 3, 4]]), ("train/b", [[5]])):
        write(tmp_path / prefix, documents)
        sums = {kind: sha256(tmp_path / f"{prefix}.{kind}") for kind in ("bin", "idx")}
        entries[prefix] = {"split": "train", "source": prefix[-1], "sha256": sums}
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": entries}))
    sums = shards.written(tmp_path)
    assert shards.first_damaged(sums) is None
    (tmp_path / "train" / "b.bin").write_bytes(b"\x04\x00")
    found = [shards.first_damaged(sums, share, 3) for share in range(3)]
    assert [path for path in found if path] == [tmp_path / "train" / "b.bin"]
