"""Words of a text in any script, and two transforms of them for classical, counting models.

Without a dictionary the words of Chinese, Japanese, Thai and the like cannot be told apart: there each
character is a word, and whoever needs the number of words divides. That needs no model, and is twenty times
as fast as jieba. Punctuation marks are words of their own, names like `a.b` and addresses are one, all much
as for spaCy, whose words the bounds of FineWeb and FineWeb-2 were made for: on prose with code the two find
the same number of words but for 1 %.
"""

import functools
import re
import unicodedata
from typing import Any, Literal

from megachat.config import Config

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
"""The Chinese characters, as the inside of a regular expression's brackets."""

UNSPACED = HAN + "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u0f00-\u0fff"
"""Scripts that put no blanks between words: Han, kana, Thai, Lao, Burmese, Khmer, Tibetan."""

Segmenter = Literal["characters", "jieba"]


MARKS = "".join(chr(code) for code in range(0x300, 0xFE00) if unicodedata.category(chr(code))[0] == "M")
"""Accents and vowel signs, which Python's `\\w` leaves out although they are inside of words."""


_RUNS = r"[.=*`#~-]+|[^\s\w]"


def _pattern(part: str) -> re.Pattern[str]:
    """Words made of one or more parts, single characters of unspaced scripts, and punctuation."""
    return re.compile(rf"[{UNSPACED}]|{part}(?:[.:/'’]+{part})*|{_RUNS}")


_word = _pattern(rf"[^\W{UNSPACED}]+")
_mark = re.compile(f"[{MARKS}]")
_marked_word = _pattern(rf"(?:[^\W{UNSPACED}]|[{MARKS}])+")  # half as fast
_ascii_word = re.compile(rf"[a-zA-Z0-9_]+(?:[.:/']+[a-zA-Z0-9_]+)*|{_RUNS}")


def split_words(text: str, language: str = "", segmenter: Segmenter = "characters") -> list[str]:
    """The words and punctuation marks of a text, in order: "It's 3.5%..." -> It's, 3.5, %, ..."""
    if segmenter == "jieba" and language == "zh":
        return [word for word in jieba().lcut(text) if not word.isspace()]
    if text.isascii():
        return _ascii_word.findall(text)
    return (_marked_word if _mark.search(text) else _word).findall(text)


@functools.lru_cache(maxsize=1)
def words_of(text: str, language: str, segmenter: Segmenter) -> tuple[str, ...]:
    """The same, remembered for the next rule that asks for this text."""
    return tuple(split_words(text, language, segmenter))


@functools.cache
def jieba() -> Any:
    """jieba with its dictionary loaded, once in a process."""
    try:
        import jieba
    except ImportError:
        raise ValueError(
            "Chinese words need jieba; pip install 'megachat[data]', or set characters"
        ) from None
    jieba.setLogLevel("WARNING")
    jieba.initialize()
    return jieba


class Transform(Config):
    """Changes the text of a document after it has been cleaned."""

    def apply(self, text: str, language: str) -> str:
        """The text to go on with."""
        raise NotImplementedError


class StopWords(Transform):
    """Removes the commonest words of a language, as bag-of-words models want it.

    A language model needs them: without its grammar no text can be learnt from.
    """

    words: dict[str, list[str]]
    """By language; other languages stay as they are. Words of Chinese are what jieba finds."""

    def apply(self, text: str, language: str) -> str:
        removed = {*self.words.get(language, ())}
        if not removed:
            return text
        lines = text.split("\n")
        if language == "zh":  # 在 and 和 are words, and parts of 现在 and 和平: only jieba knows
            left = ("".join(word for word in jieba().lcut(line) if word not in removed) for line in lines)
            return "\n".join(" ".join(line.split()) for line in left)
        return "\n".join(
            " ".join(word for word in line.split() if word.lower() not in removed) for line in lines
        )


class Segment(Transform):
    """Puts blanks between the words of Chinese, as jieba finds them.

    A tokenizer learns its own pieces from text as it is written, and would learn to write these blanks.
    """

    applies_to: list[str]
    """The languages it cuts into words."""

    def apply(self, text: str, language: str) -> str:
        if language not in self.applies_to:
            return text
        return "\n".join(" ".join(jieba().lcut(line)) for line in text.split("\n"))
