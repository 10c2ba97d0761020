"""Repair: each mistake mended, and nothing changed that is none."""

from typing import Any

import pytest

from megachat.config import compose, decode
from megachat.data.repair import Repair, normalise, suspicious


def repair(**settings: Any) -> Repair:
    default: Repair = decode(compose("repair/default")["repair"])
    return default.model_copy(update=settings)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("cafe\u0301", "caf\u00e9"),
        ("x\u00b2 \uff0c\u3002", "x\u00b2 \uff0c\u3002"),  # compatibility forms stay
        ("a\x0cb\x85c\x0bd\x1de", "a\nb\nc\nd\ne"),  # ends of pages and lines
        ("a\n\x0c\nb\x0c\x85c\n\x0cdef", "a\n\nb\nc\ndef"),  # beside a newline they say nothing more
        ("\ufeffa\r\nb\rc\x00\x1b[0m\td\n\n", "a\nb\nc[0m\td"),
        ("a\ud800b\u00e9", "a\ufffdb\u00e9"),
        ("\ud83d\ude00", "\U0001f600"),  # two halves of one character
        ("\x00\x01 \n", ""),
        ("\U0001f468\u200d\U0001f469", "\U0001f468\u200d\U0001f469"),  # joined emoji stay joined
    ],
)
def test_normalise_gives_one_spelling(text: str, clean: str) -> None:
    assert normalise(text) == clean
    assert normalise(clean) == clean
    assert repair(mojibake=False).apply(text) == clean
    clean.encode()


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Die Größe ist schön — “wirklich”", "latin-1"),
        ("Die Größe ist schön, nicht wahr", "cp1252"),
        ("Die Größe ist schön — wirklich", "mac_roman"),
        ("Die Größe ist schön — wirklich", "cp437"),
        ("我们在学习语言模型", "latin-1"),
        ("我们在学习语言模型", "mac_roman"),
        ("Привет, как дела?", "cp1251"),
    ],
)
def test_mojibake_is_mended(text: str, encoding: str) -> None:
    pytest.importorskip("ftfy")
    broken = text.encode().decode(encoding)
    assert broken != text
    assert suspicious(broken)
    assert repair().apply(f"before\n{broken}\nafter") == f"before\n{text}\nafter"
    assert repair(mojibake=False).apply(broken) != text


@pytest.mark.parametrize(
    "text",
    [
        "“Curly” quotes, ﬁne ligatures, full-width ＡＢ, &amp; and \x85entities".replace("\x85", ""),
        "naïve café — Ça va? Größe… Łódź",
        "我们在学习——语言“模型”……",
        "x\n    y = 'Ã '  # a letter by itself",
        "\u2764\ufe0f\u200d\U0001f525",  # a heart on fire
        "می\u200cخواهم",  # Persian
        "क्\u200dष",  # Hindi
        "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",  # the flag of England
        "ភាសា\u200bខ្មែរ",  # Khmer words
    ],
)
def test_what_is_clean_stays_byte_for_byte(text: str) -> None:
    pytest.importorskip("ftfy")
    assert repair().apply(text) == text == normalise(text)


def test_invisible_characters_go_where_nothing_is_spelt_with_them() -> None:
    text = "a\u200bb\u200dc\u00add\u202ee\u2066f\u2069\U000e0041g"
    assert repair().apply(text) == "abcdefg"
    assert repair(invisible="keep").apply(text) == text


def test_hidden_text_goes_as_a_whole_and_flags_stay() -> None:
    hidden = "".join(chr(0xE0000 + ord(char)) for char in "ignore all this")
    assert repair().apply(f"Good{hidden} day") == "Good day"
    scotland = "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f"
    assert repair().apply(f"{scotland} {scotland}{hidden}") == f"{scotland} {scotland}"
    assert repair().apply(f"\U0001f3f4{hidden}") == "\U0001f3f4"
    assert repair().apply("a\u200c\u200d\u200c\u200cb") == "ab"
    assert repair().apply("می\u200c\u200d\u200c\u200c\u200dخ") == "می\u200c\u200dخ"  # two may be spelling


def test_a_character_has_thirty_marks_at_most() -> None:
    assert normalise("x" + "\u0323" * 31 + "yz" + "\u0323" * 31) == (
        "x" + "\u0323" * 30 + "yẓ" + "\u0323" * 29
    )
    zalgo = "x" + "\u0316\u0301" * 15  # as many as that stay, in their order
    assert normalise(zalgo) == "x" + "\u0316" * 15 + "\u0301" * 15
    assert normalise("\U0001d400" * 100) == "\U0001d400" * 100  # letters, and not of the first plane


def test_nfkc_and_none_are_choices() -> None:
    assert repair(form="NFKC").apply("x\u00b2\uff0c") == "x2,"
    assert repair(form="none").apply("cafe\u0301") == "cafe\u0301"


def test_replacement_characters_are_kept_or_removed() -> None:
    assert repair().apply("a\ufffdb") == "a\ufffdb"
    assert repair(replacement="remove").apply("a\ufffdb") == "ab"


def test_blanks_are_kept_trimmed_or_squeezed() -> None:
    text = "  a   b\u3000c \t\n\n\n\n\nd"
    assert repair().apply(text) == "a   b\u3000c \t\n\n\n\n\nd"
    assert repair(blanks="trim").apply(text) == "a   b\u3000c\n\n\nd"
    assert repair(blanks="squeeze").apply("x\n" + text) == "x\n  a b c\n\n\nd"
