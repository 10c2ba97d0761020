"""Which source each sample comes from: weighted mixtures, and phases of them (a curriculum).

Proportions are exact in every prefix: of the first n samples of a phase, a source with weight w (weights sum
to 1) has more than n * w - 1 and fewer than n * w + 1. Its k-th sample is due in the places in which a fluid
that flows at rate w would pour it, after (k - 1) / w and up to k / w rounded up; taking what is due soonest
meets all of them, as the fluid itself shows to be possible (Balinski and Young, 1975, on apportionment;
Tijdeman, 1980, on the chairman assignment problem). grain's own `mix` cuts weights to a hundredth of the
smallest one, and strays further.

The turns repeat with a period, so sample number 10^12 costs what number 0 does.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import lcm
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from megachat.config import Config

LONGEST = 100_000
"""Samples after which the turns of a mixture repeat, at most: weights may have some five digits."""

Weights = Annotated[dict[str, PositiveFloat], Field(min_length=1)]


class Phase(Config):
    """A part of training with one set of weights."""

    tokens: PositiveInt | None
    """How long it lasts; null, of the last phase alone: to the end."""
    weights: Weights
    """Shares of the samples by source, which need not sum to 1; sources that are not named are not read."""


class Mixture(Config):
    """From which source each sample comes."""

    def plan(self) -> list[Phase]:
        """The phases in order; none: all sources as one, each as long as it is."""
        raise NotImplementedError


class All(Mixture):
    """All sources one after the other, as one: every token equally often."""

    def plan(self) -> list[Phase]:
        return []


class Weighted(Mixture):
    """The same weights from the first sample to the last."""

    weights: Weights
    """Shares of the samples by source, which need not sum to 1; sources that are not named are not read."""

    def plan(self) -> list[Phase]:
        return [Phase(tokens=None, weights=self.weights)]


class Curriculum(Mixture):
    """One phase after the other."""

    phases: Annotated[list[Phase], Field(min_length=1)]
    """What is read first, second, ...; each `{tokens: 10e9, weights: {web: 3, code: 1}}`."""

    @model_validator(mode="after")
    def _last_to_the_end(self) -> "Curriculum":
        for number, phase in enumerate(self.phases, 1):
            if (phase.tokens is None) != (number == len(self.phases)):
                raise ValueError(
                    f"phase {number} of {len(self.phases)} has tokens={phase.tokens}; the last one lasts to "
                    "the end, so its tokens are null, and those of all others are a number"
                )
        return self

    def plan(self) -> list[Phase]:
        return self.phases


def turns(weights: Sequence[int]) -> NDArray[np.uint16]:
    """Whose turn it is at each place of one period, for whole weights that sum to the period.

    Example: turns([3, 1]) -> [0, 0, 0, 1]
    """
    period = sum(weights)
    coming = [(0, source) for source in range(len(weights))]  # the place from which its next sample may stand
    due: list[tuple[int, int]] = []  # the place at which it must stand at the latest
    taken = [0] * len(weights)
    out = np.empty(period, np.uint16)
    for place in range(period):
        while coming and coming[0][0] <= place:
            _, source = heapq.heappop(coming)
            heapq.heappush(due, (-(-(taken[source] + 1) * period // weights[source]) - 1, source))
        latest, source = heapq.heappop(due)
        assert latest >= place, "the fluid shows that every sample has its place"
        out[place] = source
        taken[source] += 1
        if taken[source] < weights[source]:
            heapq.heappush(coming, (taken[source] * period // weights[source], source))
    return out


def whole(weights: Mapping[str, float]) -> list[int]:
    """The weights as the smallest whole numbers in the same proportion.

    Example: whole({"web": 0.6, "zh": 0.3, "code": 0.1}) -> [6, 3, 1]
    """
    exact = [Fraction(repr(weight)) for weight in weights.values()]  # 0.1 is meant as 1/10
    shares = [weight / sum(exact) for weight in exact]
    period = lcm(*(one.denominator for one in shares))
    if period > LONGEST:
        raise ValueError(
            f"the weights {dict(weights)} are in proportion only after {period:,} samples, and {LONGEST:,} "
            "is the most; round them to fewer digits that sum to 1"
        )
    return [int(one * period) for one in shares]


@dataclass(frozen=True)
class Turns:
    """The turns of one phase, repeated."""

    samples: int | None
    """How long the phase lasts; None: to the end."""
    weights: dict[str, float]

    @cached_property
    def counts(self) -> list[int]:
        """Samples of each source in one period."""
        return whole(self.weights)

    @cached_property
    def whose(self) -> NDArray[np.uint16]:
        """Whose turn it is at each place of a period."""
        return turns(self.counts)

    @cached_property
    def earlier(self) -> NDArray[np.int32]:
        """How often that source has had its turn before in the period."""
        out = np.empty(len(self.whose), np.int32)
        for source, count in enumerate(self.counts):
            out[self.whose == source] = np.arange(count)
        return out

    def at(self, place: int) -> tuple[int, int]:
        """The source at a place, and how many samples it has had in this phase before."""
        round_, rest = divmod(place, len(self.whose))
        source = int(self.whose[rest])
        return source, round_ * self.counts[source] + int(self.earlier[rest])

    def before(self, place: int) -> dict[str, int]:
        """How many samples each source has in the phase before a place."""
        rounds, rest = divmod(place, len(self.whose))
        begun = np.bincount(self.whose[:rest], minlength=len(self.counts)).tolist()
        return {
            name: rounds * count + more
            for name, count, more in zip(self.weights, self.counts, begun, strict=True)
        }


class Schedule:
    """The turns of all phases: sample number -> (which source, which of its samples)."""

    def __init__(self, phases: Sequence[Turns], offsets: Mapping[str, int]) -> None:
        """`offsets`: how far ahead of its turns a source stands, such as one that was read before."""
        self.phases = list(phases)
        self.names = list(dict.fromkeys(name for phase in phases for name in phase.weights))
        self.first = [0]  # the number of the first sample of each phase
        self.begun: list[dict[str, int]] = [{name: offsets.get(name, 0) for name in self.names}]
        for phase in self.phases[:-1]:
            assert phase.samples is not None
            had, more = self.begun[-1], phase.before(phase.samples)
            self.first.append(self.first[-1] + phase.samples)
            self.begun.append({name: count + more.get(name, 0) for name, count in had.items()})
        # Of each phase: its sources' numbers among all, and where they stand when it begins.
        self.tables = [
            [(self.names.index(name), begun[name]) for name in phase.weights]
            for phase, begun in zip(self.phases, self.begun, strict=True)
        ]

    def __getitem__(self, sample: int) -> tuple[int, int]:
        phase = self._phase(sample)
        source, earlier = self.phases[phase].at(sample - self.first[phase])
        number, begun = self.tables[phase][source]
        return number, begun + earlier

    def shifts(self, first: int, last: int) -> bool:
        """Whether one of these samples is the first of a phase but the first phase."""
        return any(first <= begin <= last for begin in self.first[1:])

    def positions(self, sample: int) -> dict[str, int]:
        """Where each source stands before a sample: the number of its next one."""
        phase = self._phase(sample)
        more = self.phases[phase].before(sample - self.first[phase])
        return {name: begun + more.get(name, 0) for name, begun in self.begun[phase].items()}

    def _phase(self, sample: int) -> int:
        phase = len(self.first) - 1
        while self.first[phase] > sample:
            phase -= 1
        return phase
