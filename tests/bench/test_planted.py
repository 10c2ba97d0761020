"""What the benchmark takes for the truth."""

import pytest

from tools.bench import planted
from tools.bench.planted import chinese, jaccard, neighbours, plant, shingles

ENGLISH = [
    " ".join(f"{'abcdefghij'[number % 10]}{number}x{word}" for word in range(200)) for number in range(60)
]
CHINESE = ["".join(chr(0x4E00 + 97 * number + word) for word in range(180)) + "。" for number in range(60)]


def test_shingles_are_runs_of_five_words_in_lower_case_without_punctuation():
    assert shingles("The cat, THE dog; a bird!") == {
        ("the", "cat", "the", "dog", "a"),
        ("cat", "the", "dog", "a", "bird"),
    }


def test_shingles_of_chinese_are_runs_of_eight_characters():
    assert shingles("一二三四，五六七八九") == {tuple("一二三四五六七八"), tuple("二三四五六七八九")}
    assert chinese("我们用 Python 写代码")
    assert not chinese("the word 中 means middle or centre")


def test_a_text_too_short_for_a_shingle_is_like_its_own_copy_and_an_empty_one_like_none():
    assert jaccard(shingles("Two words"), shingles("two  words!")) == 1.0
    assert jaccard(shingles(""), shingles("")) == 0.0


def test_the_similarity_after_one_word_of_ten_is_that_of_the_shingles_without_it():
    ten = "a b c d e f g h i j"
    # Of six shingles, the first word is in one: five are shared by both, of seven in all.
    assert jaccard(shingles(ten), shingles(ten.replace("a", "z"))) == pytest.approx(5 / 7)


def test_neighbours_are_those_that_comparing_all_pairs_finds():
    texts, _ = plant(ENGLISH[:20] + CHINESE[:20], share=0.4)
    all_shingles = [shingles(text) for text in texts]
    expected = {
        number: {
            other
            for other in range(len(texts))
            if other != number and jaccard(all_shingles[number], all_shingles[other]) >= 0.7
        }
        for number in range(len(texts))
    }
    assert neighbours(texts, range(len(texts)), 0.7) == expected
    assert any(expected.values())


def test_a_fifth_is_planted_and_each_pair_is_as_alike_as_it_says():
    texts, truth = plant(ENGLISH + CHINESE, share=0.2)
    assert len(truth) == 30  # of 150 texts then
    assert len(texts) == 150
    for pair in truth:
        assert jaccard(shingles(texts[pair.original]), shingles(texts[pair.copy])) == pair.jaccard
    assert sorted(texts[of] for of in set(range(150)) - {pair.copy for pair in truth}) == sorted(
        ENGLISH + CHINESE
    )


def test_every_kind_of_edit_is_planted_and_they_range_from_the_same_words_to_a_third_of_them():
    _, truth = plant(ENGLISH + CHINESE, share=0.6)
    assert {pair.kind for pair in truth} == set(planted.KINDS)
    assert {pair.jaccard for pair in truth if pair.kind == "retyped"} == {1.0}
    assert 0.3 < min(pair.jaccard for pair in truth) < 0.75


def test_some_originals_have_many_copies():
    _, truth = plant(ENGLISH + CHINESE, share=0.5)
    most = max(sum(pair.original == other.original for other in truth) for pair in truth)
    assert most >= 10  # 120 copies, of which half are of three texts


def test_the_seed_decides():
    assert plant(ENGLISH, seed=1) == plant(ENGLISH, seed=1)
    assert plant(ENGLISH, seed=1) != plant(ENGLISH, seed=2)


def test_texts_too_short_to_plant_are_refused():
    with pytest.raises(ValueError, match="no text has 50 words"):
        plant(["a few words"])
