"""The embedded corpus as a source."""

from collections.abc import Iterator
from typing import Literal

from megachat.data.document import Document
from megachat.data.harvest import library_document, library_outline
from megachat.data.sources.base import Part, Source

PARTS = 16
SIZE = 1_000_000
"""Bytes of a part, about."""


class PythonLibrary(Source):
    """The source and documentation of the Python that runs this: the corpus that needs no download."""

    include: list[Literal["library", "topics", "reference"]]
    """The modules' source; the language reference; an API reference made from the docstrings."""

    def parts(self) -> list[Part]:
        return [Part(f"python-{number:02}", size=SIZE) for number in range(PARTS)]

    def read(self, part: Part) -> Iterator[Document]:
        outline = [(kind, name) for kind, name in library_outline() if kind in self.include]
        number = int(part.name.removeprefix("python-"))
        start, end = (len(outline) * edge // PARTS for edge in (number, number + 1))
        for kind, name in outline[start:end]:
            document = library_document(kind, name)
            if document is not None:
                yield document
