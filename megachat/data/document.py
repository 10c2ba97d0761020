"""A text and where it came from, and the shards that hold many: `text-00000.jsonl.zst`, JSON line by line."""

import bz2
import glob
import gzip
import importlib
import io
import json
import os
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType

import zstandard

from megachat.files import replacing

SHARDS = "text-*.jsonl.zst"

COMPRESSED = (".gz", ".bz2", ".zst")

DAMAGE = (EOFError, OSError, zlib.error)
"""What readers of compressed files raise."""

EXCERPT = 200
"""Characters shown of what is broken."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text."""

    id: str
    """Unique in its source, and the same in every run."""
    text: str
    source: str
    """The name of the source it came from."""
    language: str = ""
    """An ISO 639 code, `code`, or `other`; empty until it has been looked at."""


_FIELDS = [field.name for field in fields(Document)]
_encode = json.JSONEncoder(ensure_ascii=False).encode


@dataclass(frozen=True, slots=True)
class Broken:
    """What should have been a document, and could not be read."""

    place: str
    """The file, and the line, row or record in it."""
    why: str
    """What is wrong, and what to do."""
    excerpt: str
    """How it begins, as far as that is known."""

    def __str__(self) -> str:
        return f"{self.place}: {self.why}"


def write_documents(folder: Path, documents: Iterable[Document], per_shard: int) -> int:
    """Writes `documents` in order, `per_shard` to a file, in place of earlier shards; returns how many.

    Nothing changes in `folder` before `documents` has been read to its end: an error on the way leaves it as
    it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    with tempfile.TemporaryDirectory(prefix="text.", suffix=".tmp", dir=folder) as temporary:
        with ExitStack() as open_shard:
            for document in documents:
                if count % per_shard == 0:
                    open_shard.close()
                    file = open_shard.enter_context(_shard(temporary, count // per_shard).open("wb"))
                    # One frame with a checksum: the reader notices a flipped bit and a missing end.
                    compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)
                    shard = open_shard.enter_context(compressor.stream_writer(file))
                shard.write(_line(document))
                count += 1
        for old in folder.glob(SHARDS):
            old.unlink()
        for number in range(-(-count // per_shard)):
            with replacing(_shard(folder, number)) as path:
                os.replace(_shard(temporary, number), path)
    return count


def write_shard(path: Path, documents: Iterable[Document]) -> int:
    """Writes a shard, whole or not at all; returns how many documents it has."""
    count = 0
    # One frame with a checksum: the reader notices a flipped bit and a missing end.
    compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)
    with replacing(path) as temporary, temporary.open("wb") as file, compressor.stream_writer(file) as shard:
        for document in documents:
            shard.write(_line(document))
            count += 1
    return count


def _line(document: Document) -> bytes:
    # `asdict` and a new encoder for each document would take a fifth of the time that a shard takes.
    return (_encode({name: getattr(document, name) for name in _FIELDS}) + "\n").encode()


def read_documents(folder: Path) -> Iterator[Document]:
    """The documents that `write_documents` wrote to `folder`, in their order."""
    shards = sorted(folder.glob(SHARDS))
    if not shards:
        raise ValueError(f"{folder} has no {SHARDS}; `megachat clean` writes them")
    for path in shards:
        yield from read_shard(path)


def read_shard(path: Path) -> Iterator[Document]:
    """The documents of one shard."""
    for number, line in read_lines(path):
        try:
            yield Document(**json.loads(line))
        except (ValueError, TypeError) as why:
            raise ValueError(f"{path}:{number}: not a document ({why}); run `megachat clean` again") from None


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file that may be compressed, counted from 1, without line ends."""
    for number, line in scan_lines(str(path), longest=sys.maxsize - 1):
        if isinstance(line, Broken):
            raise ValueError(str(line))
        yield number, line


def scan_lines(place: str, longest: int) -> Iterator[tuple[int, str | Broken]]:
    """Like `read_lines`, of a path or URL; a line that is broken takes its place, and the others follow.

    Never more than `longest` bytes of a line are held. Where a file is damaged, its last line is broken.
    """
    number = 0
    try:
        with open_bytes(place) as file:
            while line := file.readline(longest + 1):
                number += 1
                if len(line) > longest and not line.endswith(b"\n"):
                    yield number, too_long(f"{place}:{number}", "line", longest, line)
                    while (rest := file.readline(1 << 16)) and not rest.endswith(b"\n"):
                        pass
                    continue
                try:
                    # Windows begins files with a byte order mark.
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as why:
                    remedy = "convert the file to UTF-8 or remove the line"
                    yield number, Broken(f"{place}:{number}", f"not UTF-8 ({why}); {remedy}", excerpt(line))
                else:
                    yield number, text.rstrip("\r\n")
    except DAMAGE as why:
        yield number + 1, damaged(f"{place}:{number + 1}", why)


def damaged(place: str, why: Exception) -> Broken:
    """What is said of a damaged file from here on. Where disk or network fail, that is always an error."""
    message = f"cannot be read ({why}); fetch or write the file again"
    # A decompressor's complaint is a plain OSError without a number.
    if isinstance(why, OSError) and (why.errno or type(why) not in (OSError, gzip.BadGzipFile)):
        raise ValueError(f"{place}: {message}") from None
    return Broken(place, message, excerpt="")


def too_long(place: str, what: str, longest: int, start: str | bytes) -> Broken:
    """What is said of a line, file or record that is not read because of its size."""
    return Broken(
        place, f"the {what} is longer than {longest:,} bytes; cut it up, or raise `longest`", excerpt(start)
    )


def excerpt(text: str | bytes) -> str:
    """The beginning of something, which can be printed and written whatever it is."""
    data = text[:EXCERPT].encode("utf-8", "backslashreplace") if isinstance(text, str) else text[:EXCERPT]
    return data.decode("utf-8", "backslashreplace")


def matching(pattern: str, example: str) -> list[Path]:
    """The files that match, sorted. A folder is an error, which shows an `example` of a pattern below it."""
    found = sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file())
    if not found and Path(pattern).is_dir():
        raise ValueError(f"{pattern!r} is a folder; name its files, as in {pattern}/{example}")
    return found


@contextmanager
def open_bytes(place: str | Path) -> Iterator[io.BufferedReader]:
    """Opens a path or URL for reading; .gz, .bz2 and .zst are decompressed on the way."""
    ending = os.path.splitext(place)[1].lower()
    with _open(str(place)) as file:
        if ending in COMPRESSED and not file.peek(1):
            raise EOFError("it is empty, which a compressed file never is")
        if ending == ".gz":
            yield io.BufferedReader(gzip.GzipFile(fileobj=file))
        elif ending == ".bz2":
            yield io.BufferedReader(bz2.BZ2File(file))
        elif ending == ".zst":
            # Not zstandard's readers: one takes a file cut off for a complete one, the other holds in memory
            # all that a block of input gives, however much that is.
            import pyarrow

            yield io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))
        else:
            yield file


def _open(place: str) -> io.BufferedReader:
    if "://" not in place:
        return open(place, "rb")
    return io.BufferedReader(need("fsspec").open(place, "rb").open(), 1 << 20)


def need(module: str) -> ModuleType:
    """An optional library."""
    try:
        return importlib.import_module(module)
    except ImportError as why:
        raise ValueError(f"{why}; this kind of corpus needs `pip install 'megachat[data]'`") from None


def _shard(folder: Path | str, number: int) -> Path:
    return Path(folder) / f"text-{number:05}.jsonl.zst"
