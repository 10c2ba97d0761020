"""Boilerplate: which lines go, in which language, and which stay."""

import pytest

from megachat.config import compose, decode
from megachat.data.boilerplate import Boilerplate


def rules(name: str) -> Boilerplate:
    decoded: Boilerplate = decode(compose(f"boilerplate/{name}")["boilerplate"])
    return decoded


@pytest.mark.parametrize(
    ("text", "language", "clean", "removed"),
    [
        ("Home\nA story begins.\n» Read more »\nSo it ends.", "en", "A story begins.\nSo it ends.", 2),
        ("We use cookies to improve this site.\nThe text stays.", "en", "The text stays.", 1),
        ("正文在这里。\n返回顶部\n版权所有 某某公司\n扫描二维码关注我们", "zh", "正文在这里。", 3),
        ("Please enable JavaScript\n第一段。\n请打开JavaScript", "zh", "第一段。", 2),
        ("Home is where the heart is.", "en", "Home is where the heart is.", 0),
        ("a b c\n\nMenu\n\nd e f", "en", "a b c\n\n\nd e f", 1),
        ("Rivers\nThey flow to the sea[1]\nAs always", "en", "They flow to the sea", 2),  # C4's rules
        ("河流\n它们流入大海[1]", "zh", "河流\n它们流入大海[1]", 0),  # FineWeb-2 has none of them
        ("返回顶部", "ja", "返回顶部", 0),
        ("x" * 1001 + "\na short line", "en", "a short line", 1),
        ("字" * 1001 + "\n短", "zh", "字" * 1001 + "\n短", 0),
    ],
)
def test_lines_of_the_page_go(text: str, language: str, clean: str, removed: int) -> None:
    assert rules("web").apply(text, language) == (clean, removed)


def test_a_paragraph_about_cookies_stays() -> None:
    text = "Many sites use cookies to remember who you are. " * 5
    assert rules("web").apply(text, "en") == (text, 0)


def test_code_is_left_alone() -> None:
    code = "def menu():\n    Home\n    javascript\n" + "x" * 1001
    assert rules("web").apply(code, "code") == (code, 0)
    assert rules("c4").apply(code, "code") == (code, 0)


def test_c4_keeps_lines_that_end_like_a_sentence_and_have_three_words() -> None:
    text = (
        "A title\nThis stays.[1] It does.\nThis trails off...\nToo short.\nIs it “no?”\nUse Javascript now."
    )
    clean = "This stays. It does.\nIs it “no?”"
    assert rules("c4").apply(text, "en") == (clean, 4)


def test_english_lines_are_those_of_datatrove_for_fineweb() -> None:
    # C4QualityFilter(filter_no_terminal_punct=False), as its rules are written down in c4_filters.py.
    lines = [
        "One two",
        "One two three",
        "a b c[12] [edit]",
        "We use cookies here",
        "On Javascript alone",
        "x " * 9,
    ]
    kept = "\n".join(["One two three", "a b c ", "x " * 9])
    assert rules("web").apply("\n".join(lines), "en") == (kept.strip(), 3)


def test_words_of_chinese_are_two_characters() -> None:
    rule = rules("none").model_copy(update={"applies_to": ["zh"], "words": 3})
    assert rule.apply("四个字吧\n这里有六个字", "zh") == ("这里有六个字", 1)


def test_none_changes_nothing() -> None:
    text = "Home\n" + "x" * 2000 + "\nmenu"
    assert rules("none").apply(text, "en") == (text, 0)
