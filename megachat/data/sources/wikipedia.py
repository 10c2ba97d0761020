"""Wikipedia's dumps: `<language>wiki-<date>-pages-articles*.xml*.bz2` of https://dumps.wikimedia.org.

mwparserfromhell reads the wikitext. Files, categories and links to other languages look like links to it, and
the markup of Chinese variants like text.
"""

import re
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

from megachat.data.document import DAMAGE, Broken, Document, damaged, need, open_bytes, too_long
from megachat.data.sources.base import Part
from megachat.data.sources.files import FileSource

NOT_PROSE = ["file", "image", "media", "category", "文件", "檔案", "档案", "图像", "圖像", "分类", "分類"]
"""Namespaces of links that are not part of a sentence."""

LEFT_OUT = {"ref", "table", "gallery", "math", "chem", "score", "timeline", "imagemap", "syntaxhighlight"}
"""Tags of which nothing stays."""

OTHER_LANGUAGE = re.compile(r"[a-z]{2,3}(-[a-z]+)*")

VARIANTS = re.compile(r"-\{(?:([^{}|]*)\|)?([^{}]*)\}-")
"""-{zh-hans:计算机; zh-hant:電腦}-; before a bar stand flags."""

HOLES = re.compile(r"[ \t]*(?:\([\s;,:]*\)|（[\s;,:；，：、]*）)")
"""Brackets of which the templates were all the content."""


class Wikipedia(FileSource):
    """The articles of a dump, title first; the id of a document is that of its page. No redirects."""

    def records(self, part: Part) -> Iterator[Document | Broken]:
        number = 0
        try:
            with open_bytes(part.place) as file:
                for number, page in enumerate(_pages(file), 1):
                    place = f"{part.place}:{number}"
                    if found := self._read(page, place):
                        yield found
        except (ElementTree.ParseError, *DAMAGE) as why:
            yield damaged(f"{part.place}:{number + 1}", why)

    def _read(self, page: Any, place: str) -> Document | Broken | None:
        own, title, wikitext = (
            page.findtext(tag, "") for tag in ("{*}id", "{*}title", "{*}revision/{*}text")
        )
        if page.findtext("{*}ns") != "0" or page.find("{*}redirect") is not None:
            return None
        if not own:
            return Broken(place, "a page without an id; fetch the dump again", title)
        if len(wikitext.encode()) > self.longest:
            return too_long(place, "page", self.longest, wikitext)
        return Document(own, f"{title}\n\n{plain_text(wikitext)}", self.name)


def _pages(file: Any) -> Iterator[Any]:
    """The pages of a dump, one in memory at a time."""
    events = ElementTree.iterparse(file, events=("start", "end"))
    _, root = next(events)
    for event, element in events:
        if event == "end" and element.tag.rpartition("}")[2] == "page":
            yield element
            root.clear()


def plain_text(wikitext: str) -> str:
    """The prose of an article, without templates, tables, references, pictures and categories.

    Example: "'''Ada''' wrote [[note (text)|notes]].{{cn}}" -> "Ada wrote notes."
    """
    code = need("mwparserfromhell").parse(VARIANTS.sub(_variant, wikitext))
    lines = (line.strip() for line in HOLES.sub("", _prose(code)).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _prose(code: Any) -> str:
    """The text of parsed wikitext. Not its own `strip_code`: taking nodes out first is six times slower."""
    return "".join(map(_node, code.nodes)) if code is not None else ""


def _node(node: Any) -> str:
    match type(node).__name__:
        case "Text":
            return str(node.value)
        case "HTMLEntity":
            return str(node.normalize())
        case "Heading" | "ExternalLink":
            return _prose(node.title)
        case "Wikilink":
            namespace, colon, _ = str(node.title).partition(":")
            namespace = namespace.strip().lower()
            if colon and (namespace in NOT_PROSE or OTHER_LANGUAGE.fullmatch(namespace)):
                return ""
            return _prose(node.text or node.title).removeprefix(":")
        case "Tag":
            name = str(node.tag).strip().lower()
            return "\n" if name == "br" else "" if name in LEFT_OUT else _prose(node.contents)
    return ""  # templates, their arguments, comments


def _variant(found: re.Match[str]) -> str:
    """The mainland's form of what is written differently in Chinese-speaking regions."""
    flags, content = found[1] or "", found[2]
    if set(flags) & set("HTD-"):  # rules for the rest of the page, not text
        return ""
    forms = dict(re.findall(r"(zh(?:-\w+)?)\s*:\s*([^;]*)", content))
    for name in ("zh-hans", "zh-cn", "zh"):
        if name in forms:
            return str(forms[name]).strip()
    return str(next(iter(forms.values()), content)).strip()
