"""Code hidden in a file of arrays or tokens, or in a tokenizer, is refused by its reader and does not run."""

import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megachat.data.collect import Write
from megachat.data.copies import Corpus, Pairs, Shards
from megachat.data.index import Index
from megachat.data.packing import Packing
from megachat.data.shards import Shard, ShardWriter
from megachat.tokenizer.tokenizer import FILE, Tokenizer
from tests.payload import Payload


def array(path: Path, payload: Payload) -> None:
    """An array of objects, one of which is the payload."""
    with path.open("wb") as file:
        np.save(file, np.array([0, payload], dtype=object), allow_pickle=True)


def bare(path: Path, payload: Payload) -> None:
    """NumPy takes a file that is no array for a pickle, if it may."""
    path.write_bytes(pickle.dumps(payload))


def packing(folder: Path) -> Any:
    return Packing.load(folder)


def shard(folder: Path) -> Any:
    return Shard(folder / "x")


def marks(folder: Path) -> Any:
    return Corpus(Shards((2,), folder, folder, folder)).unmarked(0, np.arange(2, dtype=np.uint32))


def removed(folder: Path) -> Any:
    """What decides which documents are written."""
    nothing = np.empty((2, 0), dtype=np.uint64)
    corpus = Corpus(Shards((2,), folder, folder, folder))
    found = SimpleNamespace(of=lambda *_: (nothing, nothing))
    return Write.work(SimpleNamespace(corpus=corpus, found=found), 0)  # type: ignore[arg-type]


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "the rows of a packing": ("rows.npy", packing),
    "the pieces of a packing": ("pieces.npy", packing),
    "an index of documents": ("sketches.npy", lambda folder: Index.open(folder, "sketches")),
    "pairs of copies": ("00000-0.npy", lambda folder: [*Pairs(folder, (1,))]),
    "marks of documents": ("00000.npy", marks),
    "the marks that `clean` writes by": ("00000.npy", removed),
    "the index of a token shard": ("x.idx", shard),
    "a tokenizer": (FILE, Tokenizer.load),
}


@pytest.mark.parametrize("hide", [array, bare], ids=lambda hide: hide.__name__)
@pytest.mark.parametrize("name", READERS)
def test_hidden_code_is_refused_and_does_not_run(
    tmp_path: Path, name: str, hide: Callable[[Path, Payload], None]
) -> None:
    file, read = READERS[name]
    ran, folder = tmp_path / "ran", tmp_path / "files"
    Packing(np.array([0, 1]), np.zeros(1, np.int64)).save(folder)  # what is not replaced is in order
    with ShardWriter(folder / "x", vocab=100) as writer:
        writer.add([1, 2, 3])
    hide(folder / file, Payload(ran))
    with pytest.raises(ValueError, match=r"pickle|Python objects|token shard|sentencepiece"):
        read(folder)
    assert not ran.exists()
    np.load(folder / file, allow_pickle=True)
    assert ran.exists(), "the payload is none"
