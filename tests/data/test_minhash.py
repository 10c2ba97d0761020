"""Signatures: equal to datasketch's, equal with and without numba, and of what the fold says counts."""

import tracemalloc

import numpy as np
import pytest
from datasketch import MinHash
from hypothesis import given, settings
from hypothesis import strategies as st

from megachat.data.fold import ALONE, SKIPPED, fold
from megachat.data.minhash import SCHEME, Signer, Texts, minhash

SIGNER = Signer(words=5, characters=8, permutations=112)
SAMPLES = [
    "",
    "a b c d",
    "a b c d e",
    "The quick brown fox jumps over the lazy dog, again and again.",
    "机器学习是人工智能的一个分支，研究如何从数据中学习。",
    "ﬁve ｗｉｄｅ Ĳssel ½ ㍿ ㌖ ﷺ",
    "😀 👩‍👩‍👧 a b c d e",
    "ภาษาไทยไม่มีการเว้นวรรคระหว่างคำ",
    "한국어 문장은 띄어쓰기를 한다 그리고 또",
    "हिन्दी में स्वर चिह्न होते हैं और यह भी",
]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=3000))
def test_the_signature_of_hashes_is_datasketchs(hashes: list[int]) -> None:
    theirs = MinHash(num_perm=112, scheme=SCHEME, hashfunc=lambda value: value)
    theirs.update_batch(hashes)
    assert minhash(np.array(hashes, dtype=np.uint32), 112).tolist() == theirs.hashvalues.tolist()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(max_size=60), max_size=8))
def test_with_and_without_numba_the_signatures_are_the_same(texts: list[str]) -> None:
    encodable = [text.encode(errors="replace").decode() for text in [*texts, *SAMPLES]]
    slow, fast = (SIGNER.sign(Texts.of(encodable), fast=fast) for fast in (False, True))
    assert np.array_equal(slow[0], fast[0])
    assert np.array_equal(slow[1], fast[1])


def test_a_text_with_more_words_than_there_is_room_for_is_signed_whole() -> None:
    long = " ".join(f"word{number}" for number in range(70_000))
    slow, fast = (SIGNER.sign(Texts.of([long, "a b c d e"]), fast=fast) for fast in (False, True))
    assert np.array_equal(slow[0], fast[0])


@pytest.mark.parametrize("piece", [1, 7, 40])
def test_numpy_signs_a_text_in_pieces_as_it_signs_it_whole(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [*SAMPLES, " ".join(SAMPLES), "".join(SAMPLES), "a" * 100 + " b c d e", "中" * 50 + "x" * 50, ""]
    whole = SIGNER.sign(Texts.of(texts), fast=False)
    monkeypatch.setattr("megachat.data.minhash._PIECE", piece)
    for one, other in zip(whole, SIGNER.sign(Texts.of(texts), fast=False), strict=True):
        assert np.array_equal(one, other)


def test_numpy_signs_a_text_of_many_megabytes_in_the_memory_of_a_few() -> None:
    texts = Texts.of([" ".join(f"word{number % 5000}" for number in range(800_000))])
    fold()
    tracemalloc.start()
    SIGNER.sign(texts, fast=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(texts.data) > 7e6
    assert peak < 20 * len(texts.data)


def signed(*texts: str) -> list[bool]:
    return [bool(one) for one in SIGNER.sign(Texts.of(texts), fast=False)[1]]


def same(one: str, other: str) -> bool:
    signatures, there = SIGNER.sign(Texts.of([one, other]), fast=False)
    assert there.all()
    return bool(np.array_equal(signatures[0], signatures[1]))


def test_a_signature_is_datasketchs_of_the_shingles_hashes() -> None:
    text = "One, two; three (four) five six!"
    hashes = next(SIGNER._shingles(Texts.of([text])))
    assert len(hashes) == 2  # six words in runs of five
    assert minhash(hashes, 112).tolist() == SIGNER.sign(Texts.of([text]), fast=True)[0][0].tolist()


def test_a_text_needs_five_words_or_eight_characters() -> None:
    assert signed("", "one two three four", "one two three four five") == [False, False, True]
    assert signed("语言模型读很多", "语言模型读很多书") == [False, True]
    assert signed("语言模型 reads books") == [False]  # six words, mostly Chinese
    assert signed("ภาษาไทย", "ภาษาไทยไม่มีการเว้น") == [False, True]


def test_case_width_accents_and_punctuation_do_not_count_but_order_does() -> None:
    assert same("ONE two three four five", "one, TWO - three four five.")
    assert same("ｆｕｌｌ　ｗｉｄｔｈ letters count the same", "full width letters count the same")
    assert same("der Café öffnet um neun", "der Cafe\u0301 offnet um neun")
    assert same("ﬁve finds the ﬂour today again", "five finds the flour today again")
    assert same("语言模型，读很多书。", "语言模型读很多书")
    assert not same("one two three four five", "two one three four five")
    assert not same("हिन्दी में स्वर चिह्न हैं", "हनद म सवर चहन ह")  # vowel signs are not accents


def test_the_table_knows_letters_accents_and_characters_that_stand_alone() -> None:
    codes = fold().codes
    assert [int(codes[ord(letter)]) for letter in "aA.1_"] == [97, 97, 0, 49, 95]
    assert codes[0x301] == SKIPPED
    assert codes[ord("语")] == ord("语") + ALONE
