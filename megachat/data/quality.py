"""The complete rules of Gopher, C4 and FineWeb, in any language: conf/filters/web.yaml has their bounds.

Each score is what datatrove (https://github.com/huggingface/datatrove) computes, which FineWeb and FineWeb-2
were made with, except for where words begin and end: theirs come from spaCy, and from jieba in Chinese; ours
from `megachat.data.words`. Sums that a text of one language has in common are made once. As for the other
rules, shares and averages are those of the first million characters.
"""

import functools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from megachat.data.document import Document, read_lines
from megachat.data.filters import BEGINNING, Filter, Share, share
from megachat.data.words import UNSPACED, Segmenter, words_of

TERMINAL = tuple(".?!。？！．｡؟۔।॥։።፧။៕᙮᠃‼⁇⁈⁉‽'\"")
"""What sentences end with. Both straight quotes counted for FineWeb; datatrove has since left them out."""

COMMONEST = (2, 3, 4)
"""Of as many words in a row the commonest is looked for, as they are too often repeated by chance."""
REPEATED = (5, 6, 7, 8, 9, 10)
"""Of as many words in a row all repetitions count."""

_alphabetic = re.compile(r"[^\W\d_]")
_proper = re.compile(r"[^\W_]")
_unspaced = re.compile(f"[{UNSPACED}]")
_paragraph = re.compile(r"\n{2,}")
_lines = re.compile(r"\n+")
# Of a run of marks only the last is looked at, and nothing is given back: a line of dots takes linear time.
_sentence_end = re.compile(r"[.?!][\"'”’)\]]*+[ \t]++(?=\S)|[。？！｡](?![。？！｡])[”’」』）]*+(?=\S)")
_lorem_ipsum = re.compile("lorem ipsum", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The words of a text, counted. Of characters that are only parts of words, so many make one."""

    counts: Counter[str]
    """Before any such characters were put together."""
    scale: float
    """How many of the counted make one word."""
    words: float
    """Punctuation marks too."""
    proper: float
    """Those with a letter or digit."""
    alphabetic: float
    """Those with a letter."""
    characters: int
    """In the proper ones."""


@functools.lru_cache(maxsize=1)
def vocabulary(text: str, language: str, segmenter: Segmenter, characters_per_word: float) -> Vocabulary:
    """Counts the words of a text."""
    counts = Counter(words_of(text, language, segmenter))
    proper = [(word, count) for word, count in counts.items() if word.isalnum() or _proper.search(word)]
    parts = 0
    if segmenter == "characters" and not text.isascii():
        parts = sum(count for word, count in proper if _unspaced.match(word))
    surplus = float(parts - parts / characters_per_word)
    total = counts.total()
    return Vocabulary(
        counts,
        scale=share(total, total - surplus),
        words=total - surplus,
        proper=sum(count for _, count in proper) - surplus,
        alphabetic=sum(count for word, count in proper if word.isalpha() or _alphabetic.search(word))
        - surplus,
        characters=sum(len(word) * count for word, count in proper),
    )


class WordFilter(Filter):
    """A rule with bounds for words, wherever the script tells them apart."""

    segmenter: Segmenter
    """Words of Chinese: `characters`, or those that jieba finds, at a twentieth of the speed."""
    characters_per_word: PositiveFloat
    """How many characters count as one word in scripts without blanks; jieba's words have 1.7 to 1.8."""

    def counted(self, document: Document) -> Vocabulary:
        """The words with which a document begins."""
        return vocabulary(
            document.text[:BEGINNING], document.language, self.segmenter, self.characters_per_word
        )


class GopherQuality(WordFilter):
    """Not prose: too short, too long, made of symbols, bullets, teasers, or numbers, or without grammar.

    Gopher (Rae et al., 2021, https://arxiv.org/abs/2112.11446, A1.1, "Quality Filtering"), as in datatrove's
    `gopher_quality_filter.py`. Chinese: FineWeb-2 (https://arxiv.org/abs/2506.20920, configs/cmn_Hani.yml).
    """

    columns = (
        "words", "mean_word", "hashes", "ellipses", "bullet_lines", "ellipsis_lines", "alphabetic_words",
        "stop_words",
    )  # fmt: skip
    measured_by = ("stop_words", "segmenter", "characters_per_word")

    minimum: NonNegativeInt
    """Words, not counting punctuation; as many as its beginning suggests where a text is very long."""
    maximum: PositiveInt
    """The same."""
    shortest: NonNegativeFloat
    """Characters of the mean word, at least."""
    longest: PositiveFloat
    """Characters of the mean word, at most."""
    symbols: NonNegativeFloat
    """The most # signs for each word, and the most ellipses."""
    bullets: Share
    """The greatest share of lines that begin with a bullet."""
    ellipses: Share
    """The greatest share of lines that end with an ellipsis."""
    alphabetic: Share
    """The smallest share of words, punctuation marks too, that have a letter."""
    common: NonNegativeInt
    """How many different ones of `stop_words` there must be."""
    stop_words: list[str]
    """The commonest words of the language."""

    @property
    def reason(self) -> str:
        return (
            f"not {self.minimum:,} to {self.maximum:,} words of {self.shortest:g} to {self.longest:g} "
            f"characters on average, {self.alphabetic:.0%} with letters and {self.common} common, or symbols"
        )

    def measure(self, document: Document) -> tuple[float, ...]:
        text = document.text[:BEGINNING]
        found = self.counted(document)
        lines = [line.strip() for line in text.splitlines()]
        return (
            found.proper * max(1.0, len(document.text) / BEGINNING),
            share(found.characters, found.proper),
            share(text.count("#"), found.words),
            share(text.count("...") + text.count("…"), found.words),
            share(sum(line.startswith(("•", "-")) for line in lines), len(lines)),
            share(sum(line.endswith(("...", "…")) for line in lines), len(lines)),
            share(found.alphabetic, found.words),
            float(sum(word in found.counts for word in {*self.stop_words})),
        )

    def keep(self, *scores: Any) -> bool:
        words, mean, hashes, ellipses, bullet_lines, ellipsis_lines, alphabetic, common = scores
        return (
            self.minimum <= words <= self.maximum
            and self.shortest <= mean <= self.longest
            and max(hashes, ellipses) <= self.symbols
            and bullet_lines <= self.bullets
            and ellipsis_lines <= self.ellipses
            and alphabetic >= self.alphabetic
            and common >= self.common
        )


class GopherRepetition(WordFilter):
    """The same lines, paragraphs or words over and over.

    Gopher (Rae et al., 2021, https://arxiv.org/abs/2112.11446, A1.1, table A1), as in datatrove's
    `gopher_repetition_filter.py`; Chinese as in FineWeb-2 (https://arxiv.org/abs/2506.20920). Where
    characters stand for words, a run of five words is one of as many characters as these have on average.
    """

    columns = (
        "copied_lines", "copied_paragraphs", "copied_line_characters", "copied_paragraph_characters",
        *(f"commonest_{n}" for n in COMMONEST), *(f"repeated_{n}" for n in REPEATED),
    )  # fmt: skip
    measured_by = ("segmenter", "characters_per_word")

    lines: Share
    """The greatest share of lines that are copies of an earlier one."""
    paragraphs: Share
    """The same of paragraphs."""
    line_characters: Share
    """The greatest share of characters in copied lines."""
    paragraph_characters: Share
    """The same in copied paragraphs."""
    commonest: tuple[Share, Share, Share]
    """The greatest share of characters in the commonest two, three, four words in a row."""
    repeated: tuple[Share, Share, Share, Share, Share, Share]
    """The greatest share of characters in all of five, six ... ten words in a row that came before."""

    @property
    def reason(self) -> str:
        return (
            f"copied lines or paragraphs, or words repeated: over {self.lines:.0%} of the lines, "
            f"{self.commonest[0]:.0%} of the characters in one 2-gram, or {self.repeated[0]:.0%} in 5-grams"
        )

    def measure(self, document: Document) -> tuple[float, ...]:
        text = document.text[:BEGINNING]
        lines, paragraphs = _lines.split(text), _paragraph.split(text.strip())
        copied_lines, line_characters = copies(lines)
        copied_paragraphs, paragraph_characters = copies(paragraphs)
        words = words_of(text, document.language, self.segmenter)
        grams = repetition(words, self.counted(document).scale)
        return (
            share(copied_lines, len(lines)),
            share(copied_paragraphs, len(paragraphs)),
            share(line_characters, len(text)),
            share(paragraph_characters, len(text)),
            *(share(characters, len(text)) for characters in grams),
        )

    def keep(self, *scores: Any) -> bool:
        bounds = (self.lines, self.paragraphs, self.line_characters, self.paragraph_characters)
        return all(
            score <= bound
            for score, bound in zip(scores, (*bounds, *self.commonest, *self.repeated), strict=True)
        )


def copies(items: Sequence[str]) -> tuple[int, int]:
    """How many items are copies of an earlier one, and how many characters these have."""
    if len({*items}) == len(items):
        return 0, 0
    repeated = [(item, count - 1) for item, count in Counter(items).items() if count > 1]
    return sum(count for _, count in repeated), sum(len(item) * count for item, count in repeated)


def repetition(words: Sequence[str], scale: float = 1.0) -> list[int]:
    """Characters in the commonest n-gram, with a blank between words, for each n of `COMMONEST`; then in all
    n-grams that came before, not overlapping, for each n of `REPEATED`. `scale` words count as one.

    Example: repetition("a b a b a b a b".split()) -> [12, 15, 21, 5, 6, 0, 0, 0, 0]
    """
    # Only where an n-gram occurs twice can a longer one do so: the few such places are all that is looked at.
    numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}
    ids = np.fromiter(map(numbers.__getitem__, words), np.int64, len(words))
    lengths = np.fromiter(map(len, numbers), np.int64, len(numbers))
    ends = np.concatenate([[0], np.cumsum(lengths[ids])])
    places, groups = np.arange(len(words)), ids
    size, found = 1, []
    for n in (*COMMONEST, *REPEATED):
        while size < max(1, round(n * scale)):
            fits = places + size < len(words)
            places, groups = places[fits], groups[fits]
            groups, counts = _grouped(groups * len(numbers) + ids[places + size])
            size += 1
            twice = counts[groups] > 1
            places, groups = places[twice], groups[twice]
        if n in COMMONEST:
            found.append(_commonest(places, groups, ends, size, n - 1))
        else:
            found.append(_repeated(places, groups, ends, size))
    return found


def _grouped(keys: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each key the number of its group, and for each group how many keys are in it."""
    if not len(keys):
        return keys, keys
    _, groups, counts = np.unique(keys, return_inverse=True, return_counts=True)
    return groups, counts


def _commonest(
    places: NDArray[np.int64], groups: NDArray[np.int64], ends: NDArray[np.int64], n: int, blanks: int
) -> int:
    """Characters in all places of the commonest n-gram; of equally common ones the first counts."""
    if len(ends) <= n:
        return 0
    first, count = 0, 1
    if len(places):
        counts = np.bincount(groups)
        at = int(np.argmax(counts[groups] == counts.max()))
        first, count = int(places[at]), int(counts.max())
    return count * int(ends[first + n] - ends[first] + blanks)


def _repeated(places: NDArray[np.int64], groups: NDArray[np.int64], ends: NDArray[np.int64], n: int) -> int:
    """Characters in n-grams that came before; after such a one the search goes on behind it."""
    seen: set[int] = set()
    characters, free = 0, 0
    for place, group in zip(places.tolist(), groups.tolist(), strict=True):
        if place < free:
            continue
        if group in seen:
            characters += int(ends[place + n] - ends[place])
            free = place + n
        else:
            seen.add(group)
    return characters


class C4(Filter):
    """Placeholders, code in the guise of prose, and pages with hardly a sentence.

    C4 (Raffel et al., 2020, https://jmlr.org/papers/v21/20-074.html, 2.2): no "lorem ipsum", no curly
    bracket, five sentences. Its rules about lines, which come before, are `Boilerplate`'s.
    """

    columns = ("sentences", "curly_brackets", "lorem_ipsum")

    sentences: NonNegativeInt
    """How many there must be. Each line is one at least."""
    curly_brackets: NonNegativeInt
    """How many { are allowed."""
    lorem_ipsum: NonNegativeInt
    """How often the text may say so."""

    @property
    def reason(self) -> str:
        return f"fewer than {self.sentences} sentences, curly brackets, or lorem ipsum"

    def measure(self, document: Document) -> tuple[float, ...]:
        text, beginning = document.text, document.text[:BEGINNING]
        lines = sum(not line.isspace() for line in beginning.splitlines() if line)
        sentences = lines + sum(1 for _ in _sentence_end.finditer(beginning))
        return float(sentences), float(text.count("{")), float(sum(1 for _ in _lorem_ipsum.finditer(text)))

    def keep(self, *scores: Any) -> bool:
        sentences, brackets, lorem_ipsum = scores
        return (
            sentences >= self.sentences
            and brackets <= self.curly_brackets
            and lorem_ipsum <= self.lorem_ipsum
        )


class FineWeb(WordFilter):
    """Lists, navigation and copied lines, in short: lines that are not sentences.

    FineWeb (Penedo et al., 2024, https://arxiv.org/abs/2406.17557, "Custom filters") and, for newlines and
    other languages, FineWeb-2 (https://arxiv.org/abs/2506.20920); datatrove's `fineweb_quality_filter.py`.
    """

    columns = ("terminal_lines", "short_lines", "copied_characters", "newlines")
    measured_by = ("short", "segmenter", "characters_per_word")

    terminal_lines: Share
    """The smallest share of lines that end with punctuation that ends a sentence."""
    short_lines: Share
    """The greatest share of short lines."""
    short: PositiveInt
    """Characters that a short line has at most."""
    copied_characters: Share
    """The greatest share of characters in lines that are copies of an earlier one."""
    newlines: NonNegativeFloat
    """The most line ends for each word."""

    @property
    def reason(self) -> str:
        return (
            f"under {self.terminal_lines:.0%} of the lines are sentences, over {self.short_lines:.0%} "
            f"are short, {self.copied_characters:.0%} are copies, or {self.newlines:g} line ends a word"
        )

    def measure(self, document: Document) -> tuple[float, ...]:
        text = document.text[:BEGINNING]
        lines = [line for line in text.split("\n") if line and not line.isspace()]
        newlines = text.count("\n")
        return (
            share(sum(line.endswith(TERMINAL) for line in lines), len(lines)),
            share(sum(len(line) <= self.short for line in lines), len(lines)),
            share(copies(lines)[1], len(text) - newlines),
            share(newlines, self.counted(document).words),
        )

    def keep(self, *scores: Any) -> bool:
        terminal_lines, short_lines, copied_characters, newlines = scores
        return (
            terminal_lines >= self.terminal_lines
            and short_lines <= self.short_lines
            and copied_characters <= self.copied_characters
            and newlines <= self.newlines
        )


class StopWordShare(WordFilter):
    """How much of a text is the grammar of its language: little in lists of names, most in chatter.

    The closed class word ratio of ROOTS (Laurençon et al., 2022, https://arxiv.org/abs/2303.03915, 3.2).
    """

    columns = ("stop_word_share",)
    measured_by = ("stop_words", "segmenter", "characters_per_word")

    minimum: Share
    """The smallest share of words, not counting punctuation."""
    maximum: Share
    """The greatest share."""
    stop_words: list[str]
    """In lower case."""

    @property
    def reason(self) -> str:
        return f"not {self.minimum:.0%} to {self.maximum:.0%} of the words are stop words"

    def measure(self, document: Document) -> tuple[float, ...]:
        found = self.counted(replace(document, text=document.text[:BEGINNING].lower()))
        return (share(sum(found.counts[word] for word in {*self.stop_words}), found.proper),)

    def keep(self, *scores: Any) -> bool:
        return self.minimum <= scores[0] <= self.maximum


class BadWords(Filter):
    """Words that the user does not want.

    C4 (Raffel et al., 2020, https://jmlr.org/papers/v21/20-074.html, 2.2) dropped every page with a word of a
    public list. Such lists remove medicine and the speech of minorities with the rest (Dodge et al., 2021,
    https://arxiv.org/abs/2104.08758, 5.3), so megachat has none, and a few may be allowed.
    """

    columns = ("bad_words",)
    measured_by = ("path",)

    path: Path
    """A file with one word or phrase on each line."""
    maximum: NonNegativeInt
    """How many of them, repeated ones too, a document may have."""

    @property
    def reason(self) -> str:
        return f"more than {self.maximum} words of {self.path}"

    def measure(self, document: Document) -> tuple[float, ...]:
        return (float(sum(1 for _ in _any_of(self.path).finditer(document.text.lower()))),)

    def keep(self, *scores: Any) -> bool:
        return bool(scores[0] <= self.maximum)


@functools.cache
def _any_of(path: Path) -> re.Pattern[str]:
    """Finds the words of a file: whole ones, but in scripts that put no blanks between them anywhere."""
    words = sorted(
        {line.strip().lower() for _, line in read_lines(path)} - {""}, key=lambda word: (-len(word), word)
    )
    if not words:
        raise ValueError(f"{path}: has no word; write one on each line, or leave the rule out")
    unspaced = re.compile(f"[{UNSPACED}]")
    parts = [
        re.escape(word) if unspaced.search(word) else rf"(?<!\w){re.escape(word)}(?!\w)" for word in words
    ]
    return re.compile("|".join(parts))
