"""Faults 1, 10, 14: ranks die, at any moment of a step and at every phase of saving, and nothing is lost."""

import random
import signal
import time

import pytest

from tests.fault_table import record
from tests.faults.conftest import Start, Straight
from tests.faults.inject import Fault
from tests.faults.ranks import Attempt, Story, weights

pytestmark = pytest.mark.faults

INTERVAL = 2
LONG = (f"checkpoint_interval={INTERVAL}", "checkpoint_background=false", "tokens=6144")  # 24 steps


def survived(name: str, story: Story, straight: Straight, limit: int = INTERVAL) -> None:
    """Holds the run to its promises, and records the costs of each attempt."""
    job = story.job
    assert story.finished, story.attempts[-1].said
    same = weights(job.run) == weights(straight(*job.settings, ranks=job.ranks).run)
    assert same, "the weights differ from the undisturbed run's"
    assert all(lost <= limit for lost, _ in story.costs()), story.costs()
    for lost, seconds in story.costs():
        record(name, survived=True, lost=lost, seconds=seconds)


def test_a_rank_that_dies_anywhere_in_a_step_costs_at_most_the_steps_since_the_last_save(
    start: Start, straight: Straight
) -> None:
    story = start(*LONG).go(
        [Fault("joined", "kill", rank=1)],
        [Fault("data", "kill", step=3, rank=1)],
        [Fault("forward", "kill", step=6, rank=0)],
        [Fault("backward", "kill", step=7, rank=1)],
        [Fault("step", "kill", step=10, rank=0)],
        [Fault("stepped", "abort", step=12, rank=1)],
        [Fault("forward", "crash", step=13, rank=1)],
        [Fault("backward", "raise", step=16, rank=0)],
        [Fault("step", "exit", step=19, rank=1)],
        [Fault("validation", "raise", step=24, rank=1)],
    )
    assert all(any(attempt.codes) for attempt in story.attempts[:-1])
    survived("1 one rank dies", story, straight)


def test_all_ranks_dying_at_once_cost_no_more(start: Start, straight: Straight) -> None:
    story = start(*LONG).go(
        [Fault("forward", "kill", step=1)],
        [Fault("backward", "kill", step=5)],
        [Fault("step", "kill", step=8)],
        [Fault("validation", "kill", step=24)],
    )
    assert all(attempt.codes == [-9, -9] for attempt in story.attempts[:-1])
    survived("1 all ranks die", story, straight)


def test_a_rank_that_is_killed_at_any_time_from_outside_costs_no_more(
    start: Start, straight: Straight
) -> None:
    draw = random.Random(1)
    steps = iter([1, 6, 11, 17, 21])

    def kill(attempt: Attempt) -> None:
        assert attempt.reached(next(steps))
        time.sleep(draw.uniform(0, 0.1))
        attempt.processes[draw.randrange(2)].kill()

    story = start(*LONG).go([], [], [], [], [], watch=kill)
    survived("1 one rank killed from outside", story, straight)


def test_a_kill_at_any_phase_of_saving_leaves_a_checkpoint_to_go_on_from(
    start: Start, straight: Straight
) -> None:
    story = start(*LONG).go(
        [Fault("save:folder", "kill", step=2)],  # the very first: there is no other yet
        [Fault("save:folder", "kill", step=4)],
        [Fault("stepped", "limit", step=4, rank=1, value=100_000)],  # in the middle of its shard
        [Fault("stepped", "limit", step=6, rank=0, value=100_000)],
        [Fault("save:shard", "kill", step=8, rank=1)],
        [Fault("save:shard", "kill", step=10, rank=0)],
        [Fault("save:manifest", "kill", step=12)],
        [Fault("save:rename", "kill", step=14)],
        [Fault("save:latest", "kill", step=16)],
        [Fault("save:delete", "kill", step=18)],
        [Fault("save:rename", "kill", step=24)],
    )
    for attempt in story.attempts[:-1]:
        assert any(attempt.codes), f"attempt {attempt.number} was not hit"
    assert [story.attempts[2].codes[1], story.attempts[3].codes[0]] == [-signal.SIGXFSZ] * 2
    survived("10 killed while saving", story, straight)
    left = sorted(path.name for path in (story.job.stage / "checkpoints").iterdir())
    assert [name for name in left if name.startswith("step-")] == ["step-00000022", "step-00000024"]


def test_a_rank_that_dies_while_a_checkpoint_is_written_in_the_background_costs_no_more_than_two_intervals(
    start: Start, straight: Straight
) -> None:
    settings = (f"checkpoint_interval={INTERVAL}", "checkpoint_background=true", "tokens=6144")
    story = start(*settings).go(
        [Fault("save:shard", "kill", rank=0)],
        [Fault("save:shard", "kill", rank=1)],
        [Fault("save:shard", "sleep", value=1), Fault("backward", "kill", step=5, rank=1)],
        [Fault("stepped", "limit", step=9, rank=1, value=100_000)],
        [Fault("save:manifest", "kill")],
        [Fault("save:rename", "kill", step=14)],
        [Fault("save:delete", "kill")],
    )
    assert all(any(attempt.codes) for attempt in story.attempts[:-1])
    survived("10 killed while saving in the background", story, straight, limit=2 * INTERVAL)


def test_no_sample_is_read_twice_or_left_out_whenever_a_rank_dies(start: Start, straight: Straight) -> None:
    settings = (
        "checkpoint_interval=3",
        "checkpoint_background=false",
        "tokens=15360",
        "validation_windows=1",
    )  # 60 steps: into the second epoch
    draw = random.Random(2)
    steps = sorted(draw.sample(range(2, 60), 12))
    points = ["data", "forward", "backward", "step", "stepped"]
    story = start(*settings).go(
        *([Fault(draw.choice(points), "kill", step=step, rank=draw.randrange(2))] for step in steps)
    )
    survived("14 position in the data", story, straight, limit=3)
    read = story.samples()
    assert sorted(read) == list(range(1, 61))
    reference = straight(*settings).story.samples()
    assert read == reference
    order = [sample for step in sorted(read) for sample in read[step]]
    epoch = len(set(order))
    assert len(order) == 480
    assert len(set(order[:epoch])) == epoch, "a sample came twice within the first epoch"
