"""MinHash signatures of many texts at once, equal to datasketch's bit for bit.

Text goes in as UTF-8 in one buffer, as Arrow holds a column; a signature comes out per text. In between
nothing is a Python object: that is what makes it a hundred times as fast as hashing strings. With numba (the
extra `fast`) one compiled pass does all of it; without, NumPy does the same on all texts of a batch side by
side, six times slower. Both give the same signatures (tests/data/test_minhash.py).

A word's hash is a polynomial of its code points, a shingle's one of its words' hashes, both modulo 2^64 and
mixed (MurmurHash3's finaliser); the upper 32 bits go into the permutations of `datasketch.MinHash`.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from datasketch import MinHash
from numpy.typing import NDArray

from megachat.data.fold import ALONE, SEPARATOR, SEVERAL, SKIPPED, fold
from megachat.data.jit import compiled

SCHEME = "affine32"
"""How datasketch 2 permutes hashes; signatures of another scheme cannot be compared with these."""

Signatures = NDArray[np.uint32]

_BASE = 0x9E3779B97F4A7C15
"""Of the polynomials; odd, so that it has an inverse modulo 2^64."""
_MIX = 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53
_MIX32 = 0x85EBCA6B, 0xC2B2AE35
_PIECE = 1 << 20
"""Bytes of text that NumPy takes at a time: it needs about 60 times as much memory."""
_EMPTY = 0xFFFFFFFF
"""What a signature holds before the first shingle."""


@dataclass(frozen=True)
class Texts:
    """Texts one after the other, as UTF-8."""

    data: NDArray[np.uint8]
    ends: NDArray[np.int64]
    """Where each begins, and where the last ends."""

    @staticmethod
    def of(texts: Sequence[str]) -> "Texts":
        encoded = [text.encode() for text in texts]
        ends = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(text) for text in encoded], out=ends[1:])
        return Texts(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __iter__(self) -> Iterator[bytes]:
        for begin, end in zip(self.ends[:-1], self.ends[1:], strict=True):
            yield self.data[begin:end].tobytes()


@dataclass(frozen=True)
class Signer:
    """What a shingle is, and how many hash values a signature has."""

    words: int
    """Words in a shingle."""
    characters: int
    """Characters in a shingle, of a text most of whose words are single characters (see `fold`)."""
    permutations: int

    def sign(self, texts: Texts, fast: bool) -> tuple[Signatures, NDArray[np.bool_]]:
        """A signature of `permutations` hash values per text, and whether the text has one.

        A text too short for a shingle has none. `fast`: by numba.
        """
        signatures = np.full((len(texts), self.permutations), _EMPTY, dtype=np.uint32)
        signed = np.zeros(len(texts), dtype=np.bool_)
        if fast:
            table, (factors, addends) = fold(), permutations(self.permutations)
            given = (
                texts.data,
                texts.ends,
                table.codes,
                table.several,
                _ascii(),
                self.words,
                self.characters,
                factors,
                addends,
            )
            sign, done, room = compiled(_sign), 0, 1 << 16
            while done < len(texts):
                words, shingles = np.empty(room, dtype=np.uint64), np.empty(room, dtype=np.uint32)
                done = sign(*given, signatures, signed, done, words, shingles)
                room *= 2
        else:
            for number, hashes in enumerate(self._shingles(texts)):
                signed[number] = len(hashes) > 0
                if len(hashes):
                    signatures[number] = minhash(hashes, self.permutations)
        return signatures, signed

    def _shingles(self, texts: Texts) -> Iterator[NDArray[np.uint32]]:
        """The hashes of each text's shingles, by NumPy."""
        for some in _batches(texts):
            pieces = map(_words, _cut(some) if len(some) == 1 else [some])
            hashes, alone, owner = (np.concatenate(column) for column in zip(*pieces, strict=True))
            bounds = np.searchsorted(owner, np.arange(len(some) + 1))
            for first, last in itertools.pairwise(bounds):
                size = self.characters if 2 * alone[first:last].sum() > last - first else self.words
                yield _runs(hashes[first:last], size)


@functools.cache
def permutations(count: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """The factors and addends of datasketch's permutations."""
    factors, addends = MinHash(num_perm=count, scheme=SCHEME).permutations
    return factors.astype(np.uint32), addends.astype(np.uint32)


def minhash(hashes: NDArray[np.uint32], count: int) -> NDArray[np.uint32]:
    """What datasketch's `MinHash(count, scheme="affine32")` holds after an update with these hashes."""
    factors, addends = permutations(count)
    values = hashes ^ (hashes >> np.uint32(16))
    values = values * np.uint32(_MIX32[0])
    values ^= values >> np.uint32(13)
    values *= np.uint32(_MIX32[1])
    values ^= values >> np.uint32(16)
    smallest = np.full(count, _EMPTY, dtype=np.uint32)
    for start in range(
        0, len(values), 1024
    ):  # with 112 permutations half a megabyte, which stays in the cache
        permuted = factors[:, None] * values[start : start + 1024] + addends[:, None]
        np.minimum(smallest, permuted.min(axis=1), out=smallest)
    return smallest


def _batches(texts: Texts) -> Iterator[Texts]:
    """As many texts as have `_PIECE` bytes together, or a longer one alone."""
    first = 0
    while first < len(texts):
        last = int(np.searchsorted(texts.ends, texts.ends[first] + _PIECE, side="right")) - 1
        last = max(last, first + 1)
        begin, end = texts.ends[first], texts.ends[last]
        yield Texts(texts.data[begin:end], texts.ends[first : last + 1] - begin)
        first = last


def _cut(text: Texts) -> Iterator[Texts]:
    """A text in pieces of `_PIECE` bytes, cut where no word is: before a blank or a Chinese character.

    Where there is neither, a piece goes on to the next one.
    """
    data, begin = text.data, 0
    while begin + _PIECE < len(data):
        window = data[begin + 1 : begin + _PIECE + 1]
        stops = np.flatnonzero(_stops(window))
        if len(stops):
            end = begin + 1 + int(stops[-1])
        else:
            further = _stops(data[begin + _PIECE + 1 :])
            end = begin + _PIECE + 1 + (int(further.argmax()) if further.any() else len(further))
        yield Texts(data[begin:end], np.array([0, end - begin]))
        begin = end
    yield Texts(data[begin:], np.array([0, len(data) - begin]))


def _stops(data: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which bytes are a blank, or the first of a character from U+4000 to U+9FFF."""
    return (data == 0x20) | (data == 0x0A) | ((data >= 0xE4) & (data <= 0xE9))


def _words(texts: Texts) -> tuple[NDArray[np.uint64], NDArray[np.bool_], NDArray[np.int64]]:
    """The words of all texts: their hashes, whether they are a character alone, and whose they are."""
    codes = np.frombuffer(texts.data.tobytes().decode().encode("utf-32-le"), dtype=np.uint32)
    begins = (texts.data & 0xC0) != 0x80  # a byte that begins a character
    owner = np.repeat(np.arange(len(texts)), np.diff(texts.ends))[begins]
    values, owner = _folded(codes, owner)
    word, alone = values != SEPARATOR, values >= ALONE
    plain, same = word & ~alone, owner[1:] == owner[:-1]
    first, last = word.copy(), word.copy()
    joined = plain[:-1] & plain[1:] & same  # this character and the next are of one word
    first[1:] &= ~joined
    last[:-1] &= ~joined
    powers, inverses = _powers(len(values))
    # Over the inverse powers, and then times the power that a word's last character has.
    sums = np.zeros(len(values) + 1, dtype=np.uint64)
    np.cumsum((values.astype(np.uint64) + np.uint64(1)) * inverses, out=sums[1:])
    begin, end = np.flatnonzero(first), np.flatnonzero(last)
    return _mixed((sums[end + 1] - sums[begin]) * powers[end]), alone[begin], owner[begin]


def _folded(
    codes: NDArray[np.uint32], owner: NDArray[np.int64]
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """What the characters count as, without accents, and whose they are."""
    table = fold()
    values = table.codes[codes]
    several = values >> np.uint32(30) == 1
    if several.any():
        places = np.where(several, values & np.uint32(SEVERAL - 1), 0).astype(np.int64)
        counts = np.where(several, table.several[places], 1).astype(np.int64)
        of = np.repeat(np.arange(len(values)), counts)
        nth = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
        values = np.where(several[of], table.several[(places[of] + 1 + nth) * several[of]], values[of])
        owner = owner[of]
    there = values != SKIPPED
    return values[there], owner[there]


def _powers(count: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """`_BASE` to the power of 0, 1, 2, ... and the inverses of these, modulo 2^64."""
    both = np.ones((2, count), dtype=np.uint64)
    both[0, 1:], both[1, 1:] = _BASE, pow(_BASE, -1, 1 << 64)
    powers, inverses = np.multiply.accumulate(both, axis=1)
    return powers, inverses


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    for factor in _MIX:
        values = (values ^ (values >> np.uint64(33))) * np.uint64(factor)
    return values ^ (values >> np.uint64(33))


def _runs(hashes: NDArray[np.uint64], size: int) -> NDArray[np.uint32]:
    """The hashes of all runs of `size` words."""
    count = max(0, len(hashes) - size + 1)
    mixed = np.zeros(count, dtype=np.uint64)
    for offset in range(size):
        mixed = mixed * np.uint64(_BASE) + hashes[offset : offset + count]
    return (mixed >> np.uint64(32)).astype(np.uint32)


@functools.cache
def _ascii() -> NDArray[np.uint64]:
    """What each of the first 128 characters adds to a word's hash; 0 for those that separate words."""
    values = fold().codes[:128]
    assert (values >> np.uint32(30) == 0).all(), "none is skipped, a word alone, or several"
    return np.where(values == SEPARATOR, np.uint64(0), values.astype(np.uint64) + np.uint64(1))


def _sign(  # type: ignore[no-untyped-def]
    data, ends, codes, several, ascii, words, characters, factors, addends, signatures, signed, begin, hashes,
    shingles,
):  # fmt: skip
    """What `Signer.sign` does without numba, in one pass over the bytes; to be compiled.

    `hashes` and `shingles` are room for those of a text. Returns the first text with more, or how many texts
    there are.
    """
    u32, u64 = np.uint32, np.uint64
    for text in range(begin, len(ends) - 1):
        count = 0
        alone = 0
        inside = False
        word = u64(0)
        place = ends[text]
        pending = 0  # values of `several` still to come, from `source` on
        source = 0
        over = False
        while not over:
            if pending > 0:
                value = several[source]
                source += 1
                pending -= 1
            elif place < ends[text + 1]:
                # Most text is ASCII. No branch asks where words end, which a processor cannot foresee.
                stop = min(ends[text + 1], place + len(hashes) - count - 2)
                code = u32(data[place])
                while code < 0x80 and place < stop:
                    added = ascii[code]
                    hashes[count] = word
                    letter = added != 0
                    count += int(inside and not letter)
                    word = word * u64(_BASE) + added if letter else u64(0)
                    inside = letter
                    place += 1
                    code = u32(data[place]) if place < stop else u32(0)
                if place >= stop:
                    if stop < ends[text + 1]:
                        return text
                    continue
                if code < 0xE0:
                    code = ((code & u32(0x1F)) << u32(6)) | (u32(data[place + 1]) & u32(0x3F))
                    place += 2
                elif code < 0xF0:
                    code = (
                        ((code & u32(0x0F)) << u32(12))
                        | ((u32(data[place + 1]) & u32(0x3F)) << u32(6))
                        | (u32(data[place + 2]) & u32(0x3F))
                    )
                    place += 3
                else:
                    code = (
                        ((code & u32(0x07)) << u32(18))
                        | ((u32(data[place + 1]) & u32(0x3F)) << u32(12))
                        | ((u32(data[place + 2]) & u32(0x3F)) << u32(6))
                        | (u32(data[place + 3]) & u32(0x3F))
                    )
                    place += 4
                value = codes[code]
            else:
                value = u32(SEPARATOR)
                over = True
            kind = value >> u32(30)  # 0: of a word, or SEPARATOR; 1: SEVERAL; 2: ALONE; 3: SKIPPED
            if kind == 0 and value != SEPARATOR:
                word = word * u64(_BASE) + u64(value) + u64(1)
                inside = True
            elif kind == 1:
                source = value & u32(SEVERAL - 1)
                pending = several[source]
                source += 1
            elif kind != 3:
                if count + 2 > len(hashes):
                    return text
                if inside:
                    hashes[count] = word
                    count += 1
                    inside = False
                    word = u64(0)
                if kind == 2:
                    hashes[count] = u64(value) + u64(1)
                    count += 1
                    alone += 1
        for place in range(count):
            mixed = hashes[place]
            mixed = (mixed ^ (mixed >> u64(33))) * u64(_MIX[0])
            mixed = (mixed ^ (mixed >> u64(33))) * u64(_MIX[1])
            hashes[place] = mixed ^ (mixed >> u64(33))
        size = characters if 2 * alone > count else words
        signed[text] = count >= size
        top = u64(1)
        for _ in range(size):
            top *= u64(_BASE)
        run = u64(0)
        for place in range(count):
            run = run * u64(_BASE) + hashes[place]
            if place >= size:
                run -= hashes[place - size] * top
            if place + 1 >= size:
                hashed = u32(run >> u64(32))
                # u32 around each product: numba would go on in 64 bits.
                hashed = u32((hashed ^ (hashed >> u32(16))) * u32(_MIX32[0]))
                hashed = u32((hashed ^ (hashed >> u32(13))) * u32(_MIX32[1]))
                shingles[place + 1 - size] = u32(hashed ^ (hashed >> u32(16)))
        signature = signatures[text]
        for k in range(len(factors)):  # outside, for the smallest value then stays in a register
            factor, addend, smallest = factors[k], addends[k], signature[k]
            for place in range(count - size + 1):
                smallest = min(smallest, u32(factor * shingles[place] + addend))
            signature[k] = smallest
    return len(ends) - 1
