"""datasketch as its documentation has it: `MinHash.generator`, `MinHashLSH`, and a union-find of its finds.

It leaves the words to its user: a regular expression here, five words to a shingle. Han characters count as
words, eight to a shingle, lest a whole clause of Chinese be one word.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from datasketch import MinHash, MinHashLSH

from tools.bench.clock import serve

BANDS, ROWS = 14, 8
PERMUTATIONS = BANDS * ROWS

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
token = re.compile(rf"[{HAN}]|[^\W{HAN}]+")
han = re.compile(f"[{HAN}]")


def shingles(text: str) -> list[bytes]:
    """The shingles of a text."""
    text = text.lower()
    tokens = token.findall(text)
    size = 8 if 2 * len(han.findall(text)) > len(tokens) else 5
    return [" ".join(run).encode() for run in zip(*(tokens[i:] for i in range(size)), strict=False)]


def signatures(texts: list[str]) -> list[MinHash]:
    """A MinHash for each text."""
    return list(MinHash.generator(map(shingles, texts), num_perm=PERMUTATIONS, scheme="affine32"))


def removed(path: Path) -> tuple[list[int], int]:
    """All but the first document of each group that its bands connect; nothing is on disk."""
    index = MinHashLSH(num_perm=PERMUTATIONS, params=(BANDS, ROWS))
    parents: list[int] = []

    def head(number: int) -> int:
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    for number, minhash in enumerate(
        MinHash.generator(map(shingles, read(path)), num_perm=PERMUTATIONS, scheme="affine32")
    ):
        parents.append(number)
        if minhash.is_empty():  # too short for a shingle; all of these would be alike
            continue
        for other in index.query(minhash):
            first, second = sorted((head(number), head(other)))
            parents[second] = first
        index.insert(number, minhash, check_duplication=False)
    return [number for number in range(len(parents)) if head(number) != number], 0


def read(path: Path) -> Iterator[str]:
    """The texts of a file, one at a time."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


if __name__ == "__main__":
    serve(removed, signatures)
