"""The decorator that runs a test on several ranks, tried on tests that pass, fail, hang, and skip."""

import os
import time
from pathlib import Path

import pytest
import torch
from torch import distributed

from tests.spawn import on_ranks


@on_ranks(2)
def test_ranks_find_each_other() -> None:
    distributed.init_process_group("gloo")
    number = torch.tensor(float(distributed.get_rank() + 1))
    distributed.all_reduce(number)
    assert number.item() == 3.0


@pytest.mark.parametrize("value", [1, 2])
@on_ranks(2)
def test_fixtures_and_parameters_reach_every_rank(tmp_path: Path, value: int) -> None:
    (tmp_path / os.environ["RANK"]).write_text(str(value))
    assert torch.get_num_threads() == 1


@on_ranks(2)
def fails_on_rank_1() -> None:
    print("about to fail")
    distributed.init_process_group("gloo")
    if os.environ["RANK"] == "1":
        raise RuntimeError("this rank is broken")
    distributed.barrier()  # for ever, were it not for the other's failure


def test_the_failing_ranks_traceback_and_output_are_shown() -> None:
    with pytest.raises(pytest.fail.Exception) as failure:
        fails_on_rank_1()
    text = str(failure.value)
    assert "--- rank 1 ---" in text
    assert 'raise RuntimeError("this rank is broken")' in text
    assert "--- rank 1 printed ---\nabout to fail" in text


@on_ranks(2, timeout=1.5)
def hangs_on_rank_0() -> None:
    if os.environ["RANK"] == "0":
        time.sleep(600)


def test_a_hanging_rank_is_named_and_killed() -> None:
    start = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match=r"still running after 1\.5 s: rank 0"):
        hangs_on_rank_0()
    assert time.monotonic() - start < 30


@on_ranks(1)
def dies() -> None:
    os.abort()


def test_a_rank_that_dies_without_a_word_fails_the_test() -> None:
    with pytest.raises(pytest.fail.Exception, match="died without a word"):
        dies()


@on_ranks(2)
def skips() -> None:
    pytest.skip("no weather today")


def test_a_skip_on_a_rank_skips_the_test() -> None:
    with pytest.raises(pytest.skip.Exception, match="no weather today"):
        skips()


@on_ranks(1)
def breaks_a_shape() -> None:
    from megachat.config import decode

    decode("not a tree")  # type: ignore[arg-type]


def test_signatures_are_checked_on_the_ranks_too() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"jaxtyping|beartype"):
        breaks_a_shape()
