"""What every source is: parts in a fixed order, and the documents of each."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, final

from megachat.config import Config
from megachat.data.document import Broken, Document, excerpt

LANGUAGES = {"en": "en", "eng": "en", "zh": "zh", "zho": "zh", "chi": "zh", "cmn": "zh", "code": "code"}
"""What the codes of ISO 639 are called here."""


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
        for found in self.records(part):
            if isinstance(found, Broken) and self.on_error == "stop":
                raise ValueError(str(found))
            yield found

    def records(self, part: Part) -> Iterator[Document | Broken]:
        """What a part holds, and in place of what cannot be read, what is wrong with it."""
        raise NotImplementedError


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
        # 8 bytes of hash, not the id: about 100 bytes of memory for each document of a part.
        seen: set[int] = set()
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
            raise ValueError(f"{excerpt(repr(text))} is no text; mend the record or delete it")
        return text

    def _own_id(self, record: Any, seen: set[int]) -> str:
        value = record.get(self.id) if isinstance(record, dict) else None
        if not isinstance(value, str | int) or value == "":
            raise ValueError(f"no id under {self.id!r}; set `id` of the corpus, or `id=null` to number them")
        own = str(value).encode("utf-8", "backslashreplace")
        digest = int.from_bytes(hashlib.blake2b(own, digest_size=8).digest())
        if digest in seen:
            raise ValueError(f"the id {value!r} has come before in this file; remove one, or set `id=null`")
        seen.add(digest)
        return own.decode()

    def _language(self, record: Any) -> str:
        value = record.get(self.language) if isinstance(record, dict) and self.language else None
        if value in (None, ""):
            return ""
        code = str(value).lower().replace("_", "-").partition("-")[0]
        if len(code) > 3 and code not in LANGUAGES:
            raise ValueError(f"{value!r} is no ISO 639 code; `language=null` finds languages out")
        return LANGUAGES.get(code, "other")
