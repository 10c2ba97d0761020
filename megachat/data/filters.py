"""What a text must be like to be learnt from: one rule per class, each with the paper it comes from.

A rule has two halves. `measure` looks at one document and gives its scores, which become columns beside the
text; `keep` looks at the scores alone, so that a bound can be moved without reading the text again. Rules
made for prose are wrong for code and for Chinese, so each names the languages it is meant for. Shares and
averages are those of the first million characters (`BEGINNING`): counting all words of a longer text takes
gigabytes, and changes little. How long a text is, and what it must not say, is asked of all of it.

Here is what the default needs; megachat/data/quality.py has the complete sets of Gopher, C4 and FineWeb. To
add a language to a set, copy its entry in conf/filters/ under a new name, with the language in `applies_to`
and its own stop words and bounds: https://github.com/huggingface/fineweb-2/tree/main/configs has them.
Entries of one class that measure alike share their columns.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveInt

from megachat.config import Config
from megachat.data.document import Document
from megachat.data.language import census, codes_of, is_han, language_of
from megachat.data.repair import normalise
from megachat.data.words import HAN

__all__ = ["HAN", "Filter", "Length", "Lines", "Repetition", "Script", "Words", "language_of", "normalise"]

Share = Annotated[float, Field(ge=0, le=1)]

EVERY = "all"
"""In `applies_to`: whatever the language."""

BEGINNING = 1_000_000
"""Characters of a text from which shares and averages are taken."""

_FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)
"""Odd, and otherwise arbitrary: they make one number of the four of a 4-gram."""


class Filter(Config):
    """One rule."""

    columns: ClassVar[tuple[str, ...]]
    """The names of its scores."""
    measured_by: ClassVar[tuple[str, ...]] = ()
    """The settings that the scores depend on; the others are bounds."""

    applies_to: list[str]
    """The languages it was made for, or [all]; documents in others pass unseen."""

    @property
    def reason(self) -> str:
        """What was wrong with the documents it dropped, for the report."""
        raise NotImplementedError

    def measure(self, document: Document) -> tuple[float, ...]:
        """The scores of a document, cleaned and in a language it applies to: one for each column."""
        raise NotImplementedError

    def keep(self, *scores: Any) -> bool:
        """Whether a document with these scores is worth learning from."""
        raise NotImplementedError

    def applies(self, language: str) -> bool:
        """Whether it was made for a language."""
        return language in self.applies_to or EVERY in self.applies_to


def share(part: float | int, whole: float | int) -> float:
    """part / whole, and 0 of nothing."""
    return float(part / whole) if whole else 0.0


class Script(Filter):
    """Drops what is in no language wanted, before all else as FineWeb does (https://arxiv.org/abs/2406.17557)."""

    columns = ("wanted",)
    measured_by = ("wanted",)

    wanted: list[str]
    """The languages to keep, as told by `LanguageId` or by the source itself."""

    @property
    def reason(self) -> str:
        return f"not in {', '.join(self.wanted)}, as far as can be told"

    def measure(self, document: Document) -> tuple[float, ...]:
        return (float(document.language in self.wanted),)

    def keep(self, *scores: Any) -> bool:
        return bool(scores[0])


class Length(Filter):
    """Too short to teach anything, or so long that one document would weigh too much.

    Gopher (Rae et al., 2021, https://arxiv.org/abs/2112.11446, A1.1) keeps 50 to 100,000 words.
    """

    columns = ("characters",)

    minimum: NonNegativeInt
    """Characters."""
    maximum: PositiveInt
    """Characters."""

    @property
    def reason(self) -> str:
        return f"not {self.minimum:,} to {self.maximum:,} characters long"

    def measure(self, document: Document) -> tuple[float, ...]:
        return (float(len(document.text)),)

    def keep(self, *scores: Any) -> bool:
        (characters,) = scores
        return self.minimum <= characters <= self.maximum


class Repetition(Filter):
    """The same lines or the same words over and over.

    Gopher (Rae et al., 2021, https://arxiv.org/abs/2112.11446, A1.1): duplicated lines above 0.30 of all, by
    count, and above 0.20 by characters; the commonest 4-gram of words above 0.16 of the characters. Words are
    what is between blanks and lines are stripped; `GopherRepetition` has the whole of the rule.
    """

    columns = ("copied_lines", "copied_characters", "commonest_four")

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

    def measure(self, document: Document) -> tuple[float, ...]:
        text = document.text[:BEGINNING]
        lines = [stripped for line in text.split("\n") if (stripped := line.strip())]
        copies = [(line, count - 1) for line, count in Counter(lines).items() if count > 1]
        size = sum(map(len, lines))
        return (
            share(sum(count for _, count in copies), len(lines)),
            share(sum(len(line) * count for line, count in copies), size),
            share(self._commonest(text, document.language), size),
        )

    def keep(self, *scores: Any) -> bool:
        lines, characters, four_grams = scores
        return lines <= self.lines and characters <= self.characters and four_grams <= self.four_grams

    def _commonest(self, text: str, language: str) -> int:
        """Characters in all copies of the commonest 4-gram."""
        words: Sequence[str]
        if language == "zh":
            codes = codes_of(text)
            codes = codes[is_han(codes)]
            words, numbers = codes.tobytes().decode("utf-32-le"), codes.astype(np.uint64)
        else:
            words = split(text)
            numbers = np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)
        if len(words) < 8:
            return 0
        grams = Counter(words[place : place + 4] for place in often(numbers))
        most = max(grams.values(), default=0)
        if most < 3:  # said twice is not over and over
            return 0
        return most * max(sum(map(len, gram)) for gram, count in grams.items() if count == most)


@functools.lru_cache(maxsize=1)
def split(text: str) -> tuple[str, ...]:
    """What is between blanks, remembered for the next rule that asks for this text."""
    return tuple(text.split())


def often(numbers: NDArray[np.uint64]) -> list[int]:
    """Where there may be a 4-gram that occurs three times: all such places, in order, and hardly another."""
    first, second, third, fourth = (numbers[place : len(numbers) - 3 + place] for place in range(4))
    # Counting tuples takes five times as long as sorting their sums, which leaves few of them to be counted.
    sums = first * _FACTORS[0] + second * _FACTORS[1] + third * _FACTORS[2] + fourth
    ordered = np.sort(sums)
    thrice = ordered[2:][ordered[2:] == ordered[:-2]]
    return np.flatnonzero(np.isin(sums, thrice)).tolist() if len(thrice) else []


class Lines(Filter):
    """Data in the guise of text: tables, minified code, base64.

    StarCoder (Li et al., 2023, https://arxiv.org/abs/2305.06161, 3.1) drops files with a line over 1,000
    characters, lines over 100 on average, or under 0.25 of the characters alphanumeric.
    """

    columns = ("longest_line", "average_line", "letters")

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

    def measure(self, document: Document) -> tuple[float, ...]:
        text = document.text[:BEGINNING]
        lines = text.split("\n")
        english, others, _ = census(text)
        return (
            float(max(map(len, lines))),
            len(text) / len(lines),
            share(english + others, sum(map(len, split(text)))),
        )

    def keep(self, *scores: Any) -> bool:
        longest, average, alphabetic = scores
        return longest <= self.longest and average <= self.average and alphabetic >= self.alphabetic


class Words(Filter):
    """Word lists, identifiers and keyword spam: not sentences.

    Gopher (Rae et al., 2021, https://arxiv.org/abs/2112.11446, A1.1): a mean word of 3 to 10 characters, and
    at least two of the commonest words of the language. Words are what is between blanks; in Chinese they are
    characters, and have no mean length.
    """

    columns = ("mean_word", "stop_words")
    measured_by = ("stop_words",)

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

    def measure(self, document: Document) -> tuple[float, ...]:
        text = document.text[:BEGINNING]
        if document.language == "zh":
            return 1.0, float(sum(word in text for word in {*self.stop_words}))
        words = split(text)
        longest = max(map(len, self.stop_words), default=0)
        common = {word.lower() for word in words if len(word) <= longest}.intersection(self.stop_words)
        return share(sum(map(len, words)), len(words)), float(len(common))

    def keep(self, *scores: Any) -> bool:
        mean, common = scores
        return self.shortest <= mean <= self.longest and common >= self.common
