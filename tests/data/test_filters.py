"""Filters: each on texts just inside and just outside of its bounds, in English, Chinese and code."""

import inspect
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megachat.config import compose, decode
from megachat.data.document import Document
from megachat.data.filters import Filter, Length, Lines, Repetition, Script, Words, normalise

ENGLISH = (
    "The cat sat on the mat and looked at the moon, which was full. Nobody knew what it thought of that."
)
CHINESE = "语言模型是用大量文字训练出来的程序。它读过许多书和网页，所以知道下一个词大概是什么。"
RUSSIAN = "Языковая модель читает много текста и учится угадывать следующее слово."


def document(text: str, language: str = "en") -> Document:
    return Document(id="x", text=text, source="s", language=language)


def keeps(rule: Filter, text: str, language: str = "en") -> bool:
    """What a rule says of a text, from its scores alone."""
    scores = rule.measure(document(text, language))
    assert len(scores) == len(rule.columns)
    return rule.keep(*scores)


def test_script_keeps_what_is_wanted() -> None:
    rule = Script(applies_to=["en", "zh", "code", "other"], wanted=["zh"])
    assert keeps(rule, CHINESE, "zh")
    assert not keeps(rule, ENGLISH)


@pytest.mark.parametrize(("size", "kept"), [(9, False), (10, True), (20, True), (21, False)])
def test_length_counts_characters_not_bytes(size: int, kept: bool) -> None:
    rule = Length(applies_to=["zh"], minimum=10, maximum=20)
    assert keeps(rule, "语" * size, "zh") == kept


def test_repetition_counts_copies_of_lines() -> None:
    rule = Repetition(applies_to=["en"], lines=0.5, characters=1.0, four_grams=1.0)
    assert keeps(rule, "a\nb\na\na")  # 2 of 4 lines are copies
    assert not keeps(rule, "a\nb\na\na\na")  # 3 of 5


def test_repetition_counts_characters_in_copies() -> None:
    rule = Repetition(applies_to=["en"], lines=1.0, characters=0.4, four_grams=1.0)
    assert keeps(rule, "12345678\n1234\n12345678")  # 8 of 20
    assert not keeps(rule, "12345678\n123\n12345678")  # 8 of 19


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from("abcd"), max_size=60))
def test_the_commonest_four_words_are_those_that_counting_all_finds(words: list[str]) -> None:
    rule = Repetition(applies_to=["en"], lines=1.0, characters=1.0, four_grams=1.0)
    grams = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
    most = max(grams.values(), default=0)
    often = len(words) >= 8 and most >= 3
    expected = 4 * most / (2 * len(words) - 1) if often else 0.0  # of the characters, blanks among them
    assert rule.measure(document(" ".join(words)))[2] == pytest.approx(expected)


def test_repetition_counts_the_commonest_four_words() -> None:
    rule = Repetition(applies_to=["en", "zh"], lines=1.0, characters=1.0, four_grams=0.16)
    assert keeps(rule, ENGLISH)
    assert not keeps(rule, "buy one get one " * 5 + ENGLISH)
    assert keeps(rule, CHINESE, "zh")
    assert not keeps(rule, "立即购买" * 8 + CHINESE, "zh")


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
    assert keeps(Lines(applies_to=["en"], longest=20, average=11, alphabetic=0.5), text) == kept


def test_words_wants_sentences() -> None:
    rule = Words(applies_to=["en"], shortest=3, longest=10, common=2, stop_words=["the", "and"])
    assert keeps(rule, ENGLISH)
    assert not keeps(rule, "keyword cheap flights hotel deals holiday")
    assert not keeps(rule, "the and " + "pneumonoultramicroscopic " * 3)
    assert not keeps(rule, "the and a b c d e f g h i j k")
    chinese = Words(applies_to=["zh"], shortest=1, longest=10, common=2, stop_words=["的", "是", "和"])
    assert keeps(chinese, CHINESE, "zh")
    assert not keeps(chinese, "手机电脑平板耳机", "zh")


def test_the_rules_in_conf_keep_plain_english_chinese_and_code() -> None:
    rules: dict[str, Filter] = decode(compose("clean")).filters
    assert len(rules) >= 6
    code = inspect.getsource(inspect.getmodule(normalise))  # type: ignore[arg-type]
    for text, language in ((ENGLISH * 2, "en"), (CHINESE * 3, "zh"), (code, "code")):
        applied = {name for name, rule in rules.items() if rule.applies(language)}
        assert {"script", "length"} < applied
        assert [name for name in applied if not keeps(rules[name], text, language)] == []
    assert not keeps(rules["script"], RUSSIAN, "ru")


def test_all_means_every_language() -> None:
    rule = Length(applies_to=["all"], minimum=1, maximum=2)
    assert rule.applies("en")
    assert rule.applies("sw")
    assert not Length(applies_to=["zh"], minimum=1, maximum=2).applies("en")


def test_bounds_do_not_change_scores() -> None:
    # Otherwise two entries of one class could not share their columns.
    text = document(ENGLISH + "\n" + ENGLISH)
    for name in ("default", "web", "statistics"):
        rules: dict[str, Filter] = decode(compose("clean", [f"filters={name}"])).filters
        for rule in rules.values():
            bounds = {
                field: 0.123 if isinstance(value, float) else 7
                for field, value in rule
                if field not in rule.measured_by and isinstance(value, int | float)
            }
            assert rule.model_copy(update=bounds).measure(text) == rule.measure(text)
            assert set(rule.measured_by) <= set(type(rule).model_fields) - {"applies_to"}
