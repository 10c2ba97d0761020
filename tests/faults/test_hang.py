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
    ("2 a rank is frozen", "forward", "freeze", 1),
    ("2 a rank is frozen", "backward", "freeze", 1),
    ("2 a rank is frozen", "step", "freeze", 0),
    ("2 a rank is frozen", "save:shard", "freeze", 1),
    ("3 a rank waits for the disk", "data", "fifo", 1),
    ("4 a rank holds the GIL", "backward", "gil", 1),
]


def test_a_rank_that_stands_still_is_named_and_the_run_goes_on_after_a_restart(
    start: Start, straight: Straight
) -> None:
    job = start(*SETTINGS, *LIMITS, grace=8.0)
    story = job.go(
        *([Fault(at, do, step=2 * n + 4, rank=rank, value=600)] for n, (_, at, do, rank) in enumerate(HANGS))
    )
    same = story.finished and weights(job.run) == weights(straight(*SETTINGS).run)
    for (name, _, _, rank), attempt, (lost, seconds) in zip(
        HANGS, story.attempts, story.costs(), strict=False
    ):
        record(name, survived=same and lost <= 2, lost=lost, seconds=seconds)
        other = attempt.codes[1 - rank]
        assert other == HUNG, attempt.said
        assert re.search(rf"HUNG: .*rank {rank} \(", attempt.said), attempt.said
        assert lost <= 2
    assert same, story.attempts[-1].said


def test_a_slow_rank_is_named_and_does_no_other_harm(start: Start, straight: Straight) -> None:
    settings = ("tokens=5120", "prefetch=0")  # 20 steps
    job = start(*settings)
    job.go(then=[[Fault("forward", "sleep", step=1, rank=1, value=0.05, until=10**9)]])
    (attempt,) = job.story.attempts
    same = attempt.codes == [0, 0] and weights(job.run) == weights(straight(*settings).run)
    record("18 a slow rank", survived=same, lost=0)
    assert same, attempt.said
    assert re.search(r"SLOW: rank 1 \(.*as of step (10|20);", attempt.printed()), attempt.said
