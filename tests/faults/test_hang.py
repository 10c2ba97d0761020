"""Faults 2, 3, 4 and 18: a rank stands still or is slow. It is named, the run ends by itself, and goes on."""

import re

import pytest

from megachat.parallel.mesh import HUNG
from tests.fault_table import record
from tests.faults.conftest import Start, Straight
from tests.faults.inject import Fault
from tests.faults.ranks import weights

pytestmark = pytest.mark.faults

SETTINGS = ("checkpoint_interval=2", "checkpoint_background=false", "tokens=4096", "prefetch=0")  # 16 steps
LIMITS = ("watch.hang=8", "watch.start=60", "watch.long=16")

HANGS = [
    ("2 a rank is frozen", "forward", "freeze", 1, "all_reduce", "backward"),
    ("2 a rank is frozen", "backward", "freeze", 1, "all_reduce", "backward"),
    ("2 a rank is frozen", "step", "freeze", 0, "all_gather", "step"),
    ("2 a rank is frozen", "save:shard", "freeze", 1, "all_gather", "save"),
    ("3 a rank waits for the disk", "data", "fifo", 1, "all_reduce", "count"),
    ("4 a rank holds the GIL", "backward", "gil", 1, "all_reduce", "backward"),
]
"""The fault, its moment, its deed, its rank; the collective and the section in which the other waits."""


def test_a_rank_that_stands_still_is_named_with_the_collective_that_waits_for_it_and_the_run_goes_on(
    start: Start, straight: Straight
) -> None:
    job = start(*SETTINGS, *LIMITS, grace=8.0)
    story = job.go(
        *(
            [Fault(at, do, step=2 * n + 4, rank=rank, value=600)]
            for n, (_, at, do, rank, *_) in enumerate(HANGS)
        )
    )
    for n, ((_, _, _, rank, collective, section), attempt) in enumerate(
        zip(HANGS, story.attempts, strict=False)
    ):
        assert attempt.codes[1 - rank] == HUNG, attempt.said
        place = rf"`{section}` of step {2 * n + 4}"
        if rank == 0:  # who speaks is the one that waits
            told = rf"rank 1 \(.*stood still in {place} .*waiting in {collective}\w*, .*; rank 0 \("
        else:
            told = rf"rank 1 \(.*; rank 0 waits in {collective}\w* \({place}\)"
        assert re.search(f"HUNG: {told}", attempt.said), attempt.said
    assert story.finished, story.attempts[-1].said
    assert weights(job.run) == weights(straight(*SETTINGS).run)
    assert all(lost <= 2 for lost, _ in story.costs()), story.costs()
    for (name, *_), (lost, seconds) in zip(HANGS, story.costs(), strict=True):
        record(name, survived=True, lost=lost, seconds=seconds)


def test_a_slow_rank_is_named_and_does_no_other_harm(start: Start, straight: Straight) -> None:
    settings = ("tokens=5120", "prefetch=0")  # 20 steps
    job = start(*settings)
    job.go(then=[[Fault("forward", "sleep", step=1, rank=1, value=0.05, until=10**9)]])
    (attempt,) = job.story.attempts
    same = attempt.codes == [0, 0] and weights(job.run) == weights(straight(*settings).run)
    assert same, attempt.said
    assert re.search(r"SLOW: rank 1 \(.*as of step (10|20);", attempt.printed()), attempt.said
    record("18 a slow rank", survived=True, lost=0)
