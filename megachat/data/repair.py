"""Text in one spelling: broken encodings mended, one kind of line end, one Unicode form, nothing invisible.

What is clean stays as it is, byte for byte; what is broken by more than its spelling is left to the filters.
Mojibake is mended by ftfy (Speer, 2019, https://doi.org/10.5281/zenodo.2591652), which reads 1 MB/s: so it
sees only lines that have characters all mojibake has, and that few languages use next to each other.
"""

import functools
import re
import unicodedata
from collections.abc import Callable
from typing import Any, Literal

from megachat.config import Config
from megachat.data.words import MARKS

_surrogate = re.compile("[\ud800-\udfff]")
_control = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")
_CONTROL = bytes(code for code in range(128) if _control.match(chr(code)))

# The first byte of a character in UTF-8 is C2 to F4 and is followed by 80 to BF: as Latin-1, cp1250 to 1257,
# Mac Roman and cp437 show them. Of 2,605 lines that ftfy mends in eight encodings this finds all but one.
_mojibake = re.compile(
    "[\xa1-\u017f\u0386-\u03ff\u0401-\u045f\u0490\u0491\u2219\u221a\u2500-\u25a0]"
    "[\x80-\u017f\u0192\u02c6-\u02dd\u0384-\u03ff\u0401-\u045f\u0490\u0491\u2013-\u2044\u20a7\u20ac\u2116"
    "\u2122\u2202-\u2265\u2310-\u25ca\ufb01\ufb02\ufffd]"
)

# What Unicode and Python take for the end of a line or page. Beside a newline it is one end, not two. Where a
# pattern begins with a class of characters, Python's `re` skips quickly to the first of them.
_line_end = re.compile(
    "[\x0b\x0c\x1c-\x1e\x85](?<![\n\x0b\x0c\x1c-\x1e\x85].)[\x0b\x0c\x1c-\x1e\x85]*+(?!\n)"
)

STACKED = 30
"""Combining marks that a character may have: as many as in Unicode's Stream-Safe Text Format (UAX #15)."""

_MARKS_OF_NFKC = "\uff9e\uff9f"
# Beyond the first plane also much that is no mark, which `_thinned` tells apart: single ranges are fast.
_OFTEN = f"[{MARKS}\ufe20-\ufe2f{_MARKS_OF_NFKC}\U00010000-\U0001efff]"
_stacks = re.compile(f"{_OFTEN}{_OFTEN}{{{STACKED},}}")

_empty_lines = re.compile(r"\n{4,}")

_joiner = re.compile(
    # Arabic script and those of India and South East Asia spell with them; emoji are joined by them. Whole
    # runs: behind the first one of them the second would look like one that belongs there.
    "(?<![\u0600-\u08ff\u0900-\u0dff\u0f00-\u109f\u1780-\u18af\u200c\u200d\ufb50-\ufdff\ufe0f\ufe70-\ufefc"
    "\u2190-\u2bff\U0001f000-\U0001faff])[\u200c\u200d]+"
    "|(?<=[\u200c\u200d]{2})[\u200c\u200d]+"  # no script has three in a row
)
_invisible = re.compile(
    "(?<![\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff])\u200b"  # where it is what separates words
    "|[\xad\u180e\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufff9-\ufffb]"
)
# Tags spell flags, as that of England; everywhere else they are there to hide text.
_tags = re.compile(
    "(\U0001f3f4[\U000e0030-\U000e0039\U000e0061-\U000e007a]{3,6}\U000e007f)|[\U000e0000-\U000e007f]+"
)
_hidden = re.compile("[\xad\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufff9-\ufffb\U000e0000-\U000e007f]")

Form = Literal["NFC", "NFKC", "none"]


def normalise(text: str, form: Form = "NFC") -> str:
    """The same text in one spelling: NFC, lines ended by a newline, no control characters.

    NFC and not NFKC: NFKC would rewrite x² as x2 and full-width Chinese punctuation as ASCII.
    """
    controlled = _controlled(text)
    if controlled:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        text = _line_end.sub("\n", text)
    if not text.isascii():
        if _surrogate.search(text):
            # The two halves of a character make it whole; one alone has no meaning.
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        if form != "none":
            # Marks are sorted in quadratic time: a text of nothing else would take hours.
            text = unicodedata.normalize(form, _stacks.sub(_thinned, text))
    if controlled:
        text = _control.sub("", text)
    return text.strip("\n ")


def _controlled(text: str) -> bool:
    """Whether there is a control character, the carriage return being one."""
    if not text.isascii():
        return _control.search(text) is not None
    encoded = text.encode()
    return len(encoded.translate(None, _CONTROL)) < len(encoded)  # a fifth of the time


def _thinned(found: re.Match[str]) -> str:
    """What is left where many marks may follow each other: the first of each run of them."""
    kept, run = [], 0
    for char in found[0]:
        run = run + 1 if unicodedata.category(char)[0] == "M" or char in _MARKS_OF_NFKC else 0
        kept += [char] if run <= STACKED else []
    return "".join(kept)


def suspicious(text: str) -> bool:
    """Whether two characters follow each other as those do that ftfy could mend."""
    return _mojibake.search(text) is not None


class Repair(Config):
    """What is mended, and what is made the same."""

    mojibake: bool
    """Whether ftfy mends text that was read in a wrong encoding: schÃ¶n becomes schön."""
    form: Form
    """The Unicode form. NFKC also makes ²  2 and ， a comma, so it changes what some texts are about."""
    invisible: Literal["keep", "remove"]
    """Zero-width, bidirectional and tag characters, soft hyphens. Joiners stay where a script or an emoji is
    spelt with them."""
    replacement: Literal["keep", "remove"]
    """U+FFFD, which stands for what could not be read; how many there are is a sign of quality."""
    blanks: Literal["keep", "trim", "squeeze"]
    """`trim` ends no line with a blank and leaves two empty lines at most; `squeeze` also makes each run of
    blanks inside of a line one, and all kinds of them a space: not for code or tables."""

    def apply(self, text: str) -> str:
        """The text in one spelling."""
        if not text.isascii():
            if self.mojibake and suspicious(text):
                lines = text.split("\n")
                text = "\n".join(_unbroken()(line) if suspicious(line) else line for line in lines)
            if self.replacement == "remove":
                text = text.replace("\ufffd", "")
            if self.invisible == "remove" and _hidden.search(text):
                text = _tags.sub(r"\1", _invisible.sub("", _joiner.sub("", text)))
        text = normalise(text, self.form)
        if self.blanks == "keep":
            return text
        lines = [line.rstrip() for line in text.split("\n")]
        if self.blanks == "squeeze":
            lines = [line[: len(line) - len(line.lstrip(" \t"))] + " ".join(line.split()) for line in lines]
        text = "\n".join(lines)
        return _empty_lines.sub("\n\n\n", text) if "\n\n\n\n" in text else text


@functools.cache
def _unbroken() -> Callable[[str], Any]:
    """ftfy's repair of encodings, and nothing else that it can do: quotes and ligatures are no mistakes."""
    try:
        import ftfy
    except ImportError:
        raise ValueError(
            "mending mojibake needs ftfy; pip install 'megachat[data]', or set repair.mojibake=false"
        ) from None
    settings = ftfy.TextFixerConfig(
        unescape_html=False, remove_terminal_escapes=False, fix_latin_ligatures=False,
        fix_character_width=False, uncurl_quotes=False, fix_line_breaks=False, fix_surrogates=False,
        remove_control_chars=False, normalization=None,
    )  # fmt: skip
    return functools.partial(ftfy.fix_text, config=settings)
