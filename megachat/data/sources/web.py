"""Crawls of the web: WARC files, which hold pages as they were sent, and WET files, which hold their text.

The main text of a page is what trafilatura (Barbaresi, 2021, https://aclanthology.org/2021.acl-demo.15)
finds, as for FineWeb (Penedo et al., 2024, https://arxiv.org/abs/2406.17557): menus and footers, which a WET
file has, are left out.
"""

import codecs
import io
from collections.abc import Iterator
from typing import Any

from megachat.data.document import DAMAGE, Broken, Document, damaged, excerpt, need, open_bytes, too_long
from megachat.data.sources.base import Part, Seen
from megachat.data.sources.files import FileSource


class WebArchive(FileSource):
    """The pages of WARC files and the texts of WET files; what is neither HTML nor text is passed over.

    The id of a document is that of its record.
    """

    precise: bool
    """Of web pages: drop what may be boilerplate, at the price of some text."""

    def records(self, part: Part) -> Iterator[Document | Broken]:
        archives = need("warcio.archiveiterator")
        exceptions = need("warcio.exceptions")
        number, record = 0, None
        seen = Seen("fetch the file again")
        try:
            with open_bytes(part.place) as file:
                for record in archives.ArchiveIterator(_Stream(file), verify_http=False):
                    number += 1
                    if record.format != "warc" or record.length is None:
                        raise exceptions.ArchiveLoadFailed("here is no record of a WARC file")
                    if found := self._read(record, f"{part.place}:{number}", f"{part.name}:{number}", seen):
                        yield found
                # It takes an end in the middle of a record for the end of the record.
                if record is not None and record.raw_stream.limit > 0:
                    raise EOFError("the file ends in the middle of a record")
        except (exceptions.ArchiveLoadFailed, *DAMAGE) as why:
            yield damaged(f"{part.place}:{max(number, 1)}", why)

    def _read(self, record: Any, place: str, number: str, seen: Seen) -> Document | Broken | None:
        media, charset = _content_type(record)
        page = media in ("text/html", "application/xhtml+xml") and _was_found(record)
        if not page and not (record.rec_type == "conversion" and media == "text/plain"):
            return None
        content = _content(record, self.longest)
        if len(content) > self.longest:
            return too_long(place, "record", self.longest, content)
        while record.raw_stream.read(1 << 16):  # what a server sent after the content
            pass
        if record.raw_stream.limit > 0:  # cut off: `records` says so
            return None
        if page:
            need("trafilatura")  # here, because what it raises below is the page's fault
        own = (record.rec_headers.get_header("WARC-Record-ID") or number).strip("<>")
        try:
            seen.add(own)
            text = self._main_text(content, charset) if page else content.decode("utf-8")
        except UnicodeDecodeError as why:
            return Broken(place, f"not UTF-8 ({why}); make the WET file again", excerpt(content))
        except ValueError as why:
            return Broken(place, str(why), excerpt(content))
        return Document(own, text, self.name)

    def _main_text(self, page: bytes, charset: str | None) -> str:
        try:
            # Servers are often wrong about it, and then trafilatura guesses. Punycode is for names: a page of
            # it would take hours.
            known = charset and codecs.lookup(charset).name not in ("punycode", "idna")
            html: str | bytes = page.decode(charset) if charset and known else page
        except (LookupError, ValueError):
            html = page
        try:
            # `deduplicate` remembers earlier pages, and the text of one would depend on who read them.
            text = need("trafilatura").extract(
                html,
                output_format="txt",
                include_comments=False,
                favor_precision=self.precise,
                deduplicate=False,
            )
        except MemoryError:
            raise
        except Exception as why:  # of any of the parsers that it uses
            raise ValueError(f"trafilatura cannot read it ({type(why).__name__}: {why})") from why
        return text or ""


class _Stream:
    """For warcio, which takes an EOFError for the end of the file: it says that a file is cut off."""

    def __init__(self, file: io.BufferedReader) -> None:
        self.file = file
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        try:
            return self.file.read1(size)
        except EOFError as why:
            raise OSError(str(why)) from None


def _content_type(record: Any) -> tuple[str, str | None]:
    """Media type and charset: those of the page where a page was sent, else those of the record."""
    headers = record.http_headers if record.rec_type == "response" else record.rec_headers
    value = (headers.get_header("Content-Type") if headers else None) or ""
    media, _, parameters = value.partition(";")
    name, _, charset = parameters.strip().partition("=")
    return media.strip().lower(), charset.strip("\"' ") if name.lower() == "charset" else None


def _was_found(record: Any) -> bool:
    return record.rec_type == "response" and record.http_headers.get_statuscode() == "200"


def _content(record: Any, longest: int) -> bytes:
    """The content, decompressed, or the beginning of it where it is longer than `longest`."""
    stream, content = record.content_stream(), io.BytesIO()
    while content.tell() <= longest and (piece := stream.read(min(1 << 16, longest + 1))):
        content.write(piece)
    return content.getvalue()
