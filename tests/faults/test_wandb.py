"""Fault 21: W&B does not answer. No step waits for it, and the run ends."""

import statistics
import time
from itertools import pairwise

import pytest

from tests.fault_table import record
from tests.faults.conftest import Start, Straight
from tests.faults.ranks import Story, weights
from tests.spawn import free_port

pytestmark = pytest.mark.faults

SETTINGS = ("tokens=6144",)


def step_seconds(story: Story) -> float:
    """The median time between two steps."""
    times = [line["time"] for line in story.of("step", rank=0)]
    return statistics.median(after - before for before, after in pairwise(times))


def test_a_run_that_cannot_reach_wandb_is_recorded_offline_and_no_step_waits(
    start: Start, straight: Straight
) -> None:
    nobody = {
        "WANDB_BASE_URL": f"http://127.0.0.1:{free_port()}",
        "WANDB_API_KEY": "a" * 40,
        "WANDB_INIT_TIMEOUT": "6",
        "WANDB_MODE": "online",
    }
    reference = straight(*SETTINGS)
    job = start(*SETTINGS, "log.wandb=online", variables=nobody)
    begun = time.monotonic()
    (attempt,) = job.go().attempts
    seconds = time.monotonic() - begun
    same = attempt.codes == [0, 0] and weights(job.run) == weights(reference.run)
    assert same, attempt.said
    assert "W&B cannot be reached" in attempt.printed()
    assert len(list((job.run / "wandb").glob("offline-run-*"))) == 1
    assert seconds < 60, "it waited for W&B"
    # 0.2 s: a single request to a server takes that; a step here takes some 0.03 s.
    assert step_seconds(job.story) < step_seconds(reference.story) + 0.2
    record("21 W&B down", survived=True, lost=0)
