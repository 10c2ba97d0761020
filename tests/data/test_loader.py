"""The loader: windows by hand; the order is the same for every world size, and no epoch repeats."""

from pathlib import Path

import pytest

from megachat.data.loader import TokenWindows, order, share
from megachat.data.shards import Shard, ShardWriter


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    with ShardWriter(tmp_path / "train", vocab=100) as writer:
        writer.add([10, 11, 12, 13])
        writer.add([20, 21])
        writer.add([30, 31, 32, 33])
    return Shard(tmp_path / "train")


def test_windows_follow_each_other_and_share_one_token(shard: Shard) -> None:
    windows = TokenWindows(shard, length=4)
    assert len(windows) == 2  # ten tokens: the last one is no label of a whole window
    assert [window["tokens"].tolist() for window in (windows[0], windows[1])] == [
        [10, 11, 12, 13, 20],
        [20, 21, 30, 31, 32],
    ]
    assert [window["documents"].tolist() for window in (windows[0], windows[1])] == [
        [0, 0, 0, 0, 1],
        [1, 1, 2, 2, 2],
    ]
    assert {array.dtype.name for array in windows[0].values()} == {"int64"}
    with pytest.raises(IndexError):
        windows[2]


def test_a_corpus_of_one_window_is_enough_and_one_token_less_is_not(shard: Shard) -> None:
    assert len(TokenWindows(shard, length=9)) == 1
    with pytest.raises(
        ValueError, match=r"has 10 tokens, but one window of 10 and the label after it take 11"
    ):
        TokenWindows(shard, length=10)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_world_size_reads_the_same_samples_in_each_step(world: int) -> None:
    samples = order(range(100), seed=0)
    for step in range(10):  # through two epochs
        read = [sample for rank in range(world) for sample in share(samples, step * 24, 24, rank, world)]
        assert read == [samples[number] for number in range(step * 24, step * 24 + 24)]


def test_a_changed_batch_size_goes_on_where_the_last_step_ended() -> None:
    samples = order(range(1000), seed=0)
    stream = share(samples, 0, 48, 0, 1)
    assert share(samples, 0, 16, 0, 1) + share(samples, 16, 32, 0, 2) + share(samples, 16, 32, 1, 2) == stream


def test_an_epoch_repeats_nothing_and_the_next_one_is_shuffled_anew() -> None:
    samples = order(range(100), seed=0)
    epochs = [[samples[epoch * 100 + number] for number in range(100)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(100))
        assert epoch != list(range(100))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_order_follows_from_the_seed_alone() -> None:
    def first(seed: int) -> list[int]:
        return share(order(range(100), seed), 0, 20, 0, 1)

    assert first(1) == first(1)
    assert first(1) != first(2)


def test_windows_can_be_ordered_and_shared(shard: Shard) -> None:
    read = share(order(TokenWindows(shard, length=2), seed=0), start=0, count=4, rank=0, world=1)
    assert sorted(window["tokens"][0] for window in read) == [10, 12, 20, 30]


def test_a_world_that_does_not_divide_the_step_is_told_which_would() -> None:
    with pytest.raises(
        ValueError, match=r"3 ranks cannot share the 8 samples of a step; use one of \[1, 2, 4, 8\]"
    ):
        share(order(range(100), seed=0), 0, 8, 0, 3)
