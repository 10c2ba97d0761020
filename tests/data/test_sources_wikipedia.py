"""Wikipedia's dumps: articles and nothing else, as prose, one page in memory at a time."""

import bz2
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.sax.saxutils import escape

import mwparserfromhell
import pytest
from mwparserfromhell.parser import ParserError

from megachat.data.document import Broken, Document
from megachat.data.sources import Files, Wikipedia, wikipedia
from megachat.data.sources.wikipedia import plain_text

HEAD = '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" xml:lang="en"><siteinfo></siteinfo>\n'


def page(number: int, title: str, text: str, namespace: int = 0, redirect: str = "") -> str:
    to = f'<redirect title="{redirect}" />' if redirect else ""
    revision = f"<revision><id>9{number}</id><text>{escape(text)}</text></revision>"
    return f"<page><title>{title}</title><ns>{namespace}</ns><id>{number}</id>{to}{revision}</page>\n"


PAGES = [
    page(10, "River", "A '''river''' [[flow]]s."),
    page(11, "Rivers", "#REDIRECT [[River]]", redirect="River"),
    page(12, "Talk:River", "I doubt it.", namespace=1),
    page(13, "Sea &amp; shore", "The [[sea (water)|sea]] is salt &amp; wide."),
]
ARTICLES = [
    Document("10", "River\n\nA river flows.", "wiki"),
    Document("13", "Sea & shore\n\nThe sea is salt & wide.", "wiki"),
]


def source(path: Path, **settings: Any) -> Wikipedia:
    given = {"name": "wiki", "paths": [str(path)], "on_error": "stop", "longest": 1_000_000}
    return Wikipedia(**given | settings)


@pytest.mark.parametrize(
    "name", ["enwiki-articles.xml.bz2", "enwiki-articles1.xml-p1p41242.bz2", "simple.xml"]
)
def test_articles_are_read_and_redirects_and_talk_are_not(tmp_path: Path, name: str) -> None:
    data = (HEAD + "".join(PAGES) + "</mediawiki>").encode()
    # Wikimedia's files are several bz2 streams, one after the other.
    half = len(data) // 2
    packed = bz2.compress(data[:half]) + bz2.compress(data[half:]) if name.endswith("bz2") else data
    (tmp_path / name).write_bytes(packed)
    assert list(source(tmp_path / name).documents()) == ARTICLES
    settings: dict[str, Any] = {"text": "text", "id": None, "language": None, "precise": True}
    files = Files(name="wiki", path=str(tmp_path), on_error="stop", longest=1_000_000, **settings)
    assert list(files.documents()) == ARTICLES


@pytest.mark.parametrize(
    ("wikitext", "text"),
    [
        (
            "'''Ada''' ({{lang|fr|Ada}}; {{x}}) wrote ''[[note (text)|notes]]''.<ref>{{cite|a}}</ref>",
            "Ada wrote notes.",
        ),
        ("Before.\n[[File:A.jpg|thumb|Her [[portrait]] of 1840]]\nAfter.", "Before.\n\nAfter."),
        ("艾达[[文件:A.jpg|缩略图|图]]是人（{{lang|en|Ada}}，）。[[分类:人物]][[en:Ada]]", "艾达是人。"),
        ("== Life ==\n* One\n* [http://example.org Two]", "Life\n One\n Two".replace("\n ", "\n")),
        ("A\n{| class=x\n! a !! b\n|-\n| 1 || {{t}}\n|}\nB", "A\n\nB"),
        (
            "In [[CSI: Miami]], [[Re:Zero]] and [[UFC: Live|a fight]]. [[DE:Ada]][[zh-min-nan:Ada]]",
            "In CSI: Miami, Re:Zero and a fight.",
        ),
        ("He speaks [[de:Deutsch|German]].", "He speaks German."),  # to be read, and not at the margin
        ("See [[:Category:People|the people]].<!-- not this -->", "See the people."),
        ("一台-{zh-hans:计算机; zh-hant:電腦}-和-{A|zh-tw:軟體; zh-cn:软件}-", "一台计算机和软件"),
        ("-{H|zh-cn:软件; zh-tw:軟體}-名为-{只此}-", "名为只此"),
        ("One<br/>two <b>three</b> H<sub>2</sub>O <math>x^2</math>{{{1|}}}", "One\ntwo three H2O"),
        ("a &lt; b &nbsp;c", "a < b \xa0c"),
    ],
)
def test_wikitext_becomes_prose(wikitext: str, text: str) -> None:
    assert plain_text(wikitext) == text


def test_a_dump_cut_off_or_damaged_gives_the_pages_before(tmp_path: Path) -> None:
    data = (HEAD + "".join(PAGES) + "</mediawiki>").encode()
    for name, broken in (("a.xml", data[:-40]), ("b.xml", data.replace(b"<title>Sea", b"<title<Sea"))):
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(ValueError, match=rf"{name}:4: cannot be read"):
            list(source(tmp_path / name).documents())
        quarantine = source(tmp_path / name, on_error="quarantine")
        found = [found for part in quarantine.parts() for found in quarantine.read(part)]
        assert found[:-1] == ARTICLES[:1]
        assert isinstance(found[-1], Broken)


def test_other_xml_is_an_error_and_not_an_empty_corpus(tmp_path: Path) -> None:
    (tmp_path / "feed.xml").write_text("<rss><channel><title>News</title></channel></rss>")
    with pytest.raises(ValueError, match=r"feed\.xml: no dump of Wikipedia: it begins with <rss>"):
        list(source(tmp_path / "feed.xml").documents())
    quarantine = source(tmp_path / "feed.xml", on_error="quarantine")
    assert len([found for part in quarantine.parts() for found in quarantine.read(part)]) == 1


def test_a_page_that_breaks_the_parser_or_comes_twice_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parse(wikitext: str) -> Any:
        if "[[sea" in wikitext:
            raise ParserError("impossible state")
        return mwparserfromhell.parse(wikitext)

    monkeypatch.setattr(wikipedia, "need", lambda _: SimpleNamespace(parse=parse))
    (tmp_path / "a.xml").write_text(HEAD + "".join([*PAGES, PAGES[0]]) + "</mediawiki>")
    rule = source(tmp_path / "a.xml", on_error="quarantine")
    document, unread, twice = [found for part in rule.parts() for found in rule.read(part)]
    assert document == ARTICLES[0]
    assert str(unread).startswith(f"{tmp_path}/a.xml:4: cannot be read (ParserError: ")
    assert str(twice) == f"{tmp_path}/a.xml:5: the id '10' has come before in this file; fetch the dump again"


def test_a_page_that_is_too_long_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text(
        HEAD + page(1, "Long", "x" * 101) + page(2, "Short", "x") + "</mediawiki>"
    )
    with pytest.raises(ValueError, match=r"a\.xml:1: the page is longer than 100 bytes"):
        list(source(tmp_path / "a.xml", longest=100).documents())
    found = source(tmp_path / "a.xml", longest=100, on_error="quarantine").documents()
    assert [document.id for document in found] == ["2"]


def test_a_dump_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield HEAD.encode()
        for number in range(300):
            yield page(number, f"Page {number}", f"{number} " * 20_000, namespace=1).encode()
        yield b"</mediawiki>"

    with (tmp_path / "a.xml").open("wb") as file:
        file.writelines(chunks())
    assert (tmp_path / "a.xml").stat().st_size > 20_000_000
    tracemalloc.start()
    try:
        assert list(source(tmp_path / "a.xml").documents()) == []
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4_000_000
