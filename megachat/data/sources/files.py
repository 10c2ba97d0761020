"""Files of text and of tables: JSON lines, plain text, Parquet; and a folder in which all kinds lie mixed.

Any of them may be compressed (.gz, .bz2, .zst), and lie anywhere that fsspec reaches.
"""

import json
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from pydantic import PositiveInt

from megachat.data.document import (
    COMPRESSED,
    DAMAGE,
    Broken,
    Document,
    damaged,
    excerpt,
    open_bytes,
    scan_lines,
    too_long,
)
from megachat.data.sources.base import Keys, Outside, Part
from megachat.data.sources.places import files

BATCH = 1 << 23
"""Bytes of Parquet's text that are Python's at a time, or the longest row."""

KNOWN = [".jsonl", ".json", ".parquet", ".txt", ".md", ".warc", ".wet", ".xml", *COMPRESSED]
"""Endings that `Files` knows; the last three come after one of the others."""


_array = re.compile(r"\s*\[\s*(\{|$)")
"""How a file of JSON begins that is no JSON lines."""


class FileSource(Outside):
    """Files; each is a part."""

    paths: list[str]
    """Patterns like data/wiki-*.jsonl.zst or s3://bucket/crawl/**/*.parquet; `**` matches folders too."""
    longest: PositiveInt
    """Bytes of the longest line, row, record, or file that is a document; a longer one cannot be read."""

    def parts(self) -> list[Part]:
        return files(self.paths, "paths")


class JsonLines(Keys, FileSource):
    """One JSON object per line, the text under one key."""

    def records(self, part: Part) -> Iterator[Document | Broken]:
        return self.documents_of(self._objects(part), part, self.name)

    def _objects(self, part: Part) -> Iterator[tuple[int, Any]]:
        for number, line in scan_lines(part.place, self.longest):
            if isinstance(line, Broken):
                yield number, line
            elif number == 1 and _array.match(line):
                message = "one array, not an object on each line; convert it, as with `jq -c '.[]'`"
                yield number, Broken(f"{part.place}:{number}", message, excerpt(line))
                return
            elif line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as why:
                    message = f"not JSON ({why}); mend the line or delete it"
                    yield number, Broken(f"{part.place}:{number}", message, excerpt(line))


class PlainText(FileSource):
    """One document per file, UTF-8."""

    def records(self, part: Part) -> Iterator[Document | Broken]:
        lines: list[str] = []
        size = 0
        for number, line in scan_lines(part.place, self.longest):
            if isinstance(line, Broken):
                yield line
                return
            size += len(line.encode()) + 1
            if size > self.longest + 1:
                yield too_long(f"{part.place}:{number}", "file", self.longest, lines[0])
                return
            lines.append(line)
        yield Document(id=part.name, text="\n".join(lines), source=self.name)


class Parquet(Keys, FileSource):
    """A column of text in Parquet files."""

    def records(self, part: Part) -> Iterator[Document | Broken]:
        return self.documents_of(self._rows(part), part, self.name)

    def _rows(self, part: Part) -> Iterator[tuple[int, Any]]:
        import pyarrow.parquet

        row = 0
        try:
            with open_bytes(part.place) as file:
                # Parquet is read from its end: what is compressed must be in memory as a whole.
                whole = part.place.lower().endswith(COMPRESSED)
                table = pyarrow.parquet.ParquetFile(
                    pyarrow.BufferReader(file.read()) if whole else file,
                    buffer_size=1 << 20,
                    page_checksum_verification=True,
                )
                names = table.schema_arrow.names
                for column in self.keys:
                    if column not in names:
                        raise ValueError(f"{part.place}: no column {column!r} among {names}; mend the corpus")
                groups = [table.metadata.row_group(number) for number in range(table.num_row_groups)]
                largest = max(
                    (group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0
                )
                rows = max(1, min(1024, BATCH // (largest + 1)))
                for batch in table.iter_batches(batch_size=rows, columns=self.keys):
                    for record in _records(batch):
                        row += 1
                        if isinstance(record, UnicodeDecodeError):
                            message = f"not UTF-8 ({record}); mend the row or delete it"
                            yield row, Broken(f"{part.place}:{row}", message, excerpt(record.object))
                            continue
                        text = record[self.text]
                        if isinstance(text, str) and len(text.encode()) > self.longest:
                            yield row, too_long(f"{part.place}:{row}", "row", self.longest, text)
                        else:
                            yield row, record
        except (pyarrow.ArrowException, *DAMAGE) as why:
            yield row + 1, damaged(f"{part.place}:{row + 1}", why)


def _records(batch: Any) -> Iterator[Any]:
    """The rows of a batch, and in place of one that is no UTF-8 the error."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for row in range(batch.num_rows):
            try:
                yield from batch.slice(row, 1).to_pylist()
            except UnicodeDecodeError as why:
                yield why


HIDDEN = "_", "."


class Files(Keys, Outside):
    """A folder, or a pattern; the name of each file says how it is read."""

    path: str
    """A folder, all files of which are meant but those named _ or . in front, or a pattern."""
    longest: PositiveInt
    """Bytes of the longest line, row, record, or file that is a document; a longer one cannot be read."""
    precise: bool
    """Of web pages: drop what may be boilerplate, at the price of some text."""

    def parts(self) -> list[Part]:
        found = files([self.path], "path", folders=True)
        # _SUCCESS, _metadata: what Spark and its kin say about the data that it stands among.
        if not PurePosixPath(self.path).name.startswith(HIDDEN):
            found = [part for part in found if not PurePosixPath(part.name).name.startswith(HIDDEN)]
        unknown = [part.place for part in found if self._reader(part) is None]
        if unknown and self.on_error == "stop":
            raise ValueError(
                f"{unknown[0]}: its name does not say how to read it ({len(unknown)} such files); give "
                f"`path` a pattern without them, or set on_error=quarantine. Known are {', '.join(KNOWN)}"
            )
        return found

    def records(self, part: Part) -> Iterator[Document | Broken]:
        reader = self._reader(part)
        if reader is not None:
            return reader.records(part)
        why = f"its name does not say how to read it; known are {', '.join(KNOWN)}"
        return iter([Broken(part.place, why, excerpt=part.name)])

    def _reader(self, part: Part) -> FileSource | None:
        # Here, because they are `FileSource`s of this module.
        from megachat.data.sources.web import WebArchive
        from megachat.data.sources.wikipedia import Wikipedia

        name = PurePosixPath(part.name.lower())
        ending = (name.with_suffix("") if name.suffix in COMPRESSED else name).suffix
        settings = self.model_dump(exclude={"path", "text", "id", "language", "precise"})
        settings |= {"paths": [part.place]}
        keys: dict[str, Any] = {"text": self.text, "id": self.id, "language": self.language}
        if ending in (".jsonl", ".json"):
            return JsonLines(**settings, **keys)
        if ending == ".parquet":
            return Parquet(**settings, **keys)
        if ending in (".txt", ".md"):
            return PlainText(**settings)
        if ending in (".warc", ".wet"):
            return WebArchive(**settings, precise=self.precise)
        # Wikimedia cuts its dumps into enwiki-...-articles1.xml-p1p41242.bz2 and so on.
        if ending == ".xml" or ending.startswith(".xml-p"):
            return Wikipedia(**settings)
        return None
