"""A score and how far to trust it: the value, a 95 % interval, and how many items it is the mean of.

The interval is the percentile bootstrap (Efron, 1979): the items are drawn again with replacement, the score
is computed anew, and the middle 95 % of the results is the interval. The same seed gives the same interval.
When every item scores the same the interval has no width: 200 right of 200 says "at least 98.5 %", not
"exactly 100 %".
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
CONFIDENCE = 0.95
CHUNK = 4_000_000
"""Indices drawn at once, which bounds the memory at some 30 MB whatever the number of items."""


Values = Sequence[float] | Sequence[int] | NDArray[Any]


@dataclass(frozen=True, slots=True)
class Score:
    """A mean over `n` items with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float | int]:
        """As it is written to `scores.json` and `report.json`."""
        return asdict(self)


def mean(values: Values, seed: int = 0) -> Score:
    """The mean of the items, each counting the same."""
    return ratio(values, np.ones(len(values)), seed)


def ratio(
    numerators: Values,
    denominators: Values,
    seed: int = 0,
) -> Score:
    """The sum of the numerators over the sum of the denominators, as in bits per byte; an item is one of
    each.

    Example: ratio([1, 5], [1, 2]).value == 2.0, where the mean of the two ratios would be 1.75
    """
    above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    assert len(above) == len(below) > 0, "a score needs at least one item"
    resampled = np.concatenate(
        [above[rows].sum(1) / below[rows].sum(1) for rows in _resample(len(above), seed)]
    )
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return Score(float(above.sum() / below.sum()), float(low), float(high), len(above))


def _resample(items: int, seed: int) -> Iterator[NDArray[np.int64]]:
    generator = np.random.default_rng(seed)
    at_once = max(1, CHUNK // items)
    for done in range(0, RESAMPLES, at_once):
        yield generator.integers(items, size=(min(at_once, RESAMPLES - done), items))
