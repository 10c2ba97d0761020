"""text-dedup's own operations: its `embed_func` and its union-find, without the dataset they usually run on.

Its command line also copies the text into an Arrow cache several times; that is left out, to its advantage.
Its words are what lies between two characters that are no letters: in Chinese whole clauses, and in an
indented line an empty one for each blank.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from text_dedup.minhash import RNG, SIGNATURE_COLUMN, UnionFind, embed_func, xxh3_32hash

from tools.bench.clock import serve

logging.disable()

BANDS, ROWS = 14, 8
WORDS = 5
# The fastest hash that it offers, but for one of 16 bits. Its default of 64 is slower.
WIDTH, LARGEST, PRIME = np.uint32, np.uint32(2**32 - 1), np.uint32(2**32 - 5)
SETTINGS: dict[str, Any] = {
    "num_perm": BANDS * ROWS,
    "ngram_size": WORDS,
    "min_length": WORDS,
    "hashranges": [(band * ROWS, (band + 1) * ROWS) for band in range(BANDS)],
    "permutations": (
        RNG.randint(1, PRIME, size=BANDS * ROWS, dtype=WIDTH),
        RNG.randint(0, PRIME, size=BANDS * ROWS, dtype=WIDTH),
    ),
    "hash_func": xxh3_32hash,
    "dtype": WIDTH,
    "max_hash": LARGEST,
    "modulo_prime": PRIME,
}


def signatures(texts: list[str]) -> list[list[bytes]]:
    """The bands of each text."""
    return [embed_func(text, number, **SETTINGS)[SIGNATURE_COLUMN] for number, text in enumerate(texts)]


def removed(path: Path) -> tuple[list[int], int]:
    """All but one document of each group that its bands connect; nothing is on disk."""
    tables: list[dict[bytes, set[int]]] = [defaultdict(set) for _ in range(BANDS)]
    empty = embed_func("", 0, **SETTINGS)[SIGNATURE_COLUMN]
    for number, text in enumerate(read(path)):
        bands = embed_func(text, number, **SETTINGS)[SIGNATURE_COLUMN]
        if bands != empty:  # it filters documents of less than `min_length` words beforehand
            for table, band in zip(tables, bands, strict=True):
                table[band].add(number)
    groups = UnionFind()
    for table in tables:
        for cluster in table.values():
            if len(cluster) > 1:
                smallest = min(cluster)
                for number in cluster:
                    groups.union(number, smallest)
    return [number for number in list(groups.parent) if groups.find(number) != number], 0


def read(path: Path) -> Iterator[str]:
    """The texts of a file, one at a time."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


if __name__ == "__main__":
    serve(removed, signatures)
