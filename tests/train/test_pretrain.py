"""Pretraining on its own: what is measured does not depend on how many ranks measure it."""

from pathlib import Path

import pytest

from megachat.config import compose
from megachat.run import Stage, perform
from tests.spawn import on_ranks
from tests.tiny_run import make, pretrain, rows

THREE = ["tokens=512", "validation_windows=3"]
"""Two steps, then three windows to measure, which two ranks cannot share evenly."""


@on_ranks(1)
def by_one(run: Path) -> None:
    perform(pretrain(run, *THREE))


@on_ranks(2)
def by_two(run: Path, inputs: Path, zero: int) -> None:
    perform(pretrain(run, *THREE, f"inputs={inputs}", f"parallel=zero{zero}", "micro_batch=1"))


@pytest.mark.parametrize("zero", [0, 3])
def test_two_ranks_validate_on_the_windows_of_one(tmp_path: Path, zero: int) -> None:
    one, two = make(tmp_path / "runs" / "one"), tmp_path / "runs" / "two"
    by_one(run=one)
    by_two(run=two, inputs=one, zero=zero)
    alone, shared = (rows(run)[-1]["validation/bits_per_byte"] for run in (one, two))
    assert shared == pytest.approx(alone, rel=1e-5)


@on_ranks(1)
def refused(run: Path) -> None:
    with pytest.raises(ValueError, match=r"encode was encoded with tokenizer .*, but this run's is"):
        perform(pretrain(run))


def test_shards_of_another_tokenizer_are_refused(run: Path) -> None:
    make(run)
    perform(Stage.of(compose("tokenizer", [f"run={run}", "vocab=301", "threads=1", "log.wandb=disabled"])))
    refused(run=run)
