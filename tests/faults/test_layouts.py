"""Faults 13 and 15: another layout at every restart, or a stop at every step: the losses do not care."""

import pytest

from tests.fault_table import record
from tests.faults.conftest import Start, Straight
from tests.faults.inject import Fault
from tests.faults.ranks import Job, weights
from tests.tiny_run import rows

pytestmark = pytest.mark.faults

LAYOUTS = [
    (2, "zero1"), (1, "zero3"), (4, "zero2"), (2, "zero1_tp2"), (4, "zero2_tp2"), (3, "zero3"), (2, "zero0"),
]  # fmt: skip


def losses(job: Job) -> list[float]:
    """Of each step; a row may also tell of a save alone."""
    return [row["loss"] for row in rows(job.run) if "loss" in row]


def test_a_run_that_is_killed_goes_on_in_any_other_layout_with_the_same_losses_and_samples(
    start: Start, straight: Straight
) -> None:
    settings = ("checkpoint_interval=2", "checkpoint_background=false", "batch=12", "tokens=6144")  # 16 steps
    job = start(*settings)
    for number, (ranks, layout) in enumerate(LAYOUTS):
        job.ranks = ranks
        job.settings = (*settings, f"parallel={layout}", "parallel.precision=fp32")
        last = number == len(LAYOUTS) - 1
        job.attempt([] if last else [Fault("backward", "kill", step=2 * number + 2)])
    story, reference = job.story, straight(*settings)
    found, expected = losses(job), losses(reference)
    costs = story.costs()
    assert story.finished, story.attempts[-1].said
    assert found == pytest.approx(expected, rel=1e-4)
    assert all(lost <= 2 for lost, _ in costs), costs
    for step, samples in reference.story.samples().items():
        # Tensor-parallel ranks read the same samples.
        assert set(story.samples()[step]) == set(samples), f"step {step}"
    for lost, seconds in costs:
        record("13 other layout", survived=True, lost=lost, seconds=seconds)


def test_a_run_with_dropout_that_is_stopped_after_every_step_draws_what_it_would_have_drawn(
    start: Start, straight: Straight
) -> None:
    settings = ("model.dropout=0.1", "validation_interval=4")
    reference = straight(*settings, ranks=1)
    story = start(*settings, ranks=1).go(*([Fault("forward", "signal", value=15)] for _ in range(11)))
    assert [attempt.codes for attempt in story.attempts] == [[0]] * 12
    assert weights(story.job.run) == weights(reference.run)
    assert losses(story.job) == losses(reference)
    assert weights(straight(ranks=1).run) != weights(story.job.run), "dropout did nothing"
    for lost, seconds in story.costs():
        record("15 stopped at every step, with dropout", survived=True, lost=lost, seconds=seconds)
