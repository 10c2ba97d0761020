"""Which files there are: local patterns, and patterns in any store that fsspec knows (`s3://`, `hf://`)."""

import glob
import os
from itertools import takewhile
from pathlib import Path

from megachat.data.document import matching, need
from megachat.data.sources.base import Part, readable


def files(patterns: list[str], setting: str, folders: bool = False) -> list[Part]:
    """The files that match, each once, sorted. A pattern that matches none is an error.

    With `folders` a folder stands for all files below it. The name of a part is the path below the folder
    common to all files: ids that begin with it stay the same when a corpus is moved.
    """
    sizes: dict[str, int] = {}
    for pattern in patterns:
        found = _remote(pattern, folders) if "://" in pattern else _local(pattern, folders)
        if not found:
            raise ValueError(
                f"no file matches {pattern!r} (from {Path.cwd()}); mend `{setting}` of the corpus"
            )
        sizes |= found
    if not sizes:
        raise ValueError(f"`{setting}` of the corpus is empty; name at least one file or pattern")
    split = sorted(place.split("/") for place in sizes)
    # What the first and the last have in common, all between them have.
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(split[0][:-1], split[-1][:-1], strict=False))
    common = len(list(alike))
    return [
        Part(readable("/".join(steps[common:])), sizes["/".join(steps)], "/".join(steps)) for steps in split
    ]


def _local(pattern: str, folders: bool) -> dict[str, int]:
    if folders and Path(pattern).is_dir():
        pattern = f"{glob.escape(pattern.rstrip('/'))}/**"
    return {str(path.absolute()): path.stat().st_size for path in matching(pattern, "**/*.txt")}


def _remote(pattern: str, folders: bool) -> dict[str, int]:
    fsspec = need("fsspec")
    try:
        system, path = fsspec.url_to_fs(pattern)
    except ImportError as why:  # of s3fs, gcsfs, ...
        extra = "data" if pattern.startswith(("hf:", "http")) else "cloud"
        raise ValueError(f"{pattern}: {why}; `pip install 'megachat[{extra}]'` brings it") from None
    except ValueError as why:
        raise ValueError(f"{pattern}: {why}; mend the pattern") from None
    if folders and system.isdir(path):
        path = f"{path.rstrip('/')}/**"
    return {
        system.unstrip_protocol(name): info.get("size") or 0
        for name, info in system.glob(path, detail=True).items()
        # As in a local pattern, what is hidden is not meant.
        if info["type"] == "file" and not os.path.basename(name).startswith(".")
    }
