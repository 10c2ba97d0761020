"""A text and where it came from, and the shards that hold many: `text-00000.jsonl.zst`, JSON line by line."""

import glob
import gzip
import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import zstandard

from megachat.files import replacing

SHARDS = "text-*.jsonl.zst"


@dataclass(frozen=True, slots=True)
class Document:
    """One text."""

    id: str
    """Unique in its source, and the same in every run."""
    text: str
    source: str
    """The name of the source it came from."""
    language: str = ""
    """One of en, zh, code, other; empty until it has been looked at."""


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
                line = json.dumps(asdict(document), ensure_ascii=False) + "\n"
                shard.write(line.encode())
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
            shard.write((json.dumps(asdict(document), ensure_ascii=False) + "\n").encode())
            count += 1
    return count


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
    """The lines of a UTF-8 file that may be compressed (.gz, .zst), counted from 1, without line ends."""
    number = 0
    try:
        with open_bytes(path) as file:
            for number, line in enumerate(file, 1):
                # Windows begins files with a byte order mark.
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as why:
        raise ValueError(
            f"{path}:{number}: not UTF-8 ({why}); convert the file to UTF-8 or remove the line"
        ) from None
    except (EOFError, OSError, zstandard.ZstdError) as why:
        raise ValueError(
            f"{path}:{number + 1}: cannot be read ({why}); fetch or write the file again"
        ) from None


def matching(pattern: str, example: str) -> list[Path]:
    """The files that match, sorted. A folder is an error, which shows an `example` of a pattern below it."""
    found = sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file())
    if not found and Path(pattern).is_dir():
        raise ValueError(f"{pattern!r} is a folder; name its files, as in {pattern}/{example}")
    return found


def open_bytes(path: Path) -> io.BufferedReader:
    """Opens a file for reading; .gz and .zst are decompressed on the way."""
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.open(path, "rb"))
    if path.suffix == ".zst":
        return io.BufferedReader(_Zstandard(path), 1 << 16)
    return path.open("rb")


class _Zstandard(io.RawIOBase):
    """Reads all frames of a file. zstandard's own reader takes a file that was cut off for a complete one."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("rb")
        self.frame = zstandard.ZstdDecompressor().decompressobj()
        self.begun = True  # a frame, so that its end is owed: even a file of nothing compressed holds one
        self.ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            data = self.frame.unused_data if self.frame.eof else b""
            if self.frame.eof:
                self.frame, self.begun = zstandard.ZstdDecompressor().decompressobj(), False
            data = data or self.file.read(1 << 16)
            if not data:
                if self.begun:
                    raise EOFError("the file ends in the middle")
                return 0
            self.begun = True
            self.ready = self.frame.decompress(data)
        size = min(len(buffer), len(self.ready))
        buffer[:size], self.ready = self.ready[:size], self.ready[size:]
        return size

    def close(self) -> None:
        self.file.close()
        super().close()


def _shard(folder: Path | str, number: int) -> Path:
    return Path(folder) / f"text-{number:05}.jsonl.zst"
