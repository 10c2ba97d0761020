"""Mixtures: proportions are exact in every prefix, phases meet without a gap, any sample can be asked for."""

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megachat.config import ConfigError, compose, decode
from megachat.data.mixture import Schedule, Turns, turns, whole


def test_three_to_one_by_hand() -> None:
    # At rate 3/4 a sample is poured by 4/3, 8/3, 4: in place 1, 2, 3 at the latest; at rate 1/4 in place 3.
    assert turns([3, 1]).tolist() == [0, 0, 0, 1]
    assert turns([1]).tolist() == [0]
    assert turns([1, 1, 1]).tolist() == [0, 1, 2]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=8))
def test_every_prefix_is_within_one_of_its_share(weights: list[int]) -> None:
    period, counts = sum(weights), [0] * len(weights)
    for place, source in enumerate(turns(weights).tolist(), 1):
        counts[source] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - Fraction(place * weight, period)) < 1
    assert counts == weights


def test_weights_are_taken_as_they_are_written() -> None:
    assert whole({"web": 0.6, "zh": 0.3, "code": 0.1}) == [6, 3, 1]
    assert whole({"web": 3.0, "code": 1.0}) == [3, 1]
    assert whole({"a": 1 / 4, "b": 0.12345, "c": 0.62655}) == [5000, 2469, 12531]


def test_weights_that_never_come_out_even_are_refused() -> None:
    with pytest.raises(ValueError, match=r"only after 123,456,790 samples.*round them"):
        whole({"a": 123456789.0, "b": 987654321.0})


@pytest.fixture
def curriculum() -> Schedule:
    first = Turns(7, {"web": 0.5, "zh": 0.5})
    second = Turns(6, {"code": 1.0, "web": 2.0})
    return Schedule([first, second, Turns(None, {"zh": 1.0})], {})


def test_phases_begin_where_the_ones_before_end_and_sources_go_on(curriculum: Schedule) -> None:
    assert curriculum.names == ["web", "zh", "code"]
    read = [curriculum[sample] for sample in range(16)]
    assert read[:7] == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2), (0, 3)]
    # The second phase: code, web, web by turns (due at 2, 1, 2: web first), twice; web has had four.
    assert read[7:13] == [(0, 4), (2, 0), (0, 5), (0, 6), (2, 1), (0, 7)]
    assert read[13:] == [(1, 3), (1, 4), (1, 5)]


def test_a_source_reads_its_samples_in_order_and_none_twice(curriculum: Schedule) -> None:
    seen: Counter[int] = Counter()
    for sample in range(200):
        positions = curriculum.positions(sample)
        source, number = curriculum[sample]
        assert number == seen[source] == positions[curriculum.names[source]]
        seen[source] += 1


def test_offsets_move_a_source_ahead() -> None:
    schedule = Schedule([Turns(None, {"a": 1.0, "b": 1.0})], {"b": 10})
    assert [schedule[sample] for sample in range(4)] == [(0, 0), (1, 10), (0, 1), (1, 11)]
    assert schedule.positions(3) == {"a": 2, "b": 11}


def test_sample_a_trillion_is_as_cheap_as_the_first() -> None:
    schedule = Schedule([Turns(None, {"a": 0.25, "b": 0.75})], {})
    source, number = schedule[10**12]
    assert (schedule.names[source], number) == ("b", 3 * 10**12 // 4)


def test_mixtures_are_chosen_and_mistakes_named() -> None:
    decode(compose("pretrain", ["mixture=weighted", "mixture.weights={web: 0.7, code: 0.3}"]))
    phases = "[{tokens: 1000, weights: {web: 1}}, {tokens: null, weights: {web: 1, code: 2}}]"
    stage = decode(compose("pretrain", ["mixture=curriculum", f"mixture.phases={phases}"]))
    assert [phase.tokens for phase in stage.mixture.plan()] == [1000, None]
    for wrong, message in (
        (
            "[{tokens: null, weights: {web: 1}}, {tokens: null, weights: {web: 1}}]",
            "phase 1 of 2 has tokens=None",
        ),
        ("[{tokens: 10, weights: {web: 1}}]", "phase 1 of 1 has tokens=10; the last one lasts to the end"),
        ("[{tokens: null, weights: {web: -1}}]", r"mixture.phases.0.weights.web: .*greater than 0"),
        ("[{tokens: null, weights: {}}]", r"mixture.phases.0.weights: "),
        (
            "[{token: 10, weights: {web: 1}}]",
            r"phases.0.token: Phase has no such setting; did you mean 'tokens'",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            decode(compose("pretrain", ["mixture=curriculum", f"mixture.phases={wrong}"]))
