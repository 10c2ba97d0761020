"""Filters: each on texts just inside and just outside of its bounds, in English, Chinese and code."""

import inspect

import pytest

from megachat.config import compose, decode
from megachat.data.document import Document
from megachat.data.filters import Filter, Length, Lines, Repetition, Script, Words, language_of, normalise

ENGLISH = (
    "The cat sat on the mat and looked at the moon, which was full. Nobody knew what it thought of that."
)
CHINESE = "语言模型是用大量文字训练出来的程序。它读过许多书和网页，所以知道下一个词大概是什么。"
RUSSIAN = "Языковая модель читает много текста и учится угадывать следующее слово."
JAPANESE = "言語モデルは、たくさんの文章を読んで、次の単語を予測することを学びます。"


def document(text: str, language: str = "en") -> Document:
    return Document(id="x", text=text, source="s", language=language)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("cafe\u0301", "caf\u00e9"),
        ("x\u00b2 \uff0c\u3002", "x\u00b2 \uff0c\u3002"),  # compatibility forms stay
        ("\ufeffa\r\nb\rc\x00\x1b[0m\td\n\n", "a\nb\nc[0m\td"),
        ("a\ud800b\u00e9", "a\ufffdb\u00e9"),
        ("\x00\x01 \n", ""),
        ("\U0001f468\u200d\U0001f469", "\U0001f468\u200d\U0001f469"),  # joined emoji stay joined
    ],
)
def test_normalise_gives_one_spelling(text: str, clean: str) -> None:
    assert normalise(text) == clean
    assert normalise(clean) == clean
    clean.encode()


@pytest.mark.parametrize(
    ("text", "language"),
    [
        (ENGLISH, "en"),
        (CHINESE, "zh"),
        (CHINESE + " transformer GPU", "zh"),
        (inspect.getsource(inspect.getmodule(normalise)), "code"),  # type: ignore[arg-type]
        (RUSSIAN, "other"),
        (JAPANESE, "other"),
        ("12345 67890", "other"),
        ("", "other"),
    ],
)
def test_the_script_tells_the_language(text: str, language: str) -> None:
    assert language_of(text) == language


def test_script_keeps_what_is_wanted() -> None:
    rule = Script(applies_to=["en", "zh", "code", "other"], wanted=["zh"])
    assert rule.keep(document(CHINESE, "zh"))
    assert not rule.keep(document(ENGLISH))


@pytest.mark.parametrize(("size", "kept"), [(9, False), (10, True), (20, True), (21, False)])
def test_length_counts_characters_not_bytes(size: int, kept: bool) -> None:
    rule = Length(applies_to=["zh"], minimum=10, maximum=20)
    assert rule.keep(document("语" * size, "zh")) == kept


def test_repetition_counts_copies_of_lines() -> None:
    rule = Repetition(applies_to=["en"], lines=0.5, characters=1.0, four_grams=1.0)
    assert rule.keep(document("a\nb\na\na"))  # 2 of 4 lines are copies
    assert not rule.keep(document("a\nb\na\na\na"))  # 3 of 5


def test_repetition_counts_characters_in_copies() -> None:
    rule = Repetition(applies_to=["en"], lines=1.0, characters=0.4, four_grams=1.0)
    assert rule.keep(document("12345678\n1234\n12345678"))  # 8 of 20
    assert not rule.keep(document("12345678\n123\n12345678"))  # 8 of 19


def test_repetition_counts_the_commonest_four_words() -> None:
    rule = Repetition(applies_to=["en", "zh"], lines=1.0, characters=1.0, four_grams=0.16)
    assert rule.keep(document(ENGLISH))
    assert not rule.keep(document("buy one get one " * 5 + ENGLISH))
    assert rule.keep(document(CHINESE, "zh"))
    assert not rule.keep(document("立即购买" * 8 + CHINESE, "zh"))


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("x" * 20 + "\n", True),
        ("x" * 21 + "\n", False),  # the longest line
        (("x" * 10 + "\n") * 9, True),
        (("x" * 13 + "\n") * 9, False),  # over 11 a line
        ("ab 12\n", True),
        ("a 123\n", False),  # a quarter letters
    ],
)
def test_lines_bounds_the_longest_the_average_and_the_share_of_letters(text: str, kept: bool) -> None:
    assert Lines(applies_to=["en"], longest=20, average=11, alphabetic=0.5).keep(document(text)) == kept


def test_words_wants_sentences() -> None:
    rule = Words(applies_to=["en"], shortest=3, longest=10, common=2, stop_words=["the", "and"])
    assert rule.keep(document(ENGLISH))
    assert not rule.keep(document("keyword cheap flights hotel deals holiday"))
    assert not rule.keep(document("the and " + "pneumonoultramicroscopic " * 3))
    assert not rule.keep(document("the and a b c d e f g h i j k"))
    chinese = Words(applies_to=["zh"], shortest=1, longest=10, common=2, stop_words=["的", "是", "和"])
    assert chinese.keep(document(CHINESE, "zh"))
    assert not chinese.keep(document("手机电脑平板耳机", "zh"))


def test_the_rules_in_conf_keep_plain_english_chinese_and_code() -> None:
    rules: dict[str, Filter] = decode(compose("clean")).filters
    assert len(rules) >= 6
    code = inspect.getsource(inspect.getmodule(normalise))  # type: ignore[arg-type]
    for text, language in ((ENGLISH * 2, "en"), (CHINESE * 3, "zh"), (code, "code")):
        applied = {name for name, rule in rules.items() if language in rule.applies_to}
        assert {"script", "length"} < applied
        assert [name for name in applied if not rules[name].keep(document(text, language))] == []
    assert not rules["script"].keep(document(RUSSIAN, "other"))
