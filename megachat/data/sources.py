"""Where raw text comes from: one class per format, not per data set.

Files may be many (`paths` are patterns) and compressed (.gz, .zst). A broken line is an error with its place,
never skipped: what is silently left out of a corpus is found when the model is trained.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import zstandard

from megachat.config import Config
from megachat.data.document import Document, matching, open_bytes, read_lines
from megachat.data.harvest import library_documents


class Source(Config):
    """A collection of documents."""

    def documents(self) -> Iterator[Document]:
        """All of them, in the same order every time."""
        raise NotImplementedError


class PythonLibrary(Source):
    """The source and documentation of the Python that runs this: the corpus that needs no download."""

    parts: list[Literal["library", "topics", "reference"]]
    """The modules' source; the language reference; an API reference made from the docstrings."""

    def documents(self) -> Iterator[Document]:
        return (document for document in library_documents() if document.source in self.parts)


class JsonLines(Source):
    """One JSON object per line, the text under one key."""

    name: str
    """What the reports call it."""
    paths: list[str]
    """Patterns like data/wiki-*.jsonl.zst; `**` matches folders too."""
    text: str
    """The key of the text."""

    def documents(self) -> Iterator[Document]:
        for name, path in files(self.paths):
            for number, line in read_lines(path):
                if line.strip():
                    text = self._text(path, number, line)
                    yield Document(id=f"{name}:{number}", text=text, source=self.name)

    def _text(self, path: Path, number: int, line: str) -> str:
        try:
            record = json.loads(line)
        except ValueError as why:
            raise ValueError(f"{path}:{number}: not JSON ({why}); mend the line or delete it") from None
        if not isinstance(record, dict) or not isinstance(record.get(self.text), str):
            keys = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
            raise ValueError(
                f"{path}:{number}: no text under {self.text!r}, the line has {keys}; set `text` of the corpus"
            )
        text: str = record[self.text]
        return text


class PlainText(Source):
    """One document per file, UTF-8."""

    name: str
    """What the reports call it."""
    paths: list[str]
    """Patterns like books/**/*.txt."""

    def documents(self) -> Iterator[Document]:
        for name, path in files(self.paths):
            lines = [line for _, line in read_lines(path)]
            yield Document(id=name, text="\n".join(lines), source=self.name)


class Parquet(Source):
    """A column of text in Parquet files."""

    name: str
    """What the reports call it."""
    paths: list[str]
    """Patterns like crawl/*.parquet."""
    text: str
    """The column of the text."""

    def documents(self) -> Iterator[Document]:
        import pyarrow.parquet

        for name, path in files(self.paths):
            row = 0
            try:
                with open_bytes(path) as file:
                    seekable = path.suffix not in (".gz", ".zst")
                    table = pyarrow.parquet.ParquetFile(
                        file if seekable else pyarrow.BufferReader(file.read())
                    )
                    names = table.schema_arrow.names
                    if self.text not in names:
                        raise ValueError(
                            f"{path}: no column {self.text!r} among {names}; set `text` of the corpus"
                        )
                    for batch in table.iter_batches(batch_size=1024, columns=[self.text]):
                        for value in batch.column(0).to_pylist():
                            row += 1
                            if not isinstance(value, str):
                                raise ValueError(
                                    f"{path}:{row}: {value!r} is no text; delete the row or mend it"
                                )
                            yield Document(id=f"{name}:{row}", text=value, source=self.name)
            except (pyarrow.ArrowException, OSError, EOFError, zstandard.ZstdError) as why:
                raise ValueError(f"{path}:{row + 1}: cannot be read ({why}); fetch the file again") from None


def files(patterns: list[str]) -> list[tuple[str, Path]]:
    """The files that match, each once, sorted, with the name that begins the ids of their documents.

    It is the path below the folder common to all files: ids stay the same when a corpus is moved. A pattern
    that matches none is an error.
    """
    found: set[Path] = set()
    for pattern in patterns:
        matches = {path.absolute() for path in matching(pattern, "**/*.txt")}
        if not matches:
            raise ValueError(f"no file matches {pattern!r} (from {Path.cwd()}); mend `paths` of the corpus")
        found |= matches
    if not found:
        raise ValueError("`paths` of the corpus is empty; name at least one file or pattern")
    common = os.path.commonpath([path.parent for path in found])
    return [(_readable(path.relative_to(common)), path) for path in sorted(found)]


def _readable(path: Path) -> str:
    """A path as text that can be written as UTF-8, whatever bytes its name has."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
