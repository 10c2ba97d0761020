"""Transforms for classical models."""

import sys

import pytest

from megachat.config import compose, decode
from megachat.data.words import Transform, jieba


def transforms(name: str) -> dict[str, Transform]:
    decoded: dict[str, Transform] = decode(compose(f"transforms/{name}")["transforms"])
    return decoded


def test_nothing_is_transformed_unless_asked() -> None:
    assert transforms("none") == {}


def test_stop_words_go_from_their_own_language() -> None:
    pytest.importorskip("jieba")
    rule = transforms("classical")["stop_words"]
    assert rule.apply("The cat is on the mat\nand I am not", "en") == "cat mat\nam"
    assert rule.apply("我们的语言和模型", "zh") == "我们语言模型"
    assert rule.apply("the 的", "code") == "the 的"


def test_a_stop_word_is_not_cut_out_of_a_word() -> None:
    pytest.importorskip("jieba")
    text = "我们现在和平地生活"  # 现在 and 和平 have 在 and 和 in them
    assert transforms("classical")["stop_words"].apply(text, "zh") == text
    assert transforms("classical")["stop_words"].apply("我和你", "zh") == "我你"
    for rule in transforms("classical").values():
        text = rule.apply(text, "zh")
    assert {"现在", "和平"} <= {*text.split(" ")}
    text = "我们的语言和模型"
    for rule in transforms("classical").values():
        text = rule.apply(text, "zh")
    assert text == "我们 语言 模型"


def test_chinese_is_cut_into_words() -> None:
    pytest.importorskip("jieba")
    rule = transforms("classical")["segment"]
    assert rule.apply("语言模型\n学习", "zh") == "语言 模型\n学习"
    assert rule.apply("语言模型", "ja") == "语言模型"


def test_a_missing_jieba_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jieba", None)
    jieba.cache_clear()
    with pytest.raises(ValueError, match=r"pip install 'megachat\[data\]'"):
        jieba()
