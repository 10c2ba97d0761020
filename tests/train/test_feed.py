"""Batches made ahead of their step: the same ones, errors where they are missed, and no step that waits."""

import itertools
import statistics
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from megachat.data.loader import Mixed
from megachat.model.size import Work
from megachat.parallel.mesh import Mesh
from megachat.run import perform
from megachat.tokenizer.tokenizer import Tokenizer
from megachat.train.feed import Lane
from megachat.train.loop import Batch, Progress, Running, mapped
from megachat.train.pretrain import Pretrain
from tests.spawn import on_ranks
from tests.tiny_run import make, pretrain, rows


@dataclass(frozen=True)
class Pair:
    """A part of a batch."""

    left: Tensor
    name: str


@dataclass(frozen=True)
class Two(Batch):
    """A batch with tensors at two levels."""

    inputs: Tensor
    pair: Pair


def two(size: int) -> Two:
    inputs = torch.arange(size)
    return Two(weight=1.0, work=Work(1, 2, 3), samples=1, inputs=inputs, pair=Pair(2 * inputs, "left"))


def test_every_tensor_of_a_batch_is_reached_and_nothing_else() -> None:
    more = mapped(two(3), lambda tensor: tensor + 1)
    assert (more.inputs.tolist(), more.pair.left.tolist()) == ([1, 2, 3], [1, 3, 5])
    assert (more.weight, more.work, more.samples, more.pair.name) == (1.0, Work(1, 2, 3), 1, "left")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("feed") / "runs" / "tiny")


def stage(run: Path, prefetch: int, samples: int) -> tuple[Running, Iterator[list[Any]]]:
    """What a run reads that has consumed so many samples."""
    task = pretrain(run, f"prefetch={prefetch}")
    assert isinstance(task, Pretrain)
    mesh = Mesh(0, 1, 1, torch.device("cpu"), None, None)
    state = Running(mesh, Tokenizer.load(run / "tokenizer"), Progress(samples=samples))
    task.prepare(state)
    return state, task.batches(state)


@pytest.mark.parametrize("prefetch", [0, 3])
def test_batches_made_ahead_are_those_of_the_order_from_where_the_run_stands(
    tiny: Path, prefetch: int
) -> None:
    state, batches = stage(tiny, prefetch, samples=16)
    for step, step_batches in enumerate(itertools.islice(batches, 4)):
        assert [batch.samples for batch in step_batches] == [2, 2, 2, 2]
        found = torch.cat([batch.inputs for batch in step_batches])
        expected = [state.data.order[16 + 8 * step + place].tokens[:-1] for place in range(8)]
        assert found.tolist() == [tokens.tolist() for tokens in expected]


def test_an_error_in_the_thread_ends_the_step_that_misses_it_and_tells_its_line(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Mixed.__getitem__

    def broken_from_24(self: Mixed, number: int) -> Any:
        if number >= 24:
            raise OSError("the disk is gone")
        return whole(self, number)

    monkeypatch.setattr(Mixed, "__getitem__", broken_from_24)
    _, batches = stage(tiny, prefetch=2, samples=8)
    assert len(next(batches)) == len(next(batches)) == 4
    assert any(thread.name.startswith("loader") for thread in threading.enumerate())
    with pytest.raises(OSError, match="the disk is gone") as failure:
        next(batches)
    assert "broken_from_24" in "".join(traceback.format_exception(failure.value))
    assert not any(thread.name.startswith("loader") for thread in threading.enumerate())


def test_the_thread_ends_with_the_steps(tiny: Path) -> None:
    _, batches = stage(tiny, prefetch=2, samples=0)
    next(batches)
    assert any(thread.name.startswith("loader") for thread in threading.enumerate())
    del batches
    assert not any(thread.name.startswith("loader") for thread in threading.enumerate())


READING, COMPUTING = 0.02, 0.06
"""Seconds that a sample and a micro-batch take at least: a step reads for 0.16 and computes for 0.24."""


@on_ranks(1)
def slowly(run: Path, inputs: Path, prefetch: int) -> None:
    read, cost = Mixed.__getitem__, Pretrain.loss

    def slow_read(self: Mixed, number: int) -> Any:
        time.sleep(READING)
        return read(self, number)

    def slow_cost(self: Pretrain, state: Running, batch: Any) -> Any:
        time.sleep(COMPUTING)
        return cost(self, state, batch)

    Mixed.__getitem__, Pretrain.loss = slow_read, slow_cost  # type: ignore[method-assign]
    perform(pretrain(run, f"inputs={inputs}", f"prefetch={prefetch}", "tokens=2560"))


def test_a_slow_disk_costs_a_step_no_time_while_it_is_faster_than_the_step(
    tiny: Path, tmp_path: Path
) -> None:
    waited = {}
    for prefetch in (0, 2):
        run = tmp_path / str(prefetch)
        slowly(run=run, inputs=tiny, prefetch=prefetch)
        waited[prefetch] = [row["time/data"] for row in rows(run)][2:]  # the first is not made ahead
    assert min(waited[0]) >= 8 * READING
    # A machine that others use makes a step wait now and then, but not every other one.
    assert statistics.median(waited[2]) < 8 * READING / 4, waited
    losses = [[row["loss"] for row in rows(tmp_path / str(prefetch))] for prefetch in (0, 2)]
    assert losses[0] == losses[1]


@pytest.mark.gpu
def test_a_gpu_has_its_batch_before_the_step_reads_it_and_keeps_it_until_then() -> None:
    device = torch.device("cuda")
    lane, batches = Lane(device), [two(2**22) for _ in range(8)]
    busy = torch.randn(4096, 4096, device=device)
    for batch in batches:
        for _ in range(20):
            busy = busy @ busy * 1e-3
        sent: list[Any] = []
        thread = threading.Thread(target=lambda one=batch, sent=sent: sent.extend(lane.send([one])))
        thread.start()
        thread.join()
        (there,) = lane.receive(*sent)
        total = there.pair.left.sum() - there.inputs.sum()
        del there, sent
        torch.full((2**23,), -1, device=device)  # what would take memory that is free too early
        assert_close(total.cpu(), batch.inputs.sum())
