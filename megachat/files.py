"""Files that appear whole or not at all, and their sums."""

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

NO_ANSWER = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
"""What a disk or a network file system says when it is in trouble, whatever the file holds."""


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; what is written there takes its place, whole or not at all.

    A file is fsynced and renamed; a folder is fsynced file by file and renamed. On an error nothing is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    remove(temporary)  # of one that was killed: in containers all have the same number
    try:
        with telling(path):
            yield temporary
        if temporary.is_dir():
            for file in temporary.rglob("*"):
                if file.is_file():
                    fsync(file)
            if path.is_dir():
                shutil.rmtree(path)
        else:
            fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    finally:
        remove(temporary)


def patiently(read: Callable[[], T], waits: Sequence[float] = (0.2, 1.0, 5.0)) -> T:
    """What `read` returns, asked again when the disk or the network behind it did not answer.

    A file that is not there, or has the wrong content, is an answer.
    """
    for wait in waits:
        try:
            return read()
        except OSError as error:
            if error.errno not in NO_ANSWER:
                raise
        time.sleep(wait)
    return read()


@contextmanager
def telling(path: Path) -> Iterator[None]:
    """NumPy says of a full disk only "8192 requested and 0 written": this says that, and of which file."""
    try:
        yield
    except OSError as error:
        if error.errno is None and re.search(r"\d+ requested and \d+ written", str(error)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def remove(path: Path) -> None:
    """Deletes a file or a folder, unless somebody else has."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Deletes what was half written in a folder by processes that were killed."""
    for left in folder.glob("*.tmp"):
        remove(left)


def fsync(path: Path) -> None:
    """Forces a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
