"""Fault 12: a host that has no memory for what is written in the background. The training waits instead."""

import pytest

from tests.fault_table import record
from tests.faults.conftest import Start, Straight
from tests.faults.inject import Fault
from tests.faults.ranks import weights

pytestmark = pytest.mark.faults

# 25 million weights: a rank's copy of half of them and of their moments takes 151 MB. What it is left
# lets threads start, whose stacks take 8 MB each, and is too little also when a 64 MB heap of malloc's ends.
SETTINGS = ("model.dim=256", "model.hidden=16384", "tokens=1536", "checkpoint_interval=2")


def test_a_rank_without_memory_for_a_copy_makes_all_wait_for_the_disk_once(
    start: Start, straight: Straight
) -> None:
    job = start(*SETTINGS, "checkpoint_background=true")
    attempt = job.attempt(
        [
            Fault("host", "memory", step=2, rank=1, value=30_000_000),
            Fault("hosted", "unlimit", step=2, rank=1),
        ]
    )
    same = attempt.codes == [0, 0] and weights(job.run) == weights(
        straight(*SETTINGS, "checkpoint_background=false").run
    )
    record("12 no memory to save in the background", survived=same, lost=0)
    assert same, attempt.said
    assert attempt.printed().count("there is no memory for a copy of what is saved (rank 1: ") == 1
    assert "ALARM" not in attempt.said
