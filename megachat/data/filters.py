"""What a text must be like to be learnt from: one rule per class, each with the paper it comes from.

A rule looks at one document and says keep or drop; `normalise` comes before all of them and drops nothing.
Rules made for prose are wrong for code and for Chinese, so each names the languages it is meant for. The
languages are told apart by script alone: that needs no model, and cannot tell English from French.
"""

import re
import unicodedata
from collections import Counter
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from megachat.config import Config
from megachat.data.document import Document

Language = Literal["en", "zh", "code", "other"]
Share = Annotated[float, Field(ge=0, le=1)]

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
"""The Chinese characters, as the inside of a regular expression's brackets."""

SAMPLE = 20_000
"""Characters from which the language is told."""

LATIN = bytes(range(65, 91)) + bytes(range(97, 123))

_control = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")
_surrogate = re.compile("[\ud800-\udfff]")
_ascii = re.compile("[\x00-\x7f]+")
_han = re.compile(f"[{HAN}]")
_japanese_korean = re.compile("[\u3040-\u30ff\uac00-\ud7af]")
_letter = re.compile(r"[^\W\d_]")
_line_of_code = re.compile(
    r"[:,;{}()\[\]\\]$| = |^(?:import|from|return|if|for|while|def|class|@)\b", re.MULTILINE
)


def normalise(text: str) -> str:
    """The same text in one spelling: NFC, lines ended by a newline, no control characters.

    NFC and not NFKC: NFKC would rewrite x² as x2 and full-width Chinese punctuation as ASCII.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.isascii():
        text = unicodedata.normalize("NFC", _surrogate.sub("\ufffd", text))
    return _control.sub("", text).strip("\n ")


def letters(text: str) -> tuple[int, int]:
    """How many letters of the English alphabet there are, and how many of all others."""
    # Deleting bytes is 30 times as fast as looking at every character with a regular expression.
    encoded = text.encode(errors="replace")
    english = len(encoded) - len(encoded.translate(None, LATIN))
    return english, 0 if text.isascii() else len(_letter.findall(_ascii.sub("", text)))


def language_of(text: str) -> Language:
    """Which of the languages a text looks like, by its letters and, for code, by how its lines end."""
    text = text[:SAMPLE]
    english, others = letters(text)
    if not english + others:
        return "other"
    han = len(_han.findall(text)) if others else 0
    if han >= 0.3 * (english + others):
        return "other" if len(_japanese_korean.findall(text)) >= 0.1 * han else "zh"
    if others >= 0.2 * (english + others):
        return "other"
    lines = [stripped for line in text.split("\n") if (stripped := line.strip())]
    return "code" if sum(map(bool, map(_line_of_code.search, lines))) >= 0.5 * len(lines) else "en"


class Filter(Config):
    """One rule."""

    applies_to: list[Language]
    """The languages it was made for; documents in others pass unseen."""

    @property
    def reason(self) -> str:
        """What was wrong with the documents it dropped, for the report."""
        raise NotImplementedError

    def keep(self, document: Document) -> bool:
        """Whether a document, normalised and in a language it applies to, is worth learning from."""
        raise NotImplementedError


class Script(Filter):
    """Drops what is in no language wanted, before all else as FineWeb does (https://arxiv.org/abs/2406.17557)."""

    wanted: list[Language]
    """The languages to keep, as told by `language_of` or by the source itself."""

    @property
    def reason(self) -> str:
        return f"not in {', '.join(self.wanted)}, as far as its script tells"

    def keep(self, document: Document) -> bool:
        return document.language in self.wanted


class Length(Filter):
    """Too short to teach anything, or so long that one document would weigh too much.

    Gopher (Rae et al., 2021, https://arxiv.org/abs/2112.11446, A1.1) keeps 50 to 100,000 words.
    """

    minimum: NonNegativeInt
    """Characters."""
    maximum: PositiveInt
    """Characters."""

    @property
    def reason(self) -> str:
        return f"not {self.minimum:,} to {self.maximum:,} characters long"

    def keep(self, document: Document) -> bool:
        return self.minimum <= len(document.text) <= self.maximum


class Repetition(Filter):
    """The same lines or the same words over and over.

    Gopher (Rae et al., 2021, https://arxiv.org/abs/2112.11446, A1.1): duplicated lines above 0.30 of all, by
    count, and above 0.20 by characters; the commonest 4-gram of words above 0.16 of the characters.
    """

    lines: Share
    """The greatest share of lines that are copies of an earlier line."""
    characters: Share
    """The greatest share of characters in such lines."""
    four_grams: Share
    """The greatest share of characters in the commonest four words in a row (Chinese: four characters)."""

    @property
    def reason(self) -> str:
        return (
            f"copies of an earlier line make up over {self.lines:.0%} of the lines or {self.characters:.0%} "
            f"of the characters, or one 4-gram {self.four_grams:.0%}"
        )

    def keep(self, document: Document) -> bool:
        lines = [stripped for line in document.text.split("\n") if (stripped := line.strip())]
        copies = [(line, count - 1) for line, count in Counter(lines).items() if count > 1]
        if sum(count for _, count in copies) > self.lines * len(lines):
            return False
        size = sum(map(len, lines))
        if sum(len(line) * count for line, count in copies) > self.characters * size:
            return False
        return self._commonest(document) <= self.four_grams * size

    def _commonest(self, document: Document) -> int:
        """Characters in all copies of the commonest 4-gram."""
        words = _han.findall(document.text) if document.language == "zh" else document.text.split()
        if len(words) < 8:
            return 0
        grams = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
        most = max(grams.values())
        if most < 3:  # said twice is not over and over
            return 0
        return most * max(sum(map(len, gram)) for gram, count in grams.items() if count == most)


class Lines(Filter):
    """Data in the guise of text: tables, minified code, base64.

    StarCoder (Li et al., 2023, https://arxiv.org/abs/2305.06161, 3.1) drops files with a line over 1,000
    characters, lines over 100 on average, or under 0.25 of the characters alphanumeric.
    """

    longest: PositiveInt
    """Characters."""
    average: PositiveInt
    """Characters."""
    alphabetic: Share
    """The smallest share of letters among the characters that are not blanks."""

    @property
    def reason(self) -> str:
        return (
            f"a line over {self.longest:,} characters, or {self.average:,} on average, "
            f"or under {self.alphabetic:.0%} of it letters"
        )

    def keep(self, document: Document) -> bool:
        lines = document.text.split("\n")
        filled = sum(map(len, document.text.split()))
        return (
            max(map(len, lines)) <= self.longest
            and len(document.text) <= self.average * len(lines)
            and sum(letters(document.text)) >= self.alphabetic * filled
        )


class Words(Filter):
    """Word lists, identifiers and keyword spam: not sentences.

    Gopher (Rae et al., 2021, https://arxiv.org/abs/2112.11446, A1.1): a mean word of 3 to 10 characters, and
    at least two of the commonest words of the language.
    """

    shortest: PositiveInt
    """Characters of the mean word, at least."""
    longest: PositiveInt
    """Characters of the mean word, at most."""
    common: NonNegativeInt
    """How many different ones of `stop_words` there must be."""
    stop_words: list[str]
    """The commonest words of the language; in Chinese, characters."""

    @property
    def reason(self) -> str:
        return (
            f"mean word not {self.shortest} to {self.longest} characters, "
            f"or fewer than {self.common} of the commonest words"
        )

    def keep(self, document: Document) -> bool:
        if document.language == "zh":
            found = set(document.text)
        else:
            words = document.text.lower().split()
            if not self.shortest * len(words) <= sum(map(len, words)) <= self.longest * len(words):
                return False
            found = set(words)
        return len(found.intersection(self.stop_words)) >= self.common
