"""What cannot be read is an error with its place, or is set aside while the rest is read."""

import bz2
import errno
import gzip
import io
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megachat.data.document import Broken, Document
from megachat.data.sources import JsonLines, Parquet, PlainText, Source
from megachat.data.sources.base import Outside

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
FILE: dict[str, Any] = {"name": "mine", "on_error": "stop", "longest": 1_000_000}
KEYS: dict[str, Any] = {"text": "text", "id": None, "language": None}


def json_lines(path: Path, **settings: Any) -> JsonLines:
    return JsonLines(**FILE | KEYS | {"paths": [str(path)]} | settings)


def both(source: Outside, message: str) -> tuple[list[Document], list[Broken]]:
    """Checks that the source stops with `message`; gives what it reads, and sets aside, when it need not."""
    with pytest.raises(ValueError, match=message):
        list(source.documents())
    found = list(everything(source.model_copy(update={"on_error": "quarantine"})))
    broken = [item for item in found if isinstance(item, Broken)]
    with pytest.raises(ValueError, match=message):
        raise ValueError(str(broken[0]))
    return [item for item in found if isinstance(item, Document)], broken


def everything(source: Source) -> list[Document | Broken]:
    return [found for part in source.parts() for found in source.read(part)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"bad\.jsonl:2: not JSON \(.*\); mend the line or delete it"),
        (b"[" * 100_000, r"bad\.jsonl:2: not JSON \(.*recursion.*\); mend"),
        (
            b'{"content": "x"}',
            r"bad\.jsonl:2: no text under 'text', it has content; set `text`",
        ),
        (b'{"text": 5}', r"bad\.jsonl:2: 5 is no text; mend the record or delete it"),
        (b"[1]", r"bad\.jsonl:2: no text under 'text', it has list; set `text`"),
        (b'{"text": "caf\xe9"}', r"bad\.jsonl:2: not UTF-8 \(.*0xe9.*\); convert the file to UTF-8"),
        (b"x" * 1_000_001, r"bad\.jsonl:2: the line is longer than 1,000,000 bytes; cut it up, or raise"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b'\n{"text": "fine again"}\n')
    documents, broken = both(json_lines(path), message)
    assert [document.id for document in documents] == ["bad.jsonl:1", "bad.jsonl:3"]
    (only,) = broken
    assert only.place == f"{path}:2"
    assert len(only.excerpt) <= 4 * 200
    json.dumps(only.excerpt).encode()


@pytest.mark.parametrize("text", ['[{"text": "a"}]', '[\n  {"text": "a"},\n  {"text": "b"}\n]\n', "  [ {\n"])
def test_a_json_array_is_told_from_json_lines_once(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    documents, broken = both(
        json_lines(tmp_path / "a.json"), r"a\.json:1: one array, not .* `jq -c '\.\[\]'`"
    )
    assert (len(documents), len(broken)) == (0, 1)


def test_a_place_whose_name_is_no_utf_8_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode("中文.jsonl".encode("gbk"))
    path.write_text('{"text": "fine"}\n{\n')
    documents, (broken,) = both(json_lines(path), r"\\xd6\\xd0\\xce\\xc4\.jsonl:2: not JSON")
    assert len(documents) == 1
    json.dumps(broken.place, ensure_ascii=False).encode()


def test_a_row_of_parquet_that_is_no_utf_8_is_one_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = pyarrow.array([b"one", b"caf\xe9", "三".encode()], pyarrow.binary())
    unchecked = pyarrow.Array.from_buffers(pyarrow.string(), 3, texts.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": unchecked, "id": ["a", "b", "c"]}), path)
    source = Parquet(**FILE | KEYS | {"paths": [str(path)], "id": "id"})
    documents, (broken,) = both(source, r"a\.parquet:2: not UTF-8 \(.*0xe9.*\); mend the row")
    assert [(document.id, document.text) for document in documents] == [("a", "one"), ("c", "三")]
    assert broken.excerpt == "caf\\xe9"


def test_a_line_of_exactly_the_longest_size_is_read(tmp_path: Path) -> None:
    line = b'{"text": "abc"}'
    for ending in (b"", b"\n"):
        (tmp_path / "a.jsonl").write_bytes(line + ending)
        assert len(everything(json_lines(tmp_path / "a.jsonl", longest=len(line)))) == 1
        with pytest.raises(ValueError, match="longer than 14 bytes"):
            everything(json_lines(tmp_path / "a.jsonl", longest=len(line) - 1))


@pytest.mark.parametrize(("ending", "megabytes"), [("", 100), (".zst", 100), (".gz", 20), (".bz2", 20)])
def test_a_line_of_100_megabytes_is_passed_over_without_being_held(
    tmp_path: Path, ending: str, megabytes: int
) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    data = b'{"text": "' + b"x" * megabytes * 1_000_000 + b'"}\n{"text": "after"}\n'
    path.write_bytes(COMPRESS[ending](data) if ending else data)
    del data
    source = json_lines(path, on_error="quarantine")
    before = pyarrow.default_memory_pool().max_memory()
    tracemalloc.start()
    try:
        found = everything(source)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [type(item) for item in found] == [Broken, Document]
    assert str(found[0]).startswith(f"{path}:1: the line is longer than 1,000,000 bytes")
    assert peak < 10_000_000
    assert pyarrow.default_memory_pool().max_memory() - before < 10_000_000


@pytest.mark.parametrize("ending", COMPRESS)
def test_of_a_file_cut_off_in_the_middle_the_beginning_is_read(tmp_path: Path, ending: str) -> None:
    texts = [str(n**300) for n in range(2_500)]  # 2.4 MB
    data = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
    path = tmp_path / f"cut.jsonl{ending}"
    path.write_bytes(COMPRESS[ending](data)[:-100])
    documents, (broken,) = both(json_lines(path), rf"cut\.jsonl{ending}:\d+: cannot be read")
    assert [document.text for document in documents] == texts[: len(documents)]
    assert broken.place == f"{path}:{len(documents) + 1}"
    # bz2 has blocks of 900 kB, one of which is lost; zstd's have 128 kB.
    assert len(documents) > (1_200 if ending == ".bz2" else 2_200)


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_flipped_bit_is_noticed(tmp_path: Path, ending: str) -> None:
    data = bytearray(COMPRESS[ending](b"".join(b'{"text": "%d"}\n' % n**3 for n in range(10_000))))
    data[len(data) // 2] ^= 1
    (tmp_path / f"a.jsonl{ending}").write_bytes(data)
    both(json_lines(tmp_path / f"a.jsonl{ending}"), rf"a\.jsonl{ending}:\d+: (cannot be read|not )")


def test_an_empty_file_has_no_lines_and_an_empty_compressed_one_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    assert everything(json_lines(tmp_path / "a.jsonl")) == []
    for ending, compress in COMPRESS.items():
        path = tmp_path / f"a.jsonl{ending}"
        path.write_bytes(compress(b""))
        assert everything(json_lines(path)) == []
        path.write_bytes(b"")
        documents, broken = both(json_lines(path), r":1: cannot be read \(it is empty, which")
        assert (len(documents), len(broken)) == (0, 1)


@pytest.mark.parametrize("on_error", ["stop", "quarantine"])
def test_empty_documents_are_for_the_filters_to_count(tmp_path: Path, on_error: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n\n{"text": " "}\n')
    (tmp_path / "a.txt").write_text("")
    found = everything(json_lines(tmp_path / "a.jsonl", on_error=on_error))
    assert found == [Document("a.jsonl:1", "", "mine"), Document("a.jsonl:3", " ", "mine")]
    settings = FILE | {"on_error": on_error, "paths": [str(tmp_path / "a.txt")]}
    assert everything(PlainText(**settings)) == [Document("a.txt", "", "mine")]


def test_an_id_that_comes_twice_or_is_missing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"id": "x"}, {"id": "y"}, {"id": "x"}, {"id": 7}, {"id": ""}, {"id": None}, {}]
    path.write_text("".join(json.dumps(row | {"text": "t"}) + "\n" for row in rows))
    documents, broken = both(json_lines(path, id="id"), r"a\.jsonl:3: the id 'x' has come before")
    assert [document.id for document in documents] == ["x", "y", "7"]
    assert [item.place for item in broken] == [f"{path}:{line}" for line in (3, 5, 6, 7)]
    assert "no id under 'id'" in broken[1].why


def test_a_programming_language_is_no_language(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "lang": "Python"}\n')
    both(json_lines(tmp_path / "a.jsonl", language="lang"), r"a\.jsonl:1: 'Python' is no ISO 639 code")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"fine\ncaf\xe9\n", r"a\.txt:2: not UTF-8"),
        (b"fine\n" + b"x" * 100, r"a\.txt:2: the line is longer than 50 bytes"),
        (b"fine\n" * 11, r"a\.txt:11: the file is longer than 50 bytes"),
    ],
)
def test_a_text_that_cannot_be_read_is_no_document_at_all(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "b.txt").write_bytes(b"12345678\n" * 5 + b"12345")  # 50 bytes
    source = PlainText(**FILE | {"paths": [str(tmp_path / "*.txt")], "longest": 50})
    documents, broken = both(source, message)
    assert [document.id for document in documents] == ["b.txt"]
    assert len(broken) == 1


def test_parquet_names_a_missing_column_a_null_a_long_row_and_a_broken_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", None, "long" * 9, "y"]}), path)
    source = Parquet(**FILE | KEYS | {"paths": [str(path)], "longest": 20})
    documents, broken = both(source, r"a\.parquet:2: null is no text; mend the record or delete it")
    assert [document.id for document in documents] == ["a.parquet:1", "a.parquet:4"]
    assert str(broken[1]).startswith(f"{path}:3: the row is longer than 20 bytes")
    for on_error in ("stop", "quarantine"):
        with pytest.raises(ValueError, match=r"no column 'body' among \['text'\]"):
            everything(source.model_copy(update={"text": "body", "on_error": on_error}))
    path.write_bytes(path.read_bytes()[:-20])
    documents, broken = both(source, r"a\.parquet:1: cannot be read")
    assert (len(documents), len(broken)) == (0, 1)


def test_a_parquet_file_that_is_damaged_inside_gives_the_rows_before(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"{n**5}" for n in range(4000)]})
    pyarrow.parquet.write_table(
        table, path, row_group_size=1000, use_dictionary=False, compression="zstd", write_page_checksum=True
    )
    data = bytearray(path.read_bytes())
    group = pyarrow.parquet.read_metadata(path).row_group(2).column(0)
    data[group.data_page_offset + group.total_compressed_size // 2] ^= 1
    path.write_bytes(data)
    source = Parquet(**FILE | KEYS | {"paths": [str(path)]})
    documents, (broken,) = both(source, r"a\.parquet:\d+: cannot be read")
    assert [document.text for document in documents] == [f"{n**5}" for n in range(len(documents))]
    assert len(documents) >= 1000
    assert broken.place == f"{path}:{len(documents) + 1}"


@pytest.mark.parametrize("on_error", ["stop", "quarantine"])
def test_a_disk_that_fails_is_never_taken_for_a_bad_file(
    tmp_path: Path, on_error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    source = json_lines(tmp_path / "a.jsonl", on_error=on_error)

    class Failing(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, _: Any) -> int:
            raise OSError(errno.EIO, "Input/output error")

    parts = source.parts()
    monkeypatch.setattr("megachat.data.document._open", lambda place: io.BufferedReader(Failing()))
    with pytest.raises(ValueError, match=r"a\.jsonl:1: cannot be read \(.*Input/output error\)"):
        list(source.read(parts[0]))
