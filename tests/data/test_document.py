"""Text shards: what is written is read, damage is named with its place, and an error changes nothing."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from megachat.data.document import Document, read_documents, read_lines, write_documents

DOCUMENTS = [
    Document(id="a", text='line\nline "two"', source="s", language="en"),
    Document(id="b", text="语言模型\u2028\U0001f600", source="s", language="zh"),
    Document(id="c", text="", source="t"),
]


@pytest.mark.parametrize(("per_shard", "shards"), [(1, 3), (2, 2), (3, 1), (100, 1)])
def test_documents_come_back_in_their_order_from_any_number_of_shards(
    tmp_path: Path, per_shard: int, shards: int
) -> None:
    assert write_documents(tmp_path, DOCUMENTS, per_shard) == 3
    assert len(list(tmp_path.glob("text-*.jsonl.zst"))) == shards == len(list(tmp_path.iterdir()))
    assert list(read_documents(tmp_path)) == DOCUMENTS


def test_fewer_shards_leave_none_of_the_old_ones(tmp_path: Path) -> None:
    write_documents(tmp_path, DOCUMENTS, per_shard=1)
    write_documents(tmp_path, DOCUMENTS[:1], per_shard=1)
    assert list(read_documents(tmp_path)) == DOCUMENTS[:1]


def test_an_error_while_writing_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    def broken() -> Iterator[Document]:
        yield from DOCUMENTS
        raise ValueError("the source is broken")

    write_documents(tmp_path, DOCUMENTS[1:], per_shard=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="the source is broken"):
        write_documents(tmp_path, broken(), per_shard=1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_without_shards_names_the_stage_that_writes_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no text-\*\.jsonl\.zst; `megachat clean` writes them"):
        list(read_documents(tmp_path))


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_shard_is_an_error_and_never_a_shorter_corpus(tmp_path: Path, damage: str) -> None:
    write_documents(tmp_path, [Document(str(i), f"text {i * i}", "s") for i in range(100)], per_shard=100)
    shard = tmp_path / "text-00000.jsonl.zst"
    data = bytearray(shard.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    shard.write_bytes(data[:-9] if damage == "cut" else b"" if damage == "empty" else data)
    with pytest.raises(ValueError, match=r"text-00000\.jsonl\.zst:\d+: cannot be read"):
        list(read_documents(tmp_path))


def test_a_line_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"fine\ncaf\xe9\n")
    with pytest.raises(ValueError, match=r"latin\.txt:2: not UTF-8"):
        list(read_lines(path))
