"""What deduplication keeps of the documents of one shard: under 300 bytes each, whatever their length.

Per document and band 12 bytes, sorted by band key: enough to find whoever shares the band by reading the same
range of every shard, a few megabytes at a time. Per document a digest of 12 bytes that finds exact copies the
same way, and 8 bits of each hash value of its MinHash (b-bit minwise hashing, Li and König, 2010,
https://arxiv.org/abs/0910.3349): enough to tell how alike two documents are that share a band. All are .npy
files, mapped into memory and never unpickled. A map keeps its file open, and a corpus has more shards than a
process may have files: whoever looks into an array lets it go at once.
"""

import functools
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megachat.data.jit import compiled
from megachat.data.minhash import Signatures, Texts
from megachat.files import replacing

Keys = NDArray[np.uint64]
Rows = NDArray[np.uint32]
Sketches = NDArray[np.uint8]

Open = Callable[[str], NDArray[Any]]
"""An array of an index by its name."""

CHANCE = 1 / 256
"""How often 8 bits are equal though the hash values are not."""

_BLANKS = b" \t\n\r\x0b\x0c"
_LOWER = bytes(range(65)) + bytes(range(97, 123)) + bytes(range(91, 256))
_DIGEST = np.dtype([("key", "<u8"), ("check", "<u4")])


def digests(texts: Texts, fast: bool) -> NDArray[Any]:
    """96 bits of each text; equal for texts that differ in blanks and the case of A to Z alone. `fast`: with
    numba."""
    squeezed: Iterable[bytes | memoryview]
    if fast:
        out, ends = np.empty(len(texts.data), np.uint8), np.zeros(len(texts.ends), np.int64)
        compiled(_squeeze)(texts.data, texts.ends, np.frombuffer(_LOWER, np.uint8), _kept(), out, ends)
        squeezed = (out.data[begin:end] for begin, end in pairwise(ends.tolist()))
    else:
        squeezed = (text.translate(_LOWER, _BLANKS) for text in texts)
    sums = b"".join(hashlib.sha256(text).digest()[:12] for text in squeezed)
    return np.frombuffer(sums, dtype=_DIGEST)


@functools.cache
def _kept() -> NDArray[np.uint64]:
    """For each byte 1 if it counts, 0 for a blank."""
    return np.array([byte not in _BLANKS for byte in range(256)], np.uint64)


def _squeeze(data, ends, lower, kept, out, out_ends):  # type: ignore[no-untyped-def]
    """The texts without blanks and in lower case, one after the other, and where they end; to be compiled."""
    place = np.uint64(0)  # with a sign, numba would ask whether it is negative, at half the speed
    for text in range(len(ends) - 1):
        for at in range(np.uint64(ends[text]), np.uint64(ends[text + 1])):
            byte = data[at]
            out[place] = lower[byte]
            place += kept[byte]
        out_ends[text + 1] = place


def band_keys(signatures: Signatures, bands: int) -> Keys:
    """A number for each band of each signature, `bands` rows of them; chance makes two the same about
    never."""
    documents, values = signatures.shape
    rows = values // bands
    # Odd numbers, so that no bit of a hash value is lost modulo 2^64; then MurmurHash3's finaliser.
    mixers = np.random.default_rng(0).integers(2**63, size=rows, dtype=np.uint64) * np.uint64(2) + np.uint64(
        1
    )
    keys = np.zeros((bands, documents), dtype=np.uint64)
    for row, mixer in enumerate(mixers):
        keys += signatures[:, row::rows].T.astype(np.uint64) * mixer
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        keys = (keys ^ (keys >> np.uint64(33))) * np.uint64(factor)
    return keys ^ (keys >> np.uint64(33))


def sketches(signatures: Signatures) -> Sketches:
    """8 bits of each hash value."""
    return (signatures & np.uint32(0xFF)).astype(np.uint8)


def agreement(left: Sketches, right: Sketches) -> NDArray[np.float64]:
    """The share of hash values that each pair has in common, which estimates its Jaccard similarity."""
    return ((left == right).mean(axis=1) - CHANCE) / (1 - CHANCE)


Part = tuple[NDArray[Any], Signatures, NDArray[np.bool_]]
"""Of some documents the digests, the signatures, and which of these are signed."""


@dataclass(frozen=True)
class Index:
    """The index of one shard. `key`s are sorted; `rows` says whose they are."""

    exact: Keys
    check: Rows
    """The rest of the digest."""
    exact_rows: Rows
    bands: Keys
    """A row for each band."""
    band_rows: Rows
    sketches: Sketches
    """One for each document, of zeros for one too short to have a shingle."""

    @staticmethod
    def make(parts: Iterable[Part], documents: int, bands: int, rows: int) -> "Index":
        """From the digests and signatures of some documents after the others.

        Of a signature only the keys and 8 bits of each value are kept, so that a shard takes the memory of
        its index, and of one part.
        """
        found = np.empty(documents, dtype=_DIGEST)
        short = np.zeros((documents, bands * rows), dtype=np.uint8)
        keys = np.empty((bands, documents), dtype=np.uint64)
        owners = np.empty(documents, dtype=np.uint32)
        done = count = 0
        for own, signatures, signed in parts:
            there = np.flatnonzero(signed)
            found[done : done + len(own)] = own
            short[done + there] = sketches(signatures[there])
            keys[:, count : count + len(there)] = band_keys(signatures[there], bands)
            owners[count : count + len(there)] = done + there
            done, count = done + len(own), count + len(there)
        assert done == documents, f"{done} of {documents} documents"
        keys = keys[:, :count]
        band_rows = np.empty((bands, count), dtype=np.uint32)
        for band in range(bands):  # by itself, for the memory
            order = np.argsort(keys[band], kind="stable")
            keys[band], band_rows[band] = keys[band][order], owners[order]
        order = np.lexsort((found["check"], found["key"]))  # stable: equal ones by row
        return Index(
            found["key"][order], found["check"][order], order.astype(np.uint32), keys, band_rows, short
        )

    def write(self, folder: Path) -> None:
        """As a folder of .npy files."""
        with replacing(folder) as temporary:
            temporary.mkdir()
            for name, values in vars(self).items():
                np.save(temporary / f"{name}.npy", values, allow_pickle=False)

    @staticmethod
    def open(folder: Path, name: str) -> NDArray[Any]:
        """Maps one of the arrays into memory."""
        values: NDArray[Any] = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        return values
