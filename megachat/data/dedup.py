"""Finds documents that say again what an earlier one said: letter for letter, or nearly.

Exact copies share a hash. Near copies share a large part of their shingles (runs of five words, or of eight
Chinese characters: Broder, 1997; Lee et al., 2022, https://arxiv.org/abs/2107.06499). A MinHash of 14 bands
of 8 rows finds the pairs, with datasketch's permutations bit for bit; but not with its index, which takes 5
kB a document: sorting the keys of one band at a time finds the same pairs ten times as fast in 16 bytes a
document.

Two things destroy data where they are left out. A pair that shares a band need not be alike, so each is
checked by the agreement of its whole signatures. And A like B like C does not make A like C, so a document
goes only if it is like the very one that stays in its stead.
"""

import functools
import hashlib
import re
from collections.abc import Iterable
from typing import Annotated, Any

import numpy as np
from datasketch import MinHash
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from megachat.config import Config
from megachat.data.filters import HAN

Indices = NDArray[np.int64]
Signatures = NDArray[np.uint32]

SCHEME = "affine32"
"""How datasketch 2 permutes hashes; signatures of another scheme cannot be compared with these."""

_word = re.compile(r"\w+", re.ASCII)
_token = re.compile(rf"[{HAN}]|[^\W{HAN}]+")
_han = re.compile(f"[{HAN}]")
_CHUNK = 1024
"""Shingles hashed at a time: with their 112 permutations half a megabyte, which stays in the cache."""


class Dedup(Config):
    """Which documents count as copies."""

    near: bool
    """Whether to remove near copies too, and not only exact ones."""
    words: PositiveInt
    """Words in a shingle."""
    characters: PositiveInt
    """Chinese characters in a shingle; eight say about as much as five words."""
    bands: PositiveInt
    """More bands find more pairs; a pair of similarity s is found with probability 1 - (1 - s^rows)^bands."""
    rows: PositiveInt
    """Hash values in a band; more rows find fewer pairs that are unlike."""
    threshold: Annotated[float, Field(gt=0, le=1)]
    """Two documents are copies if this share of their hash values, which estimates Jaccard's, is equal."""

    @property
    def permutations(self) -> int:
        return self.bands * self.rows

    def signature(self, text: str) -> Signatures | None:
        """The MinHash of a text, or None for one too short to have a shingle."""
        found = shingles(text, self.words, self.characters)
        return minhash(found, self.permutations) if len(found) else None

    def near_copies(self, signatures: Signatures) -> Indices:
        """For each document, which one stays in its stead: its own number, or a smaller one for a copy."""
        left, right = candidates(signatures, self.bands)
        alike = agreement(signatures, left, right) >= self.threshold
        return representatives(signatures, left[alike], right[alike], self.threshold)


def digest(text: str) -> bytes:
    """16 bytes that two texts share only if they are the same but for blanks and letter case."""
    return hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=16).digest()


def exact_copies(digests: Iterable[bytes]) -> Indices:
    """For each document, the number of the first one with its digest."""
    first: dict[bytes, int] = {}
    return np.array([first.setdefault(value, number) for number, value in enumerate(digests)], dtype=np.int64)


def shingles(text: str, words: int, characters: int) -> NDArray[np.uint32]:
    """The shingles of a text as 32-bit hashes, in order. Case and punctuation do not count."""
    text = text.lower()
    if text.isascii():
        tokens, size = _word.findall(text), words
    else:
        tokens = _token.findall(text)
        size = characters if 2 * len(_han.findall(text)) > len(tokens) else words
    if len(tokens) < size:
        return np.empty(0, dtype=np.uint32)
    hashes = np.fromiter(map(_hashes.__getitem__, tokens), dtype=np.uint64, count=len(tokens))
    count = len(tokens) - size + 1
    mixed = np.zeros(count, dtype=np.uint64)
    for offset in range(size):
        # A polynomial in an odd number, modulo 2^64: the order of the tokens counts.
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + hashes[offset : offset + count]
    return (mixed >> np.uint64(32)).astype(np.uint32)


class _Hashes(dict[str, int]):
    """64-bit hashes of tokens, remembered; forgotten when there are too many."""

    def __missing__(self, token: str) -> int:
        if len(self) >= 1_000_000:
            self.clear()
        self[token] = int.from_bytes(hashlib.blake2b(token.encode(), digest_size=8).digest(), "little")
        return self[token]


_hashes = _Hashes()


def minhash(hashes: NDArray[np.uint32], permutations: int) -> Signatures:
    """What datasketch's `MinHash(permutations, scheme="affine32")` holds after an update with these
    hashes."""
    factors, offsets = _permutations(permutations)
    values = hashes ^ (hashes >> np.uint32(16))
    values = values * np.uint32(0x85EBCA6B)
    values ^= values >> np.uint32(13)
    values *= np.uint32(0xC2B2AE35)
    values ^= values >> np.uint32(16)
    smallest = np.full(permutations, 0xFFFFFFFF, dtype=np.uint32)
    for start in range(0, len(values), _CHUNK):
        permuted = factors * values[start : start + _CHUNK] + offsets
        np.minimum(smallest, permuted.min(axis=1), out=smallest)
    return smallest


@functools.cache
def _permutations(count: int) -> tuple[Any, Any]:
    factors, offsets = MinHash(num_perm=count, scheme=SCHEME).permutations
    return factors.astype(np.uint32)[:, None], offsets.astype(np.uint32)[:, None]


def candidates(signatures: Signatures, bands: int) -> tuple[Indices, Indices]:
    """Pairs (smaller, larger) of documents with a whole band in common: enough to connect all such documents.

    Of the documents that share a band each is paired with the smallest and with the one before it, for all
    pairs would be quadratically many.
    """
    documents, permutations = signatures.shape
    rows = permutations // bands
    # A band's key is its rows times random odd numbers, modulo 2^64: chance makes two the same about never.
    mixers = np.random.default_rng(0).integers(2**63, size=rows, dtype=np.uint64) * np.uint64(2)
    mixers += np.uint64(1)
    pairs = []
    for band in range(bands):
        columns = signatures[:, band * rows : (band + 1) * rows].astype(np.uint64)
        keys = (columns * mixers).sum(axis=1, dtype=np.uint64)
        order = np.argsort(
            keys, kind="stable"
        )  # stable: in a run of equal keys the smallest document is first
        fresh = np.empty(documents, dtype=bool)
        fresh[:1] = True
        fresh[1:] = keys[order[1:]] != keys[order[:-1]]
        starts = np.flatnonzero(fresh)[np.cumsum(fresh) - 1]
        repeated = np.flatnonzero(~fresh)
        pairs.append(np.stack([order[starts[repeated]], order[repeated]]))
        pairs.append(np.stack([order[repeated - 1], order[repeated]]))
    joined = np.unique(np.concatenate(pairs, axis=1), axis=1)
    return joined[0], joined[1]


def agreement(signatures: Signatures, left: Indices, right: Indices) -> NDArray[np.float64]:
    """The share of equal hash values in each pair of signatures."""
    shares = np.empty(len(left))
    for start in range(0, len(left), 65_536):  # bounds the memory that the rows of all pairs would take
        part = slice(start, start + 65_536)
        shares[part] = (signatures[left[part]] == signatures[right[part]]).mean(axis=1)
    return shares


def representatives(signatures: Signatures, left: Indices, right: Indices, threshold: float) -> Indices:
    """The smallest document each is connected to, if the two agree; the rest is looked at again, by
    itself."""
    stays = np.arange(len(signatures), dtype=np.int64)
    while len(left):
        smallest = components(len(signatures), left, right)
        members = np.unique(np.concatenate([left, right]))
        alike = agreement(signatures, smallest[members], members) >= threshold
        stays[members[alike]] = smallest[members[alike]]
        # Every component settles its smallest document and at least one neighbour of it, so this ends.
        settled = np.zeros(len(signatures), dtype=bool)
        settled[members[alike]] = True
        undecided = ~settled[left] & ~settled[right]
        left, right = left[undecided], right[undecided]
    return stays


def components(documents: int, left: Indices, right: Indices) -> Indices:
    """For each document, the smallest one it is connected to."""
    smallest = np.arange(documents, dtype=np.int64)
    while (smallest[left] != smallest[right]).any():
        # Both ends know the head of their group so far. The larger head now follows the smaller one,
        heads = smallest[left], smallest[right]
        for head in heads:
            np.minimum.at(smallest, head, np.minimum(*heads))
        # and everybody follows their head's head, until heads follow only themselves.
        while (smallest[smallest] != smallest).any():
            smallest = smallest[smallest]
    return smallest
