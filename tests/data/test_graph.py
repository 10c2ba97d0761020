"""The components of a graph: three ways to find them, and scipy's, agree."""

from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from megachat.data.graph import Edges, _union, forest, roots, stars, union
from megachat.data.jit import available, compiled


def random_edges(seed: int, documents: int = 3000, edges: int = 2500) -> Edges:
    """With one long chain in it, the worst case for the rounds of stars."""
    rng = np.random.default_rng(seed)
    pairs = rng.integers(0, documents, (2, edges), dtype=np.uint64)
    chain = rng.permutation(documents)[:400].astype(np.uint64)
    left, right = np.concatenate([pairs, np.stack([chain[1:], chain[:-1]])], axis=1)
    return left[left != right], right[left != right]


def scipys(documents: int, left: np.ndarray, right: np.ndarray) -> list[int]:
    """For each document the smallest of its component."""
    ones = np.ones(len(left))
    _, labels = connected_components(coo_array((ones, (left, right)), shape=(documents, documents)))
    smallest: dict[int, int] = {}
    for number, label in enumerate(labels):
        smallest.setdefault(label, number)
    return [smallest[label] for label in labels]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spill", [False, True])
def test_union_in_pieces_finds_scipys_components(seed: int, spill: bool, tmp_path: Path) -> None:
    left, right = random_edges(seed)
    parents = forest(3000, tmp_path / "parents" if spill else None)
    for start in range(0, len(left), 500):
        union(parents, left[start : start + 500], right[start : start + 500])
    assert roots(parents, np.arange(3000, dtype=np.uint64)).tolist() == scipys(3000, left, right)


@pytest.mark.parametrize("seed", range(3))
def test_alternating_stars_find_scipys_components(seed: int, tmp_path: Path) -> None:
    left, right = random_edges(seed)
    pieces = [(left[start : start + 500], right[start : start + 500]) for start in range(0, len(left), 500)]
    labels = list(range(3000))
    for document, smallest in stars(pieces, 3000, tmp_path, ranges=7):
        for one, of in zip(document.tolist(), smallest.tolist(), strict=True):
            labels[one] = of
    assert labels == scipys(3000, left, right)


@pytest.mark.skipif(not available(), reason="numba is not installed")
def test_the_compiled_union_finds_scipys_components() -> None:
    left, right = random_edges(3)
    parents = forest(3000, None)
    compiled(_union)(parents, left, right)
    assert roots(parents, np.arange(3000, dtype=np.uint64)).tolist() == scipys(3000, left, right)
