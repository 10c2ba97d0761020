"""What a text is compared by: its words and characters, whatever their case, width, accents and punctuation.

`FULL width`, `full width!` and `ｆｕｌｌ　ｗｉｄｔｈ` are the same two words. A table of all code points
says what each counts as, so that no text is rewritten: lower case, compatibility forms (NFKC) and no accents,
as far as one character at a time can tell. It serves comparison alone; documents keep their spelling.

Scripts that put no blanks between words (Chinese, Japanese, Thai and their neighbours) are compared character
by character. In others accents go, but not the vowel signs of Indic and Semitic scripts, which are marks as
well.
"""

import functools
import unicodedata
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SEPARATOR = 0
"""What ends a word: blanks, punctuation, symbols, whatever Unicode has not assigned."""
SKIPPED = 0xFFFFFFFF
"""An accent: not there."""
ALONE = 1 << 31
"""Added to a character that is a word by itself."""
SEVERAL = 1 << 30
"""Added to the place in `Fold.several` of a character that counts as more than one: the ligature of f and
i."""

CODES = 0x110000
ACCENTS = (
    (0x0300, 0x036F), (0x1AB0, 0x1AFF), (0x1DC0, 0x1DFF), (0x20D0, 0x20FF), (0xFE20, 0xFE2F),
    (0x00AD, 0x00AD), (0x200B, 0x200D), (0x2060, 0x2060), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF),
    (0xE0100, 0xE01EF),
)  # fmt: skip
"""And what cannot be seen: soft hyphens, joiners, variation selectors."""
UNSPACED = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x31F0, 0x31FF),
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF),
)  # fmt: skip
"""Thai and Lao, Burmese, Khmer, kana, Han."""


IDEOGRAPHS = (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0x20000, 0x2F7FF), (0x30000, 0x3FFFF)
HANGUL = 0xAC00, 0xD7A3
"""These fold to themselves, and are most of Unicode."""
PRIVATE = 0xF0000
"""From here on there are no letters."""


@dataclass(frozen=True)
class Fold:
    """The table."""

    codes: NDArray[np.uint32]
    """For each code point SEPARATOR, SKIPPED, a code point, one + ALONE, or a place in `several` +
    SEVERAL."""
    several: NDArray[np.uint32]
    """How many follow, and then as many values like those of `codes`."""


@functools.cache
def fold() -> Fold:
    """The table of this Python's Unicode, `unicodedata.unidata_version`; made in a third of a second."""
    codes = np.zeros(CODES, dtype=np.uint32)
    for first, last in IDEOGRAPHS:
        codes[first : last + 1] = np.arange(first, last + 1) + ALONE
    codes[HANGUL[0] : HANGUL[1] + 1] = np.arange(HANGUL[0], HANGUL[1] + 1)
    rest = np.flatnonzero(codes == 0)
    several: list[int] = []
    for code in rest[rest < PRIVATE].tolist():
        if unicodedata.category(chr(code)) in ("Cn", "Co", "Cs"):
            continue
        values = [
            ord(letter) + (ALONE if _within(ord(letter), UNSPACED) else 0) for letter in _folded(chr(code))
        ]
        if len(values) > 1:
            codes[code] = SEVERAL + len(several)
            several += [len(values), *values]
        elif values:
            codes[code] = values[0]
        elif _within(code, ACCENTS):
            codes[code] = SKIPPED
    return Fold(codes, np.array(several, dtype=np.uint32))


def _folded(character: str) -> str:
    """The word characters it counts as; empty for a separator or an accent."""
    if character.isascii():
        return character.lower() if character.isalnum() or character == "_" else ""
    apart = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", character).lower())
    letters = "".join(letter for letter in apart if not _within(ord(letter), ACCENTS))
    whole = unicodedata.normalize("NFC", letters)  # kana and Hangul, which NFKD takes apart
    return "".join(
        letter for letter in whole if letter.isalnum() or unicodedata.category(letter).startswith("M")
    )


def _within(code: int, ranges: tuple[tuple[int, int], ...]) -> bool:
    return any(first <= code <= last for first, last in ranges)
