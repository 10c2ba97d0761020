"""Wikipedia's dumps: `<language>wiki-<date>-pages-articles*.xml*.bz2` of https://dumps.wikimedia.org.

mwparserfromhell reads the wikitext. Files, categories and links to other languages look like links to it, and
the markup of Chinese variants like text.
"""

import re
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

from megachat.data.document import DAMAGE, Broken, Document, damaged, need, open_bytes, too_long
from megachat.data.sources.base import Part, Seen
from megachat.data.sources.files import FileSource

NOT_PROSE = ["file", "image", "media", "category", "文件", "檔案", "档案", "图像", "圖像", "分类", "分類"]
"""Namespaces of links that are not part of a sentence."""

LEFT_OUT = {"ref", "table", "gallery", "math", "chem", "score", "timeline", "imagemap", "syntaxhighlight"}
"""Tags of which nothing stays."""

LANGUAGES = frozenset(
    """
    aa ab abr ace ady af ak als alt am ami an ang ann anp ar arc ary arz as ast atj av avk awa ay az azb ba
    ban bar bat-smg bbc bcl bdr be be-tarask be-x-old bew bg bh bi bjn blk bm bn bo bpy br bs btm bug bxr ca
    cbk-zam cdo ce ceb ch cho chr chy ckb co cr crh cs csb cu cv cy da dag de dga din diq dsb dtp dty dv dz
    ee el eml en eo es et eu ext fa fat ff fi fiu-vro fj fo fon fr frp frr fur fy ga gag gan gcr gd gl glk
    gn gom gor got gpe gsw gu guc gur guw gv ha hak haw he hi hif ho hr hsb ht hu hy hyw hz ia iba id ie ig
    igl ii ik ilo inh io is it iu ja jam jbo jv ka kaa kab kbd kbp kcg kg kge ki kj kk kl km kn knc ko koi
    kr krc ks ksh ku kus kv kw ky la lad lb lbe lez lfn lg li lij lld lmo ln lo lrc lt ltg lv lzh mad mai
    map-bms mdf mg mh mhr mi min mk ml mn mni mnw mo mos mr mrj ms mt mus mwl my myv mzn na nah nan nap nds
    nds-nl ne new ng nia nl nn no nov nqo nr nrm nso nup nv ny oc olo om or os pa pag pam pap pcd pcm pdc
    pfl pi pih pl pms pnb pnt ps pt pwn qu rki rm rmy rn ro roa-rup roa-tara rsk ru rue rup rw sa sah sat sc
    scn sco sd se sg sgs sh shi shn shy si simple sk skr sl sm smn sn so sq sr srn ss st stq su sv sw syl
    szl szy ta tay tcy tdd te tet tg th ti tig tk tl tly tn to tpi tr trv ts tt tum tw ty tyv udm ug uk ur
    uz ve vec vep vi vls vo vro wa war wo wuu xal xh xmf yi yo yue za zea zgh zh zh-classical zh-min-nan
    zh-yue zu
    """.split()
)
"""The languages of Wikipedia, with which links to the same article begin; `csi:` and `re:` begin titles."""

VARIANTS = re.compile(r"-\{(?:([^{}|]*)\|)?([^{}]*)\}-")
"""-{zh-hans:计算机; zh-hant:電腦}-; before a bar stand flags."""

HOLES = re.compile(r"(?<![ \t])[ \t]*(?:\([\s;,:]*\)|（[\s;,:；，：、]*）)")
"""Brackets of which the templates were all the content."""


class Wikipedia(FileSource):
    """The articles of a dump, title first; the id of a document is that of its page. No redirects."""

    def records(self, part: Part) -> Iterator[Document | Broken]:
        need("mwparserfromhell")  # here, because what it raises below is the page's fault
        number, seen = 0, Seen("fetch the dump again")
        try:
            with open_bytes(part.place) as file:
                for number, page in enumerate(_pages(file), 1):
                    place = f"{part.place}:{number}"
                    if found := self._read(page, place, seen):
                        yield found
        except (ElementTree.ParseError, *DAMAGE) as why:
            yield damaged(f"{part.place}:{number + 1}", why)
        except _NoDump as why:
            yield Broken(part.place, str(why), excerpt=part.name)

    def _read(self, page: Any, place: str, seen: Seen) -> Document | Broken | None:
        own, title, wikitext = (
            page.findtext(tag, "") for tag in ("{*}id", "{*}title", "{*}revision/{*}text")
        )
        if page.findtext("{*}ns") != "0" or page.find("{*}redirect") is not None:
            return None
        if not own:
            return Broken(place, "a page without an id; fetch the dump again", title)
        if len(wikitext.encode()) > self.longest:
            return too_long(place, "page", self.longest, wikitext)
        try:
            seen.add(own)
        except ValueError as why:
            return Broken(place, str(why), title)
        try:
            return Document(own, f"{title}\n\n{plain_text(wikitext)}", self.name)
        except MemoryError:
            raise
        except Exception as why:  # ParserError, and whatever else hostile markup gets out of a parser
            return Broken(place, f"cannot be read ({type(why).__name__}: {why}); leave the page out", title)


class _NoDump(Exception):
    """XML of another kind."""


def _pages(file: Any) -> Iterator[Any]:
    """The pages of a dump, one in memory at a time."""
    events = ElementTree.iterparse(file, events=("start", "end"))
    _, root = next(events)
    if (name := root.tag.rpartition("}")[2]) != "mediawiki":
        raise _NoDump(f"no dump of Wikipedia: it begins with <{name}>; take the file out of the corpus")
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
            if colon and (namespace in NOT_PROSE or (namespace in LANGUAGES and node.text is None)):
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
