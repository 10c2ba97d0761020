"""Who goes and who stays among documents that are alike."""

import numpy as np
import pytest

from megachat.config import ConfigError, compose, decode
from megachat.data.dedup import alike, settle
from megachat.data.join import Numbers
from megachat.data.steps import Record


def numbers(*values: int) -> Numbers:
    return np.array(values, dtype=np.uint64)


def settled(
    rows: np.ndarray, pairs: list[tuple[int, int]], threshold: float = 0.7, merit: Record | None = None
) -> dict[int, int]:
    """Copies and what stays, of the documents with these sketches, after the pairs that are alike."""
    left, right = (numbers(*side) for side in zip(*pairs, strict=True))

    def sketches(some: Numbers) -> np.ndarray:
        return rows[some]

    like = alike(sketches, left, right, threshold)
    weigh = (
        None
        if merit is None
        else lambda some: np.array([merit[str(number)] for number in some], dtype=np.float64)
    )
    removed, kept = settle(left[like], right[like], sketches, threshold, weigh)
    return dict(zip(removed.tolist(), kept.tolist(), strict=True))


A = np.arange(112, dtype=np.uint8)
# A and B agree in 88 of 112 values, B and C in 88, A and C in 64.
B = np.where(np.arange(112) < 24, A + 120, A).astype(np.uint8)
C = np.where(np.arange(112) >= 88, B + 120, B).astype(np.uint8)


def test_a_pair_that_shares_a_band_but_is_unlike_stays() -> None:
    other = (A + 120).astype(np.uint8)
    other[:8] = A[:8]  # one band of 14: 7 % equal
    assert settled(np.stack([A, other]), [(0, 1)]) == {}


def test_a_document_goes_only_if_it_is_like_the_one_that_stays() -> None:
    # C is like B, which goes, and not like A.
    assert settled(np.stack([A, B, C]), [(0, 1), (1, 2)]) == {1: 0}
    assert settled(np.stack([A, C, B]), [(0, 2), (1, 2)]) == {2: 0}
    # With D like C alone, D goes for C.
    d = np.where((np.arange(112) >= 64) & (np.arange(112) < 88), C + 60, C).astype(np.uint8)
    assert settled(np.stack([A, B, C, d]), [(0, 1), (1, 2), (2, 3)]) == {1: 0, 3: 2}


def test_the_one_with_the_most_merit_stays_and_of_equals_the_first() -> None:
    same = np.stack([A, A, A])
    assert settled(same, [(0, 1), (1, 2)]) == {1: 0, 2: 0}
    assert settled(same, [(0, 1), (1, 2)], merit={"0": 1.0, "1": 3.0, "2": 2.0}) == {0: 1, 2: 1}
    assert settled(same, [(0, 1), (1, 2)], merit={"0": 1.0, "1": 2.0, "2": 2.0}) == {0: 1, 2: 1}
    # B is the best: both go.
    assert settled(np.stack([A, B, C]), [(0, 1), (1, 2)], merit={"0": 0.0, "1": 1.0, "2": 0.0}) == {
        0: 1,
        2: 1,
    }


def test_the_threshold_counts_equal_values() -> None:
    one = np.zeros((2, 100), dtype=np.uint8)
    one[1, :30] = 1  # 70 of 100 equal: (0.7 - 1/256) / (1 - 1/256) = 0.6988
    pair = numbers(0), numbers(1)
    assert alike(lambda some: one[some], *pair, threshold=0.698).tolist() == [True]
    assert alike(lambda some: one[some], *pair, threshold=0.7).tolist() == [False]


def test_to_keep_the_best_one_must_say_what_is_best() -> None:
    with pytest.raises(ConfigError, match=r"keep=best needs to know what is best; name a column"):
        decode(compose("clean", ["dedup.keep=best"]))
