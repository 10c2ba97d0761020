"""Fault 23: fault after fault, drawn at random, for three minutes; the weights are as if there were none.

MEGACHAT_SOAK_SECONDS and MEGACHAT_SOAK_SEED make it longer, and another one.
"""

import math
import os
import random
import signal
import statistics
import time
from itertools import pairwise

import pytest

from tests.fault_table import record
from tests.faults.conftest import Start, Straight
from tests.faults.inject import Fault
from tests.faults.ranks import Attempt, Story, weights
from tests.faults.test_damage import DAMAGE, checkpoints

pytestmark = [pytest.mark.faults, pytest.mark.slow]

SECONDS = float(os.environ.get("MEGACHAT_SOAK_SECONDS", "180"))
SEED = int(os.environ.get("MEGACHAT_SOAK_SEED", "23"))
INTERVAL = 10

# Were the schedule not constant, the number of steps would have to be known in advance.
SETTINGS = (
    f"checkpoint_interval={INTERVAL}",
    "schedule=constant",
    "schedule.warmup=0",
    "log.interval=10",
    "validation_windows=1",
)
LIMITS = ("watch.hang=8", "watch.start=60", "watch.long=16")
PACE = Fault("data", "sleep", step=1, value=0.1, until=10**9)

MOMENTS = ["data", "forward", "backward", "step", "stepped"]
SAVING = ["save:folder", "save:shard", "save:manifest", "save:rename", "save:latest", "save:delete"]


def ending(draw: random.Random, step: int) -> Fault:
    """Something that ends an attempt, at about this step."""
    rank = draw.choice([0, 1, None])
    kind = draw.choices(["crash", "save", "signal", "hang"], [5, 4, 2, 2])[0]
    if kind == "crash":
        deed = draw.choice(["kill", "kill", "raise", "abort", "exit", "crash"])
        return Fault(draw.choice(MOMENTS), deed, step, rank)
    if kind == "save":
        return Fault(draw.choice(SAVING), "kill", rank=draw.choice([0, None]))
    if kind == "signal":
        number = draw.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
        return Fault(draw.choice(MOMENTS), "signal", step, rank, number)
    at, deed = draw.choice([("forward", "freeze"), ("data", "fifo"), ("backward", "gil")])
    return Fault(at, deed, step, draw.choice([0, 1]), 600)


def harmless(draw: random.Random) -> list[Fault]:
    """Something that an attempt is to get over."""
    rank = draw.choice([0, 1])
    return draw.choice(
        [
            [],
            [],
            [Fault("save:manifest", "io")],
            [Fault("save:shard", "io", rank=rank)],
            [Fault("save:shard", "sleep", rank=rank, value=1.5)],
            [Fault("start", "clock", rank=rank, value=draw.choice([-86_400.0, 86_400.0]))],
        ]
    )


def goodput(story: Story, seconds: float) -> float:
    """The share of the time in which steps were taken that lasted."""
    notes = story.of("step", rank=0)
    usual = statistics.median(
        after["time"] - before["time"]
        for before, after in pairwise(notes)
        if after["attempt"] == before["attempt"]
    )
    return min(1.0, len({note["step"] for note in notes}) * usual / seconds)


def test_fault_after_fault_ends_with_the_weights_of_an_undisturbed_run(
    start: Start, straight: Straight
) -> None:
    draw = random.Random(SEED)
    job = start(*SETTINGS, *LIMITS, "tokens=25600000", grace=8.0)
    begun, wrong = time.monotonic(), []
    while time.monotonic() - begun < SECONDS:
        step = max((note["step"] for note in job.story.of("step")), default=0)
        if len(found := checkpoints(job)) > 1 and draw.random() < 0.2:
            damage = draw.choice(DAMAGE)
            damage(found[-1])
            wrong.append(f"{damage.__name__} {found[-1].name}")
        faults = [*harmless(draw), ending(draw, step + draw.randint(1, 3 * INTERVAL))]
        wrong.append("; ".join(f"{one.do} at {one.at}" for one in faults))
        job.attempt([PACE, *faults])

    def stop(attempt: Attempt) -> None:
        assert attempt.reached(1)
        attempt.send(signal.SIGTERM)

    last = job.attempt([PACE], watch=stop)
    seconds = time.monotonic() - begun
    step = int(checkpoints(job)[-1].name.removeprefix("step-"))
    costs = job.story.costs()
    reference = straight(*SETTINGS, f"tokens={step * 256}", patience=120.0 + step)
    same = weights(job.run) == weights(reference.run)
    read, expected = job.story.samples(), reference.story.samples()
    share = goodput(job.story, seconds)
    assert last.codes == [0, 0], last.said
    assert same, wrong
    assert {at: samples for at, samples in read.items() if at <= step} == expected  # later ones were lost
    assert all(lost <= 5 * INTERVAL for lost, _ in costs), list(zip(wrong, costs, strict=False))
    name = f"23 soak of {SECONDS:.0f} s, goodput {share:.0%}"
    for lost, back in costs:
        # No limit: several attempts in a row may end before they come to a new step.
        record(name, survived=True, lost=lost, seconds=back, limit=math.inf)
