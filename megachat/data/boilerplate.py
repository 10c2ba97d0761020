"""Removes lines that belong to the page and not to its text: cookie banners, buttons, policies, placeholders.

C4 (Raffel et al., 2020, https://jmlr.org/papers/v21/20-074.html, 2.2, and c4_utils.py in tensorflow_datasets)
removes lines that mention Javascript, cookies or policies, that end without punctuation, or have fewer than
three words. The last two also remove headings, lists and verse. FineWeb (https://arxiv.org/abs/2406.17557,
3.5) left out the one about punctuation, FineWeb-2 (https://arxiv.org/abs/2506.20920) all of C4: so they are
a choice, and hold for the languages in `c4`.
"""

import re
from collections.abc import Mapping

from pydantic import NonNegativeInt, PositiveInt

from megachat.config import Config
from megachat.data.words import UNSPACED

_citation = re.compile(r"\[[0-9]{0,3}\]|\[edit\]|\[citation needed\]")
_unspaced = re.compile(f"[{UNSPACED}]")
_ENDS = (".", "?", "!", '"', "'", "”", "’", "。", "？", "！", "」", "』")


class Boilerplate(Config):
    """Which lines go. Code has none: there each line belongs to the whole."""

    applies_to: list[str]
    """The languages whose documents are looked at, or [all]; never `code`."""
    buttons: Mapping[str, list[str]]
    """By language: lines that are nothing but this, in any letter case, go."""
    phrases: Mapping[str, list[str]]
    """By language: lines that mention this go, if they are short."""
    short: PositiveInt
    """Characters of a line that is short: a paragraph may well be about cookies. C4 has no such bound."""
    c4: list[str]
    """The languages that `citations`, `terminal` and `words` hold for, or [all]: C4's are English."""
    citations: bool
    """Whether Wikipedia's [1], [edit] and [citation needed] are cut out of their lines, as in C4."""
    terminal: bool
    """Whether lines must end with punctuation that ends a sentence, as in C4."""
    words: NonNegativeInt
    """How many words a line must have; C4 wants 3. Two characters of Chinese count as one."""
    longest_word: PositiveInt
    """A line with a longer word goes; 1,000 characters in C4. Chinese has no such words."""

    def apply(self, text: str, language: str) -> tuple[str, int]:
        """The text without such lines, and how many they were; lines that were empty before stay."""
        if language == "code" or not (language in self.applies_to or "all" in self.applies_to):
            return text, 0
        c4 = language in self.c4 or "all" in self.c4
        if c4 and self.citations and "[" in text:
            text = _citation.sub("", text)
        folded = text.lower()
        # All at once first, which is most often all there is to do: a search in C costs next to nothing.
        phrases = [phrase for phrase in self.phrases.get(language, ()) if phrase.lower() in folded]
        phrases = [phrase.lower() for phrase in phrases]
        buttons = {button.lower() for button in self.buttons.get(language, ()) if button.lower() in folded}
        sentences = c4 and bool(self.terminal or self.words)
        if not (phrases or buttons or sentences or len(text) > self.longest_word):
            return text, 0
        lines = text.split("\n")
        kept = [line for line in lines if not line or not self._goes(line.strip(), phrases, buttons, c4)]
        return ("\n".join(kept).strip("\n "), len(lines) - len(kept)) if len(kept) < len(lines) else (text, 0)

    def _goes(self, line: str, phrases: list[str], buttons: set[str], c4: bool) -> bool:
        if not line:
            return False
        folded = line.lower()
        if folded.strip("|>»<«·•-–— ") in buttons:
            return True
        if len(line) <= self.short and any(phrase in folded for phrase in phrases):
            return True
        if c4 and self.terminal and (not line.endswith(_ENDS) or line.endswith("...")):
            return True
        if len(line) > self.longest_word or (c4 and self.words):
            parts = line.split()
            longest = max(map(len, parts))
            if longest > self.longest_word and not _unspaced.search(line):
                return True
            count = sum(not _unspaced.search(part) for part in parts) + len(_unspaced.findall(line)) // 2
            return c4 and count < self.words
        return False
