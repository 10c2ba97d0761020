"""The rules of Gopher, C4 and FineWeb on texts small enough to count by hand."""

import random
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megachat.config import compose, decode
from megachat.data.document import Document
from megachat.data.filters import Filter
from megachat.data.quality import BadWords, copies, repetition, vocabulary
from megachat.data.words import split_words

WEB: dict[str, Filter] = decode(compose("clean", ["filters=web"])).filters
PROSE = (
    "Last summer we walked along the river to a village that nobody in our family had seen before. "
    "The houses were built of grey stone, and most of their doors stood open because of the heat. "
    "An old woman asked where we came from; she laughed when we told her how far it was. "
    "We ate bread and cheese under a tree, slept for an hour, and went on when the sun was lower. "
    "It took until evening to find the road again, but I have never enjoyed being lost so much."
)
CHINESE = (
    "去年夏天，我们沿着河边走到一个谁也没有去过的村子。那里的房子是用灰色的石头盖的，因为天气很热，大多数人家的门都开着。"
    "一位老人问我们从哪里来，听说路那么远，她笑了起来。我们在树下吃了面包和奶酪，睡了一个小时，等太阳低一些才继续往前走。"
    "直到晚上才重新找到大路，不过我从来没有因为迷路而这样高兴过。"
)


def scores(name: str, text: str, **settings: Any) -> dict[str, float]:
    rule = WEB[name].model_copy(update=settings)
    language = "zh" if name.startswith("chinese") else "en"
    document = Document(id="x", text=text, source="s", language=language)
    return dict(zip(rule.columns, rule.measure(document), strict=True))


def removed_by(text: str, language: str) -> list[str]:
    document = Document(id="x", text=text, source="s", language=language)
    return [
        name
        for name, rule in WEB.items()
        if rule.applies(language) and not rule.keep(*rule.measure(document))
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "It's 3.5%... see http://a.b/c (1)",
            ["It's", "3.5", "%", "...", "see", "http://a.b/c", "(", "1", ")"],
        ),
        ("naïve—café ### a_b", ["naïve", "—", "café", "###", "a_b"]),
        ("我们用GPU学语言。", ["我", "们", "用", "GPU", "学", "语", "言", "。"]),
        ("हिन्दी में", ["हिन्दी", "में"]),  # vowel signs are inside of words
        ("", []),
    ],
)
def test_words_and_punctuation_marks(text: str, words: list[str]) -> None:
    assert split_words(text) == words


def test_jieba_finds_the_words_of_chinese() -> None:
    pytest.importorskip("jieba")
    assert split_words("语言模型 学习", "zh", "jieba") == ["语言", "模型", "学习"]
    assert split_words("a b", "en", "jieba") == ["a", "b"]


def test_gopher_quality_counts() -> None:
    # Proper words: the cat and 42 the dogs (6 of 2.83 characters); with "-", "...", "#": 9; with letters: 5.
    found = scores("quality", "- the cat and 42...\n# the dogs", stop_words=["the", "and", "of"])
    assert found == pytest.approx(
        {
            "words": 6, "mean_word": (3 + 3 + 3 + 2 + 3 + 4) / 6, "hashes": 1 / 9, "ellipses": 1 / 9,
            "bullet_lines": 1 / 2, "ellipsis_lines": 1 / 2, "alphabetic_words": 5 / 9, "stop_words": 2,
        }
    )  # fmt: skip


def test_as_many_characters_make_a_word_of_chinese() -> None:
    # Eight characters are 8 / 1.6 = 5 words; GPU and the full stop are one each.
    found = vocabulary("我们用GPU学习新语言。", "zh", "characters", 1.6)
    assert (found.words, found.proper, found.alphabetic, found.characters) == (7, 6, 6, 11)
    assert found.scale == 10 / 7


def test_gopher_repetition_counts() -> None:
    # 25 characters: the paragraphs "a b c" (5) and "d" (1), lines too; copies are one paragraph, two lines.
    found = scores("repetition", "a b c\n\na b c\n\nd\nd")
    assert found["copied_paragraphs"] == 1 / 3  # a b c, a b c, d\nd
    assert found["copied_lines"] == 2 / 5 - 2 / 5 + 2 / 4
    assert found["copied_paragraph_characters"] == 5 / 17
    assert found["copied_line_characters"] == 6 / 17
    assert found["commonest_2"] == 2 * 3 / 17  # "a b" or "b c"
    assert found["commonest_3"] == 2 * 5 / 17
    assert found["repeated_5"] == 0


def test_repetition_of_a_and_b() -> None:
    # "a b" four times with a blank each: 12; "a b a" three times: 15; "a b a b" three times: 21; of 5-grams
    # the third is the first again, and there is no room for more; of 6-grams, too; of 7-grams there are two.
    assert repetition("a b a b a b a b".split()) == [12, 15, 21, 5, 6, 0, 0, 0, 0]
    assert repetition([]) == [0] * 9
    assert repetition(["abc", "de"]) == [6, 0, 0, 0, 0, 0, 0, 0, 0]  # said once


@settings(deadline=None)
@given(st.lists(st.sampled_from("a b c dd".split()), max_size=60))
def test_repetition_is_what_counting_one_by_one_gives(words: list[str]) -> None:
    expected = []
    for n in (2, 3, 4):
        grams = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
        most = max(grams, key=grams.count, default="")
        expected.append(len(most) * grams.count(most) if most else 0)
    for n in range(5, 11):
        seen, i, characters = set(), 0, 0
        while i + n <= len(words):
            gram = tuple(words[i : i + n])
            characters += len("".join(gram)) * (gram in seen)
            i += n if gram in seen else 1
            seen.add(gram)
        expected.append(characters)
    assert repetition(words) == expected


def test_copies_are_counted_but_for_the_first() -> None:
    assert copies(["ab", "c", "ab", "ab", ""]) == (2, 4)
    assert copies(["ab", "c"]) == (0, 0)


def test_fineweb_counts() -> None:
    # Lines that are not blank: 4, of which two end a sentence and three have at most 5 characters.
    found = scores("fineweb", "One two.\nthree\n\n三。\nthree", short=5, characters_per_word=1.0)
    assert found == pytest.approx(
        {
            "terminal_lines": 2 / 4, "short_lines": 3 / 4, "copied_characters": 5 / 20,
            "newlines": 4 / 7,  # One two . three 三 。 three
        }
    )  # fmt: skip


def test_lines_of_speech_end_with_a_quote() -> None:
    assert scores("fineweb", "He said: \"Go.\"\nNo\n'Why?'\nYes")["terminal_lines"] == 2 / 4


def test_c4_counts_sentences() -> None:
    found = scores("c4", 'He said: "Go." Then 3.5 of us went... Why?\n\nA heading\n真的。“是吗？”是。')
    assert found["sentences"] == 3 + 1 + 3
    # Each run of marks is one end, and none where nothing follows: lines, and ends between them.
    assert scores("c4", "Well... no?! Go.\n真的？！是。。。\n“好。”")["sentences"] == 3 + 2 + 1
    assert scores("c4", "Lorem Ipsum {x} {")["curly_brackets"] == 2
    assert scores("c4", "Lorem Ipsum {x} {")["lorem_ipsum"] == 1


def test_prose_passes_every_rule() -> None:
    assert removed_by(PROSE, "en") == []
    assert removed_by(CHINESE, "zh") == []


@pytest.mark.parametrize(
    ("text", "language", "rule"),
    [
        (PROSE[:200], "en", "quality"),  # 40 words
        ("\n".join(["Home and garden", "The best of that", "To be with you"] * 20), "en", "repetition"),
        ("1 2 3 4 5 6 7 8 9 " * 10 + PROSE, "en", "quality"),
        (PROSE + " {", "en", "c4"),
        (PROSE + " lorem ipsum.", "en", "c4"),
        (PROSE.replace(". ", ",\n").replace(" and", "\nand").removesuffix("."), "en", "fineweb"),
        (CHINESE[:40], "zh", "chinese_quality"),
        (CHINESE + "立即购买享受优惠价格" * 20, "zh", "chinese_repetition"),
        ("\n".join(["手机", "电脑", "平板", "耳机"] * 20), "zh", "chinese_fineweb"),
    ],
)
def test_what_is_no_prose_is_removed(text: str, language: str, rule: str) -> None:
    assert rule in removed_by(text, language)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("unit", "language"),
    [("the {n} ", "en"), ("ab\n", "en"), ("{han}", "zh"), ("{han}。\n", "zh"), ("x={n};\n", "code")],
)
def test_ten_million_characters_take_little_memory(unit: str, language: str) -> None:
    han = list(map(chr, range(0x4E00, 0x9FA5)))
    draw = random.Random(0)
    units = (
        unit.format(n=draw.randrange(10**6), han=draw.choice(han)) for _ in range(10_000_000 // len(unit))
    )
    text = "".join(units)
    document = Document(id="x", text=text * (10_000_000 // len(text) + 1), source="s", language=language)
    assert len(document.text) >= 10_000_000
    tracemalloc.start()
    try:
        for name, rule in WEB.items():
            if rule.applies(language):
                tracemalloc.reset_peak()
                rule.measure(document)
                assert tracemalloc.get_traced_memory()[1] < 300_000_000, name
    finally:
        tracemalloc.stop()


def test_a_text_is_as_long_as_all_of_it_and_its_words_are_estimated() -> None:
    text = "word " * 500_000
    document = Document(id="x", text=text, source="s", language="en")
    assert WEB["length"].measure(document) == (2_500_000,)
    assert WEB["quality"].measure(document)[0] == 500_000
    assert WEB["c4"].measure(replace(document, text=text + "{"))[1] == 1  # what it must not say is everywhere


@pytest.mark.parametrize("name", ["quality", "repetition", "fineweb", "c4"])
def test_every_score_has_a_bound(name: str) -> None:
    rule = WEB[name]
    good = dict(zip(rule.columns, rule.measure(Document("x", PROSE, "s", "en")), strict=True))
    assert rule.keep(*good.values())
    for column, value in good.items():
        # Each score is bad if it is far too great, or else if it is far too small.
        far = [rule.keep(*(good | {column: bad}).values()) for bad in (1e9, -1.0)]
        assert False in far, f"{column} of {value} may be anything"


def test_english_bounds_would_remove_all_chinese() -> None:
    document = Document(id="x", text=CHINESE, source="s", language="zh")
    rule = WEB["quality"]
    assert not rule.keep(*rule.measure(document))


def test_the_share_of_stop_words() -> None:
    rules: dict[str, Filter] = decode(compose("clean", ["filters=statistics"])).filters
    rule = rules["stop_words"]
    assert rule.measure(Document(id="x", text="The cat AND, the dog.", source="s", language="en")) == (3 / 5,)


def test_bad_words_come_from_a_file_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("Spam\nspam eggs\n\n坏词\n", encoding="utf-8")
    rule = BadWords(applies_to=["all"], path=path, maximum=1)
    for text, count in (
        ("SPAM spammer", 1),
        ("spam eggs, eggs", 1),
        ("这是坏词和spam", 1),
        ("这是坏词, spam", 2),
    ):
        measured = rule.measure(Document(id="x", text=text, source="s", language="en"))
        assert measured == (count,)
        assert rule.keep(*measured) == (count < 2)
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(ValueError, match="has no word"):
        rule.model_copy(update={"path": empty}).measure(Document(id="x", text="a", source="s"))
