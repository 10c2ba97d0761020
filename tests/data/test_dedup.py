"""Deduplication: equal to datasketch bit for bit and pair for pair; finds planted copies and nothing else."""

import random

import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH

from megachat.config import compose, decode
from megachat.data.dedup import (
    Dedup,
    Signatures,
    candidates,
    components,
    digest,
    exact_copies,
    minhash,
    representatives,
    shingles,
)

DEDUP: Dedup = decode(compose("clean")).dedup


def english(rng: random.Random, words: int = 300) -> str:
    return " ".join("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(words))


def chinese(rng: random.Random, characters: int = 400) -> str:
    return "".join(
        chr(rng.randrange(0x4E00, 0x9FA5)) + ("，" if n % 12 == 11 else "") for n in range(characters)
    )


def edited(text: str, rng: random.Random, changes: int) -> str:
    letters = list(text)
    for place in rng.sample(range(len(letters)), changes):
        letters[place] = "q" if text.isascii() else "龘"
    return "".join(letters)


def sketched(texts: list[str]) -> Signatures:
    found = [DEDUP.signature(text) for text in texts]
    return np.stack([signature for signature in found if signature is not None])


def planted() -> list[str]:
    """A hundred texts in two languages, and after them three light edits of every fifth."""
    rng = random.Random(0)
    originals = [english(rng) if n % 2 else chinese(rng) for n in range(100)]
    return originals + [edited(originals[n], rng, changes=3) for n in range(0, 100, 5) for _ in range(3)]


def connected(documents: int, pairs: list[tuple[int, int]]) -> list[int]:
    """The smallest document each is connected to, the slow way."""
    smallest = list(range(documents))
    for _ in range(documents):
        for a, b in pairs:
            smallest[a] = smallest[b] = min(smallest[a], smallest[b])
    return smallest


@pytest.mark.parametrize("text", [english(random.Random(1), 3000), chinese(random.Random(2)), "a b c d e"])
def test_the_sketch_is_datasketchs_bit_for_bit(text: str) -> None:
    hashes = shingles(text, 5, 8)
    theirs = MinHash(num_perm=112, scheme="affine32", hashfunc=lambda number: number)
    theirs.update_batch(hashes.tolist())
    assert np.array_equal(minhash(hashes, 112), theirs.hashvalues)


def test_candidates_connect_what_datasketchs_index_connects() -> None:
    signatures = sketched(planted())
    index = MinHashLSH(num_perm=112, params=(14, 8))
    sketches = [MinHash(112, scheme="affine32", hashvalues=row) for row in signatures]
    for number, sketch in enumerate(sketches):
        index.insert(number, sketch)
    theirs = [(a, b) for a, sketch in enumerate(sketches) for b in index.query(sketch) if a < b]
    left, right = candidates(signatures, bands=14)
    assert set(zip(left.tolist(), right.tolist(), strict=True)) <= set(theirs)
    assert components(len(signatures), left, right).tolist() == connected(len(signatures), theirs)
    assert len(theirs) > 100


def test_planted_copies_go_in_both_languages_and_nothing_else_does() -> None:
    stays = DEDUP.near_copies(sketched(planted()))
    expected = list(range(100)) + [n for n in range(0, 100, 5) for _ in range(3)]
    assert stays.tolist() == expected


def test_shingles_are_five_words_or_eight_chinese_characters() -> None:
    assert len(shingles("One, two; three (four) five six!", 5, 8)) == 2
    assert len(shingles("one two three four", 5, 8)) == 0
    assert len(shingles("语言模型读很多书，也读网页", 5, 8)) == 12 - 8 + 1
    assert len(shingles("语言模型 reads books", 5, 8)) == 0  # six tokens, mostly Chinese
    assert np.array_equal(
        shingles("ONE two three four five", 5, 8), shingles("one, TWO three four five.", 5, 8)
    )
    assert not np.array_equal(
        shingles("one two three four five", 5, 8), shingles("two one three four five", 5, 8)
    )
    # To `re` a run of Chinese and Latin letters is one word; here it is Chinese characters and a word.
    assert len(shingles("用python写程序并且读书", 5, 8)) == 9 - 8 + 1


def test_exact_copies_differ_in_blanks_and_case_alone() -> None:
    texts = ["A  b\nc", "a b d", "a b c ", "A B D", "ab c"]
    assert exact_copies(digest(text) for text in texts).tolist() == [0, 1, 0, 1, 4]


def test_a_pair_that_shares_a_band_but_is_unlike_stays() -> None:
    first = np.arange(112, dtype=np.uint32)
    second = first + np.uint32(1000)
    second[:8] = first[:8]  # one band of 14: 7 % equal
    assert [len(side) for side in candidates(np.stack([first, second]), 14)] == [1, 1]
    assert DEDUP.near_copies(np.stack([first, second])).tolist() == [0, 1]


def test_a_document_goes_only_if_it_is_like_the_one_that_stays() -> None:
    # A and B agree in 88 of 112 values, B and C in 88, A and C in 64: C is like B, which goes, not like A.
    a = np.arange(112, dtype=np.uint32)
    b = np.where(np.arange(112) < 24, a + 1000, a).astype(np.uint32)
    c = np.where(np.arange(112) >= 88, b + 1000, b).astype(np.uint32)
    assert DEDUP.near_copies(np.stack([a, b, c])).tolist() == [0, 0, 2]
    assert DEDUP.near_copies(np.stack([a, c, b])).tolist() == [0, 1, 0]
    # With D like C alone, D goes for C.
    d = np.where((np.arange(112) >= 64) & (np.arange(112) < 88), c + 1000, c).astype(np.uint32)
    assert DEDUP.near_copies(np.stack([a, b, c, d])).tolist() == [0, 0, 2, 2]


def test_two_alike_are_found_though_the_only_band_they_share_begins_with_a_stranger() -> None:
    stranger = np.arange(112, dtype=np.uint32)
    first = np.where(np.arange(112) < 8, stranger, stranger + 1000).astype(np.uint32)
    second = np.where((np.arange(112) >= 8) & (np.arange(112) % 8 == 0), first + 1000, first).astype(
        np.uint32
    )
    assert DEDUP.near_copies(np.stack([stranger, first, second])).tolist() == [0, 1, 1]


def test_the_threshold_counts_equal_values() -> None:
    one = np.zeros((2, 10), dtype=np.uint32)
    one[1, :3] = 1  # 70 % equal
    pair = np.array([0]), np.array([1])
    assert representatives(one, *pair, threshold=0.7).tolist() == [0, 0]
    assert representatives(one, *pair, threshold=0.71).tolist() == [0, 1]


@pytest.mark.parametrize("seed", range(3))
def test_components_are_those_of_a_slow_search(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = rng.integers(0, 200, (120, 2))
    expected = connected(200, [(a, b) for a, b in pairs.tolist()])
    assert components(200, pairs[:, 0], pairs[:, 1]).tolist() == expected


def test_a_long_chain_is_one_component() -> None:
    chain = np.arange(9_999)
    assert not components(10_000, chain[::-1], chain[::-1] + 1).any()


def test_no_documents_and_one_document_are_no_trouble() -> None:
    assert DEDUP.near_copies(np.empty((0, 112), dtype=np.uint32)).tolist() == []
    assert DEDUP.near_copies(np.zeros((1, 112), dtype=np.uint32)).tolist() == [0]


def test_a_thousand_equal_documents_make_a_linear_number_of_pairs() -> None:
    left, _ = candidates(np.zeros((1000, 112), dtype=np.uint32), 14)
    assert len(left) < 2 * 1000
    assert DEDUP.near_copies(np.zeros((1000, 112), dtype=np.uint32)).tolist() == [0] * 1000
