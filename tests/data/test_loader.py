"""The loader: windows by hand; what is read is the same for every world size and after every interruption."""

import itertools
import json
import math
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megachat.data.loader import (
    WHOLE,
    Mixed,
    OnChange,
    Order,
    Plan,
    TokenWindows,
    ahead,
    documents_of,
    places,
    share,
)
from megachat.data.mixture import Phase
from megachat.data.shards import Shard, Shards, ShardWriter


def write(prefix: Path, documents: list[list[int]]) -> Shard:
    with ShardWriter(prefix, vocab=60_000) as writer:
        for tokens in documents:
            writer.add(tokens)
    return Shard(prefix)


@pytest.fixture
def shard(tmp_path: Path) -> Shards:
    return Shards([write(tmp_path / "train", [[10, 11, 12, 13], [20, 21], [30, 31, 32, 33]])])


def test_windows_follow_each_other_and_share_one_token(shard: Shards) -> None:
    windows = TokenWindows(shard, length=4)
    assert len(windows) == 2  # ten tokens: the last one is no label of a whole window
    assert [(window.tokens.tolist(), window.edges) for window in (windows[0], windows[1])] == [
        ([10, 11, 12, 13, 20], [0, 4, 5]),
        ([20, 21, 30, 31, 32], [0, 2, 5]),
    ]
    assert documents_of([windows[0], windows[1]]).tolist() == [[0, 0, 0, 0, 1], [0, 0, 1, 1, 1]]
    with pytest.raises(IndexError):
        windows[2]


def test_windows_run_through_shards_as_if_they_were_one(tmp_path: Path, shard: Shards) -> None:
    parts = [[[10, 11, 12, 13]], [[20, 21]], [[30, 31, 32, 33]]]
    several = Shards([write(tmp_path / str(number), documents) for number, documents in enumerate(parts)])
    assert several.documents.tolist() == shard.documents.tolist()
    for length in (2, 4, 9):  # the last ones span all three
        one, other = TokenWindows(shard, length), TokenWindows(several, length)
        assert len(one) == len(other)
        for number in range(len(one)):
            assert (one[number].tokens == other[number].tokens).all()
            assert one[number].edges == other[number].edges


def test_documents_are_those_that_a_search_for_every_token_finds(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    shards = Shards([write(tmp_path / "x", [[1] * int(size) for size in draw.integers(1, 9, 300)])])
    windows = TokenWindows(shards, length=7)
    for number in range(len(windows)):
        positions = np.arange(number * 7, number * 7 + 8)
        expected = np.searchsorted(shards.documents, positions, side="right") - 1
        assert documents_of([windows[number]])[0].tolist() == (expected - expected[0]).tolist()


def test_a_corpus_of_one_window_is_enough_and_one_token_less_is_not(shard: Shards) -> None:
    assert len(TokenWindows(shard, length=9)) == 1
    with pytest.raises(
        ValueError, match=r"has 10 tokens, but one window of 10 and the label after it take 11"
    ):
        TokenWindows(shard, length=10)


@pytest.mark.parametrize("world", [1, 2, 3, 5, 7, 8])
def test_every_world_size_reads_the_same_samples_in_each_step(world: int) -> None:
    samples = Order(range(100), seed=0)
    for step in range(10):  # through two epochs
        read = [sample for rank in range(world) for sample in share(samples, step * 24, 24, rank, world)]
        assert read == [samples[number] for number in range(step * 24, step * 24 + 24)]


def test_a_changed_batch_size_goes_on_where_the_last_step_ended() -> None:
    samples = Order(range(1000), seed=0)
    stream = share(samples, 0, 48, 0, 1)
    assert share(samples, 0, 16, 0, 1) + share(samples, 16, 32, 0, 2) + share(samples, 16, 32, 1, 2) == stream


def test_the_order_is_that_of_grains_own_data_sets() -> None:
    import grain

    other, samples = grain.MapDataset.source(range(100)).shuffle(7).repeat(), Order(range(100), 7)
    assert [samples[number] for number in range(350)] == [other[number] for number in range(350)]


def test_an_epoch_repeats_nothing_and_the_next_one_is_shuffled_anew() -> None:
    samples = Order(range(100), seed=0)
    epochs = [[samples[epoch * 100 + number] for number in range(100)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(100))
        assert epoch != list(range(100))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_order_follows_from_the_seed_alone() -> None:
    def first(seed: int) -> list[int]:
        return share(Order(range(100), seed), 0, 20, 0, 1)

    assert first(1) == first(1)
    assert first(1) != first(2)


def test_windows_can_be_ordered_and_shared(shard: Shards) -> None:
    read = share(Order(TokenWindows(shard, length=2), seed=0), start=0, count=4, rank=0, world=1)
    assert sorted(window.tokens[0] for window in read) == [10, 12, 20, 30]


SIZES = {"web": 50, "zh": 20, "code": 7}
"""Samples in each source."""

PHASES = [
    Phase(tokens=640, weights={"web": 0.7, "zh": 0.3}),
    Phase(tokens=None, weights=dict.fromkeys(SIZES, 1.0)),
]
"""Of 10 tokens a sample: the first phase ends after 64 samples, in the middle of the third step."""


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Shards]:
    """A source's k-th window begins with token 1000 * (its number) + k."""
    found = {}
    for base, (name, count) in enumerate(SIZES.items(), 1):
        tokens = [1000 * base + position // 10 for position in range(10 * count + 1)]
        found[name] = Shards([write(tmp_path / name, [tokens])])
    return found


def plan(sources: dict[str, Shards], phases: list[Phase] = PHASES, seed: int = 0) -> Plan:
    return Plan.of(sources, ["concatenate"], phases, 10, seed)


def read(
    sources: dict[str, Shards], plan: Plan, start: int, steps: int, world: int = 1, micro_batch: int = 24
) -> list[int]:
    """The first token of every sample of so many steps of 24, as ranks read it in micro-batches."""
    samples = Mixed({name: TokenWindows(shards, 10) for name, shards in sources.items()}, plan)
    found = []
    for step in range(steps):
        for rank in range(world):
            rows = share(samples, start + step * 24, 24, rank, world)
            for first in range(0, len(rows), micro_batch):
                found += [int(row.tokens[0]) for row in rows[first : first + micro_batch]]
    return found


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_a_mixture_is_read_alike_by_every_world_through_two_resumes(
    sources: dict[str, Shards], world: int
) -> None:
    stream = read(sources, plan(sources), 0, 12)
    # Step 2 holds the edge between the phases; each part goes on from what a checkpoint's JSON says.
    parts, state, at = [], {}, 0
    for steps, ranks, micro_batch in ((2, world, 24), (1, 24 // world, 5), (4, 3, 1), (5, world, 7)):
        going_on = plan(sources).continued(state, at, "refuse")
        parts += read(sources, going_on, at, steps, ranks, micro_batch)
        state, at = json.loads(json.dumps(going_on.state())), at + 24 * steps
    assert parts == stream


def test_proportions_and_epochs_of_a_mixture(sources: dict[str, Shards]) -> None:
    stream = read(sources, plan(sources), 0, 20)
    for length in range(1, 65):
        web = sum(token < 2000 for token in stream[:length])
        assert abs(web - 0.7 * length) < 1
    for length in range(1, 480 - 64):
        for count in Counter(token // 1000 for token in stream[64 : 64 + length]).values():
            assert abs(count - length / 3) < 1
    for base, (name, size) in enumerate(SIZES.items(), 1):
        own = [token - 1000 * base for token in stream if token // 1000 == base]
        epochs = [own[first : first + size] for first in range(0, len(own) - size + 1, size)]
        assert len(epochs) == len(own) // size > 0, name
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs), "a window twice in an epoch"
        assert all(one != other for one, other in itertools.pairwise(epochs)), "the order does not change"


def test_sources_of_one_size_are_not_shuffled_alike(tmp_path: Path) -> None:
    two = {
        name: Shards([write(tmp_path / name, [[position // 10 for position in range(501)]])]) for name in "ab"
    }
    stream = read(two, plan(two, [Phase(tokens=None, weights={"a": 1.0, "b": 1.0})]), 0, 4)
    assert stream[0::2] != stream[1::2]


def test_without_a_mixture_the_order_is_that_of_all_windows(shard: Shards) -> None:
    fresh = Plan.of({WHOLE: shard}, [], [], 2, 5)
    stream, expected = Mixed({WHOLE: TokenWindows(shard, 2)}, fresh), Order(TokenWindows(shard, 2), 5)
    assert [stream[i].tokens.tolist() for i in range(9)] == [expected[i].tokens.tolist() for i in range(9)]


def changed(sources: dict[str, Shards], tmp_path: Path) -> dict[str, Shards]:
    """The same but for more of `zh`."""
    tokens = [2000 + position // 10 for position in range(301)]
    return sources | {"zh": Shards([write(tmp_path / "more", [tokens])])}


def test_changed_data_is_refused_by_name(sources: dict[str, Shards], tmp_path: Path) -> None:
    state = plan(sources).state()
    with pytest.raises(ValueError, match=r"zh has changed; go on with on_changed_data=extend"):
        plan(changed(sources, tmp_path)).continued(state, 48, "refuse")
    old = plan({name: sources[name] for name in ("web", "zh")}, PHASES[:1]).state()
    with pytest.raises(ValueError, match=r"code is new"):
        plan(sources).continued(old, 48, "refuse")
    with pytest.raises(ValueError, match="weights of its mixture have changed"):
        plan(sources, PHASES[1:]).continued(state, 48, "refuse")
    with pytest.raises(ValueError, match="has changed"):
        plan(sources, seed=1).continued(state, 48, "refuse")


@pytest.mark.parametrize("on_change", ["extend", "restart"])
def test_changed_data_goes_on_where_it_is_told(
    sources: dict[str, Shards], tmp_path: Path, on_change: OnChange
) -> None:
    old, more = plan(sources), changed(sources, tmp_path)
    before = read(sources, old, 0, 5)
    new = plan(more).continued(old.state(), 120, on_change)
    after = read(more, new, 120, 20)

    def own(tokens: list[int], base: int) -> list[int]:
        return [token for token in tokens if token // 1000 == base]

    fresh = read(more, plan(more), 0, 20)
    assert own(after, 2)[:30] == own(fresh, 2)[:30]  # what has changed begins
    unchanged = read(sources, old, 120, 20)
    if on_change == "extend":  # what has not goes on, and finishes its epoch without a repetition
        assert own(after, 1) == own(unchanged, 1)
        assert sorted((own(before, 1) + own(after, 1))[:100]) == sorted(2 * [*range(1000, 1050)])
    else:
        assert own(after, 1)[:50] == own(fresh, 1)[:50]
    assert [token // 1000 for token in after] == [token // 1000 for token in unchanged]  # turns go on
    # And it goes on from there without being told again.
    again = plan(more).continued(json.loads(json.dumps(new.state())), 240, "refuse")
    assert read(more, again, 240, 3) == after[120:192]


def test_the_order_in_which_weights_are_written_changes_nothing(sources: dict[str, Shards]) -> None:
    one, other = (
        plan(sources, [Phase(tokens=None, weights=dict.fromkeys(names, 1.0))])
        for names in (("web", "zh"), ("zh", "web"))
    )
    assert one.fingerprint == other.fingerprint
    assert read(sources, one, 0, 4) == read(sources, other, 0, 4)


def test_a_corpus_read_as_one_cannot_be_extended(sources: dict[str, Shards], tmp_path: Path) -> None:
    one, other = {WHOLE: sources["zh"]}, {WHOLE: changed(sources, tmp_path)["zh"]}
    state = plan(one, []).state()
    with pytest.raises(ValueError, match="mixture=all reads all sources as one"):
        plan(other, []).continued(state, 24, "extend")
    assert plan(other, []).continued(state, 24, "restart").schedule[24] == (0, 0)


def test_a_checkpoint_that_remembers_no_data_goes_on(sources: dict[str, Shards]) -> None:
    assert plan(sources).continued({}, 48, "refuse") == plan(sources)


def test_a_mixture_of_unknown_sources_and_a_phase_too_short_are_refused(sources: dict[str, Shards]) -> None:
    with pytest.raises(ValueError, match=r"no source 'wbe'; did you mean 'web'\?"):
        plan(sources, [Phase(tokens=None, weights={"wbe": 1.0})])
    with pytest.raises(ValueError, match="a phase of tokens=9 is shorter than one sample, 10"):
        plan(sources, [Phase(tokens=9, weights={"web": 1.0}), PHASES[1]])


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_reading_ahead_reads_the_same(steps: int) -> None:
    found: Iterator[Any] = ahead(lambda start: (start, threading.current_thread().name), 5, 10, steps)
    some = list(itertools.islice(found, 4))
    assert [start for start, _ in some] == [5, 15, 25, 35]
    assert all(name.startswith("loader") == bool(steps) for _, name in some)


def test_an_error_while_reading_ahead_is_raised_where_it_is_missed() -> None:
    def read(start: int) -> int:
        if start == 20:
            raise OSError("the disk is gone")
        return start

    found = ahead(read, 0, 10, 2)
    assert [next(found), next(found)] == [0, 10]
    with pytest.raises(OSError, match="the disk is gone"):
        next(found)


def test_samples_are_dealt_as_equally_as_they_divide() -> None:
    assert [places(20, 8, rank, 3) for rank in range(3)] == [range(20, 23), range(23, 26), range(26, 28)]
    for count, ranks in itertools.product(range(1, 40), range(1, 9)):
        dealt = [places(7, count, rank, ranks) for rank in range(ranks)]
        assert [*itertools.chain(*dealt)] == [*range(7, 7 + count)]
        assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
        assert len(dealt[0]) == math.ceil(count / ranks)  # what a step takes as long as
