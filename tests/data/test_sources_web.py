"""WARC and WET files, written by warcio: pages become their main text, and what is broken is named."""

import gzip
import io
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from megachat.data.document import Broken, Document
from megachat.data.sources import Files, WebArchive

ARTICLE = "The river rises in the hills and meets the sea after a long way through the plain. " * 4
PAGE = f"""<html><head><title>River</title></head><body>
<nav><ul><li><a href="/">Home</a></li><li><a href="/x">Log in</a></li></ul></nav>
<article><h1>The river</h1><p>{ARTICLE}</p><p>{ARTICLE.replace("river", "brook")}</p></article>
<footer>Imprint and cookies</footer></body></html>"""


def archive(*records: dict[str, Any], compressed: bool = True) -> bytes:
    file = io.BytesIO()
    writer = WARCWriter(file, gzip=compressed)
    for record in records:
        content = record.pop("content")
        http = None
        if record["record_type"] == "response":
            http = StatusAndHeaders(
                record.pop("status", "200 OK"), record.pop("headers", HTML), protocol="HTTP/1.1"
            )
        writer.write_record(
            writer.create_warc_record(
                "http://example.org/",
                payload=io.BytesIO(content),
                length=len(content),
                http_headers=http,
                **record,
            )
        )
    return file.getvalue()


HTML = [("Content-Type", "text/html; charset=utf-8")]


def page(own: str, content: bytes = PAGE.encode(), **more: Any) -> dict[str, Any]:
    ids = {"WARC-Record-ID": f"<urn:uuid:{own}>"}
    return {"record_type": "response", "content": content, "warc_headers_dict": ids, **more}


def text(own: str, content: bytes) -> dict[str, Any]:
    ids = {"WARC-Record-ID": f"<urn:uuid:{own}>", "Content-Type": "text/plain"}
    return {
        "record_type": "conversion",
        "content": content,
        "warc_headers_dict": ids,
        "warc_content_type": "text/plain",
    }


def source(path: Path, **settings: Any) -> WebArchive:
    given = {"name": "web", "paths": [str(path)], "on_error": "stop", "longest": 1_000_000, "precise": True}
    return WebArchive(**given | settings)


def read(source: WebArchive) -> list[Document | Broken]:
    return [found for part in source.parts() for found in source.read(part)]


@pytest.mark.parametrize("compressed", [True, False])
def test_a_page_becomes_its_main_text(tmp_path: Path, compressed: bool) -> None:
    path = tmp_path / "a.warc.gz" if compressed else tmp_path / "a.warc"
    path.write_bytes(archive(page("1"), compressed=compressed))
    (document,) = source(path).documents()
    assert (document.id, document.source) == ("urn:uuid:1", "web")
    assert document.text.count("river rises") == 4
    assert document.text.count("brook rises") == 4
    assert not re.search("Home|Log in|Imprint", document.text)


def test_what_is_no_page_that_was_found_is_passed_over(tmp_path: Path) -> None:
    records = [
        page("missing", status="404 Not Found"),
        page("picture", b"\x89PNG", headers=[("Content-Type", "image/png")]),
        {"record_type": "request", "content": b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n"},
        {"record_type": "warcinfo", "content": b"software: a test"},
        page("nothing", b"<html><body></body></html>"),
        page("last"),
    ]
    (tmp_path / "a.warc.gz").write_bytes(archive(*records))
    assert [
        (document.id, bool(document.text)) for document in source(tmp_path / "a.warc.gz").documents()
    ] == [
        ("urn:uuid:nothing", False),  # the filters count it
        ("urn:uuid:last", True),
    ]


@pytest.mark.parametrize("declared", ["; charset=gb18030", "; charset=utf-8", "; charset=nonsense", ""])
def test_chinese_is_read_whatever_the_server_says_of_it(tmp_path: Path, declared: str) -> None:
    sentence = "这条河发源于山中，流经平原，最后汇入大海。沿岸的人们以捕鱼和种田为生。"
    html = PAGE.replace("<head>", '<head><meta charset="gb18030">').replace(ARTICLE, sentence * 5)
    content = html.encode("gb18030")
    (tmp_path / "a.warc.gz").write_bytes(
        archive(page("1", content, headers=[("Content-Type", "text/html" + declared)]))
    )
    (document,) = source(tmp_path / "a.warc.gz").documents()
    assert sentence in document.text


@pytest.mark.parametrize(
    "charset", ["undefined", "a\0b", "hex", "punycode", "idna", "x" * 10_000, "\ud800", "utf-16"]
)
def test_no_charset_that_a_server_names_stops_the_work(tmp_path: Path, charset: str) -> None:
    rule = source(tmp_path / "a.warc")
    assert "river rises" in rule._main_text(PAGE.encode(), charset) or charset == "utf-16"
    long = PAGE.replace("<nav>", "<nav>" + "hill-" * 100_000).encode()
    start = time.process_time()
    rule._main_text(long, charset)
    assert time.process_time() - start < 10  # punycode takes the square of its length


def test_a_page_on_which_trafilatura_fails_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.warc").write_bytes(archive(page("1"), text("2", b"after"), compressed=False))

    def extract(*_: Any, **__: Any) -> str:
        raise RecursionError("too deep")

    monkeypatch.setattr("trafilatura.extract", extract)
    broken, document = read(source(tmp_path / "a.warc", on_error="quarantine"))
    assert str(broken).startswith(
        f"{tmp_path}/a.warc:1: trafilatura cannot read it (RecursionError: too deep)"
    )
    assert document == Document("urn:uuid:2", "after", "web")


def test_an_id_that_comes_twice_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.wet.gz").write_bytes(archive(text("1", b"one"), text("2", b"two"), text("1", b"three")))
    first, second, broken = read(source(tmp_path / "a.wet.gz", on_error="quarantine"))
    assert isinstance(first, Document)
    assert isinstance(second, Document)
    assert str(broken).startswith(f"{tmp_path}/a.wet.gz:3: the id 'urn:uuid:1' has come before in this file")


@pytest.mark.parametrize("after", [b"", b"what does not belong here" * 2000])
def test_a_compressed_page_is_decompressed(tmp_path: Path, after: bytes) -> None:
    headers = [*HTML, ("Content-Encoding", "gzip")]
    packed = gzip.compress(PAGE.encode()) + after
    (tmp_path / "a.warc.gz").write_bytes(archive(page("1", packed, headers=headers)))
    (document,) = source(tmp_path / "a.warc.gz").documents()
    assert "river rises" in document.text


def test_wet_gives_its_text_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.warc.wet.gz"
    path.write_bytes(archive(text("1", "Eins\n二\n".encode()), text("2", b"")))
    documents = [Document("urn:uuid:1", "Eins\n二\n", "web"), Document("urn:uuid:2", "", "web")]
    assert list(source(path).documents()) == documents
    keys: dict[str, Any] = {"text": "text", "id": None, "language": None}
    settings: dict[str, Any] = {"on_error": "stop", "longest": 1_000_000, "precise": True}
    assert list(Files(name="web", path=str(tmp_path), **settings, **keys).documents()) == documents


def test_a_record_that_is_too_long_or_no_utf_8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.wet.gz"
    path.write_bytes(archive(text("1", b"x" * 51), text("2", b"caf\xe9"), text("3", b"y" * 50)))
    with pytest.raises(ValueError, match=r"a\.wet\.gz:1: the record is longer than 50 bytes"):
        read(source(path, longest=50))
    long, latin, document = read(source(path, longest=50, on_error="quarantine"))
    assert str(long).startswith(f"{path}:1: the record is longer")
    assert str(latin).startswith(f"{path}:2: not UTF-8")
    assert document == Document("urn:uuid:3", "y" * 50, "web")


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    headers = [*HTML, ("Content-Encoding", "gzip")]
    bomb = gzip.compress(b"<p>" + b"x" * 50_000_000)
    (tmp_path / "a.warc.gz").write_bytes(archive(page("1", bomb, headers=headers)))
    (broken,) = read(source(tmp_path / "a.warc.gz", on_error="quarantine"))
    assert isinstance(broken, Broken)
    assert "longer than 1,000,000 bytes" in broken.why


@pytest.mark.parametrize("compressed", [True, False])
def test_of_an_archive_cut_off_the_records_before_are_read(tmp_path: Path, compressed: bool) -> None:
    path = tmp_path / "a.warc.gz" if compressed else tmp_path / "a.warc"
    # Some kilobytes before the end are lost with it, so the last record has more.
    last = random.Random(0).randbytes(100_000).hex().encode()
    path.write_bytes(archive(page("1"), text("2", last), compressed=compressed)[:-150])
    with pytest.raises(ValueError, match=r"a\.warc(\.gz)?:2: cannot be read \(.*\); fetch or write"):
        read(source(path))
    first, broken = read(source(path, on_error="quarantine"))
    assert isinstance(first, Document)
    assert first.id == "urn:uuid:1"
    assert str(broken).startswith(f"{path}:2: cannot be read")


def test_an_archive_cut_off_at_once_is_not_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "a.warc.gz"
    path.write_bytes(archive(text("1", b"short"))[:-9])
    with pytest.raises(ValueError, match=r"a\.warc\.gz:1: cannot be read"):
        read(source(path))


def test_what_is_no_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.warc").write_text("not an archive at all\n" * 9)
    with pytest.raises(ValueError, match=r"a\.warc:1: cannot be read"):
        read(source(tmp_path / "a.warc"))
