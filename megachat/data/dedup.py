"""Finds documents that say again what an earlier one said: letter for letter, or nearly.

Exact copies share a digest. Near copies share a large part of their shingles (runs of five words, or of eight
Chinese characters: Broder, 1997; Lee et al., 2022, https://arxiv.org/abs/2107.06499). A MinHash of 14 bands
of 8 rows finds the pairs, with datasketch's permutations bit for bit; but not with its index, which takes 5
kB a document: sorted files of band keys find the same pairs ten times as fast in 12 bytes a band.

Two things destroy data where they are left out. A pair that shares a band need not be alike, so each is
checked by the agreement of its whole signatures. And A like B like C does not make A like C, so a document
goes only if it is like the very one that stays in its stead.
"""

from collections.abc import Callable
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, model_validator

from megachat.config import Config
from megachat.data.graph import forest, roots, union
from megachat.data.index import Sketches, agreement
from megachat.data.join import Numbers
from megachat.data.minhash import Signer

Share = Annotated[float, Field(gt=0, le=1)]

CHUNK = 1 << 18
"""Pairs compared at a time, which bounds the memory for their sketches."""


class Dedup(Config):
    """Which documents count as copies, and which of several stays."""

    near: bool
    """Whether to remove near copies too, and not only exact ones."""
    words: PositiveInt
    """Words in a shingle."""
    characters: PositiveInt
    """Characters in a shingle of Chinese, Japanese or Thai; eight say about as much as five words."""
    bands: PositiveInt
    """More bands find more pairs; a pair of similarity s is found with probability 1 - (1 - s^rows)^bands."""
    rows: PositiveInt
    """Hash values in a band; more rows find fewer pairs that are unlike."""
    threshold: Annotated[float, Field(ge=0, le=1)]
    """Two documents are copies if this share of their hash values, which estimates Jaccard's, is equal; 0:
    all who share a band, and all who are connected through others, which destroys data in a large corpus."""
    keep: Literal["first", "id", "longest", "best"]
    """Which of several copies stays: the first of the corpus; the one with the smallest id, which does not
    depend on the order; or, of near copies, the longest, or the one that scores highest."""
    score: str
    """The column that says what scores highest, with keep=best: a filter and what it measures, as in
    words.stop_words."""
    largest_bucket: PositiveInt
    """Documents that may share a band; what more share is a template. It pairs nobody, and is reported."""
    largest_loss: Share
    """The greatest share of a source's documents that may go as near copies; more stops the stage. A
    threshold or a shingle that is wrong for a source has taken whole corpora, unnoticed."""

    @model_validator(mode="after")
    def _a_score_to_keep_by(self) -> "Dedup":
        if self.keep == "best" and not self.score:
            raise ValueError(
                "keep=best needs to know what is best; name a column, as in score=words.stop_words"
            )
        return self

    @property
    def signer(self) -> Signer:
        """What makes the signatures."""
        return Signer(self.words, self.characters, self.bands * self.rows)


def alike(
    sketches: Callable[[Numbers], Sketches], left: Numbers, right: Numbers, threshold: float
) -> NDArray[np.bool_]:
    """Which pairs agree in at least this share of their hash values."""
    found = np.ones(len(left), dtype=bool)
    for start in range(0, len(left) if threshold else 0, CHUNK):
        part = slice(start, start + CHUNK)
        found[part] = agreement(sketches(left[part]), sketches(right[part])) >= threshold
    return found


def settle(
    left: Numbers,
    right: Numbers,
    sketches: Callable[[Numbers], Sketches],
    threshold: float,
    merit: Callable[[Numbers], NDArray[np.float64]] | None = None,
    first: int = 0,
) -> tuple[Numbers, Numbers]:
    """Who goes, sorted, and who stays in their stead, from pairs that are alike: whole components of them.

    The best of a component stays (the first, or the first with the most `merit`), and those like it go; the
    rest is looked at again, by itself. Documents below `first` are there already: none of them goes, and
    whoever is like one of them does. It takes some 150 bytes of memory a pair, and a component is not cut.
    """
    known = left < first
    old = np.unique(right[known])
    order = np.lexsort((left[known], right[known]))
    stays_for_old = left[known][order][np.searchsorted(right[known][order], old)]
    rest = ~known & ~np.isin(left, old) & ~np.isin(right, old)
    left, right = left[rest], right[rest]
    members = np.unique(np.concatenate([left, right]))
    if merit is not None:
        members = members[np.lexsort((members, -merit(members)))]  # the best is now the smallest
    order = np.argsort(members)
    one, other = (
        order[np.searchsorted(members, side, sorter=order)].astype(np.uint64) for side in (left, right)
    )
    stays = np.arange(len(members), dtype=np.uint64)
    while len(one):
        parents = forest(len(members), None)
        union(parents, one, other)
        there = np.unique(np.concatenate([one, other]))
        heads = roots(parents, there)
        like = (heads == there) | alike(lambda rank: sketches(members[rank]), heads, there, threshold)
        stays[there[like]] = heads[like]
        # Every component settles its head and at least one neighbour of it, so this ends.
        settled = np.zeros(len(members), dtype=bool)
        settled[there[like]] = True
        undecided = ~settled[one] & ~settled[other]
        one, other = one[undecided], other[undecided]
    gone = np.flatnonzero(stays != np.arange(len(members), dtype=np.uint64))
    removed = np.concatenate([old, members[gone]])
    kept = np.concatenate([stays_for_old, members[stays[gone]]])
    order = np.argsort(removed)
    return removed[order], kept[order]
