"""Fault 9: a run that is asked to stop saves first, whatever it is doing; a second request does no harm."""

import signal
from itertools import product

import pytest

from tests.fault_table import record
from tests.faults.conftest import Start, Straight
from tests.faults.inject import Fault
from tests.faults.ranks import weights

pytestmark = pytest.mark.faults

SETTINGS = ("checkpoint_interval=3", "validation_interval=4", "tokens=7680")  # 30 steps
ASKING = [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT]


def test_a_signal_at_any_moment_costs_no_step(start: Start, straight: Straight) -> None:
    moments = [
        ("prepare", 0), ("data", 3), ("forward", 5), ("backward", 7), ("step", 10),
        ("validation", 12), ("save:shard", 0), ("save:rename", 0), ("save:latest", 0), ("stepped", 28),
    ]  # fmt: skip
    numbers = [ASKING[index % 3] for index in range(len(moments))]
    story = start(*SETTINGS).go(
        *(
            [Fault(at, "signal", step=step, rank=index % 2 if at[:4] != "save" else None, value=number)]
            for index, ((at, step), number) in enumerate(zip(moments, numbers, strict=True))
        )
    )
    same = story.finished and weights(story.job.run) == weights(straight(*SETTINGS).run)
    for attempt, (lost, _) in zip(story.attempts, story.costs(), strict=False):
        assert attempt.codes == [0, 0], attempt.said
        told = "nothing is saved yet" if attempt.number == 1 else "saved at step"
        assert f"asked to stop; {told}" in attempt.printed(), attempt.said
        assert lost == 0, f"attempt {attempt.number}, stopped at {moments[attempt.number - 1]}"
    assert same
    for _, seconds in story.costs():
        record("9 signal", survived=True, lost=0, seconds=seconds)


def test_a_signal_while_starting_ends_the_run_and_costs_no_step(start: Start, straight: Straight) -> None:
    story = start(*SETTINGS).go(*([Fault("start", "signal", value=number)] for number in ASKING))
    same = story.finished and weights(story.job.run) == weights(straight(*SETTINGS).run)
    assert same
    assert not any(lost for lost, _ in story.costs())
    for _, seconds in story.costs():
        record("9 signal while starting", survived=True, lost=0, seconds=seconds)


def test_a_second_signal_does_no_harm(start: Start, straight: Straight) -> None:
    """But for a second Ctrl-C, which is how a person says: at once."""
    pairs = list(product(["backward", "save:shard", "save:rename"], [signal.SIGUSR1, signal.SIGTERM]))
    story = start(*SETTINGS).go(
        *(
            [
                Fault("forward", "signal", step=3 * index + 2, value=signal.SIGTERM),
                Fault(second, "signal", step=3 * index + 2, value=number),
            ]
            for index, (second, number) in enumerate(pairs)
        )
    )
    same = story.finished and weights(story.job.run) == weights(straight(*SETTINGS).run)
    for attempt, (lost, _) in zip(story.attempts, story.costs(), strict=False):
        assert attempt.codes == [0, 0], attempt.said
        assert lost == 0
    assert same
    for _, seconds in story.costs():
        record("9 a second signal", survived=True, lost=0, seconds=seconds)
