"""Near-duplicates planted in real texts, and how alike two texts truly are.

Recall and precision of a deduplicator need the truth, and the truth must not come from the code it judges:
shingles here are Python sets of tuples, compared without a hash, a sketch, or a line of megachat.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

WORDS = 5
"""Words in a shingle."""
CHARACTERS = 8
"""Han characters in a shingle of a text that is mostly Chinese."""
RATES = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.04)
"""Shares of the words that the edits `replaced`, `inserted` and `deleted` touch."""
KINDS = ("replaced", "inserted", "deleted", "truncated", "framed", "retyped")
"""What was done to a copy; `framed` has a header and a footer, `retyped` other case, punctuation, blanks."""

_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_token = re.compile(rf"[{_HAN}]|[^\W{_HAN}]+")
_han = re.compile(f"[{_HAN}]")

Shingles = frozenset[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Copy:
    """A planted near-duplicate: the numbers of two texts, and what lies between them."""

    original: int
    copy: int
    kind: str
    jaccard: float


def chinese(text: str) -> bool:
    """Whether most of a text's words are Han characters, each of which counts as one."""
    tokens = _token.findall(text)
    return 2 * sum(map(bool, map(_han.match, tokens))) > len(tokens)


def shingles(text: str) -> Shingles:
    """Every run of `WORDS` words, or of `CHARACTERS` characters; of a shorter text all of it, if anything."""
    tokens = _token.findall(text.lower())
    size = min(CHARACTERS if chinese(text) else WORDS, len(tokens))
    return frozenset(zip(*(tokens[start:] for start in range(size)), strict=False))


def jaccard(left: Shingles, right: Shingles) -> float:
    """The share of all shingles of two texts that both have."""
    shared = len(left & right)
    return shared / (len(left) + len(right) - shared) if shared else 0.0


def neighbours(texts: Sequence[str], wanted: Iterable[int], threshold: float) -> dict[int, set[int]]:
    """For each text wanted, the others whose Jaccard similarity to it is at least `threshold`."""
    found: dict[int, set[int]] = {number: set() for number in sorted(set(wanted))}
    sizes = {}
    holders: dict[tuple[str, ...], list[int]] = {}
    for number in found:
        own = shingles(texts[number])
        sizes[number] = len(own)
        for shingle in own:
            holders.setdefault(shingle, []).append(number)
    for other, text in enumerate(texts):
        theirs = shingles(text)
        shared = Counter(number for shingle in theirs for number in holders.get(shingle, ()))
        for number, count in shared.items():
            if number != other and count >= threshold * (sizes[number] + len(theirs) - count):
                found[number].add(other)
    return found


def plant(texts: Sequence[str], share: float = 0.2, seed: int = 0) -> tuple[list[str], list[Copy]]:
    """The texts, shuffled, with copies that make up `share` of all; and the truth about each copy.

    One original in fifty is popular: half of the copies are of these few, so that there are large clusters.
    """
    draw = random.Random(seed)
    long_enough = [number for number, text in enumerate(texts) if len(_token.findall(text)) >= 50]
    if not long_enough:
        raise ValueError("no text has 50 words, so there is none to plant a copy of; give longer texts")
    popular = draw.sample(long_enough, -(-len(long_enough) // 50))
    vocabulary = {False: ["the"], True: ["的"]}
    for number in draw.sample(long_enough, min(100, len(long_enough))):
        vocabulary[chinese(texts[number])] += _token.findall(texts[number])
    copies = []
    planted = list(texts)
    for _ in range(round(len(texts) * share / (1 - share))):
        number = draw.choice(popular if draw.random() < 0.5 else long_enough)
        kind = draw.choice(KINDS)
        text = edited(texts[number], kind, vocabulary[chinese(texts[number])], draw)
        copies.append((number, len(planted), kind, jaccard(shingles(texts[number]), shingles(text))))
        planted.append(text)
    order = list(range(len(planted)))
    draw.shuffle(order)
    place = {number: at for at, number in enumerate(order)}
    truth = [Copy(place[original], place[copy], kind, alike) for original, copy, kind, alike in copies]
    return [planted[number] for number in order], truth


def edited(text: str, kind: str, vocabulary: Sequence[str], draw: random.Random) -> str:
    """A copy of a text, changed in one way; new words come from `vocabulary`."""
    if kind == "truncated":
        return text[: int(len(text) * draw.uniform(0.7, 0.97))]
    if kind == "framed":
        count = max(4, len(_token.findall(text)) // 25)
        header, footer = (" ".join(draw.choices(vocabulary, k=count)) for _ in range(2))
        return f"{header}\n\n{text}\n\n{footer}\n"
    if kind == "retyped":
        change = draw.choice((str.upper, str.lower, _without_commas, _spread))
        return change(text)
    rate = draw.choice(RATES)
    return "".join(_reworded(text, kind, rate, vocabulary, draw))


def _without_commas(text: str) -> str:
    return re.sub("[,;:，；：、]", " ", text)


def _spread(text: str) -> str:
    return re.sub(r"\s+|(?<=[。，！？])", "  \n", text)


def _reworded(
    text: str, kind: str, rate: float, vocabulary: Sequence[str], draw: random.Random
) -> Iterator[str]:
    # Distances between touched words are drawn, not each word's fate: a hundredth of the draws.
    matches = list(_token.finditer(text))
    gaps = (1 + int(draw.expovariate(rate)) for _ in matches)
    touched = set(accumulate(gaps, initial=-1))
    end = 0
    for number, match in enumerate(matches):
        yield text[end : match.start()]
        end = match.end()
        if number not in touched:
            yield match[0]
        elif kind == "replaced":
            yield draw.choice(vocabulary)
        elif kind == "inserted":
            yield f"{match[0]} {draw.choice(vocabulary)}"
    yield text[end:]
