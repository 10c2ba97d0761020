"""Sources: every format and compression gives the same documents; mistakes are named with file and line."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megachat.config import compose, decode
from megachat.data.sources import JsonLines, Parquet, PlainText, PythonLibrary, Source

TEXTS = ["first text", "第二\n篇"]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def json_lines(path: Path, text: str = "text") -> JsonLines:
    return JsonLines(name="mine", paths=[str(path)], text=text)


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
def test_every_format_and_compression_gives_the_same_texts(tmp_path: Path, kind: str, ending: str) -> None:
    path, pattern = tmp_path / f"a.{kind}{ending}", str(tmp_path / f"*.{kind}{ending}")
    source: Source
    if kind == "jsonl":
        data = "\n".join(json.dumps({"text": text, "url": 1}) for text in TEXTS).encode() + b"\n\n"
        source = JsonLines(name="mine", paths=[pattern], text="text")
    elif kind == "parquet":
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2], "content": TEXTS}), sink)
        data = sink.getvalue().to_pybytes()
        source = Parquet(name="mine", paths=[pattern], text="content")
    else:
        (tmp_path / f"b.{kind}{ending}").write_bytes(COMPRESS[ending](TEXTS[1].encode()))
        data = TEXTS[0].encode()
        source = PlainText(name="mine", paths=[pattern])
    path.write_bytes(COMPRESS[ending](data))
    documents = list(source.documents())
    assert [document.text for document in documents] == TEXTS
    assert {document.source for document in documents} == {"mine"}
    assert len({document.id for document in documents}) == 2
    if kind != "txt":
        assert documents[1].id == f"a.{kind}{ending}:2"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"bad\.jsonl:2: not JSON \(.*\); mend the line or delete it"),
        ('{"content": "x"}', r"bad\.jsonl:2: no text under 'text', the line has content; set `text`"),
        ('{"text": 5}', r"bad\.jsonl:2: no text under 'text', the line has text; set `text`"),
        ("[1]", r"bad\.jsonl:2: no text under 'text', the line has list; set `text`"),
    ],
)
def test_a_bad_line_names_its_file_and_number_and_what_to_do(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        list(json_lines(path).documents())


def test_a_file_cut_off_in_the_middle_is_an_error(tmp_path: Path) -> None:
    data = b"".join(json.dumps({"text": f"text {n**3}"}).encode() + b"\n" for n in range(1000))
    for ending in (".gz", ".zst"):
        path = tmp_path / f"cut.jsonl{ending}"
        path.write_bytes(COMPRESS[ending](data)[:-100])
        with pytest.raises(ValueError, match=rf"cut\.jsonl{ending}:\d+: cannot be read"):
            list(json_lines(path).documents())


def test_the_byte_order_mark_of_windows_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "one"}\r\n{"text": "two"}\r\n')
    assert [document.text for document in json_lines(path).documents()] == ["one", "two"]


def test_a_folder_in_place_of_files_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a folder; name its files, as in .*/\*\*/\*\.txt"):
        list(json_lines(tmp_path).documents())


def test_a_pattern_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file matches '.*none-\*\.jsonl'.*; mend `paths`"):
        list(json_lines(tmp_path / "none-*.jsonl").documents())
    with pytest.raises(ValueError, match="`paths` of the corpus is empty"):
        list(JsonLines(name="mine", paths=[], text="text").documents())


def test_a_file_that_two_patterns_match_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("once")
    source = PlainText(name="mine", paths=[str(tmp_path / "*.txt"), str(tmp_path / "a.*")])
    assert [document.text for document in source.documents()] == ["once"]


def test_ids_stay_when_the_corpus_moves_and_differ_between_its_folders(tmp_path: Path) -> None:
    for name in ("here/x/a.txt", "here/y/a.txt", "b.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "here").rename(tmp_path / "there")
    source = PlainText(name="mine", paths=[str(tmp_path / "there" / "**" / "*.txt")])
    assert [document.id for document in source.documents()] == ["x/a.txt", "y/a.txt"]
    source = PlainText(name="mine", paths=[*source.paths, str(tmp_path / "b.txt")])
    assert [document.id for document in source.documents()] == ["b.txt", "there/x/a.txt", "there/y/a.txt"]


def test_parquet_names_a_missing_column_a_null_and_a_broken_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", None]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet:2: None is no text"):
        list(Parquet(name="mine", paths=[str(path)], text="text").documents())
    with pytest.raises(ValueError, match=r"no column 'body' among \['text'\]"):
        list(Parquet(name="mine", paths=[str(path)], text="body").documents())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"a\.parquet:1: cannot be read"):
        list(Parquet(name="mine", paths=[str(path)], text="text").documents())


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("python_library", PythonLibrary),
        ("json_lines", JsonLines),
        ("plain_text", PlainText),
        ("parquet", Parquet),
    ],
)
def test_every_corpus_in_conf_decodes(choice: str, expected: type[Source]) -> None:
    paths = [] if choice == "python_library" else [f"corpus.{choice}.paths=[a]"]
    stage = decode(compose("clean", [f"corpus=[{choice}]", *paths]))
    assert [type(source) for source in stage.corpus.values()] == [expected]
