"""Faults 16 and 17: numbers that are wrong, and what becomes of them when ranks die as well."""

import json
import math
import re

import pytest

from tests.fault_table import record
from tests.faults.conftest import Start, Straight
from tests.faults.inject import Fault
from tests.faults.ranks import weights

pytestmark = pytest.mark.faults

SETTINGS = ("checkpoint_interval=2", "checkpoint_background=false", "guard.window=4")
SKIPPED = "32,39"
"""The samples of step 5."""


@pytest.mark.parametrize(
    ("at", "value"),
    [("loss", math.nan), ("gradient", math.inf), ("loss", 1000.0)],
    ids=["nan", "inf", "spike"],
)
def test_a_bad_batch_is_left_out_by_all_ranks_also_by_a_start_after_it(
    at: str, value: float, start: Start, straight: Straight
) -> None:
    story = start(*SETTINGS).go(
        [Fault(at, "poison", 5, 1, value, until=5), Fault("forward", "kill", 6, 0)],
        then=[[Fault(at, "poison", 5, 1, value, until=5)]],
    )
    told = straight(*SETTINGS, f"skip=[[{SKIPPED}]]")
    same = story.finished and weights(story.job.run) == weights(told.run)
    (lost, seconds), *_ = story.costs()
    book = [json.loads(line) for line in (story.job.stage / "skipped.jsonl").read_text().splitlines()]
    assert book[0]["samples"] == [32, 39], book
    assert same, story.attempts[-1].said
    assert weights(story.job.run) != weights(straight(*SETTINGS).run)
    record("16 a bad batch", survived=True, lost=lost, seconds=seconds)


def test_a_number_that_was_wrong_once_changes_nothing(start: Start, straight: Straight) -> None:
    (attempt,) = (story := start(*SETTINGS).go(then=[[Fault("loss", "poison", 5, 1, math.nan)]])).attempts
    same = attempt.codes == [0, 0] and weights(story.job.run) == weights(straight(*SETTINGS).run)
    assert same, attempt.said
    assert "rank 1" in attempt.printed()
    record("16 wrong once", survived=True, lost=0)


def test_a_flipped_bit_in_one_ranks_weights_is_found_before_it_is_saved_and_that_rank_alone_is_named(
    start: Start, straight: Straight
) -> None:
    settings = (*SETTINGS, "parallel=zero0", "parallel.precision=fp32", "checkpoint_interval=3")
    story = start(*settings, ranks=3).go([Fault("weights", "flip", 8, 1, 20)])
    attempt = story.attempts[0]
    same = story.finished and weights(story.job.run) == weights(straight(*settings, ranks=3).run)
    (lost, seconds), *_ = story.costs()
    assert all(attempt.codes), attempt.codes
    assert "come apart since step 6; they differ from what most ranks hold" in attempt.said
    assert set(re.findall(r"rank (\d+) \(", attempt.said)) == {"1"}, attempt.said
    assert lost <= 3
    assert same, story.attempts[-1].said
    record("17 weights come apart", survived=True, lost=lost, seconds=seconds)


def test_changed_settings_are_refused_by_name(start: Start, straight: Straight) -> None:
    job = start(*SETTINGS)
    job.attempt([Fault("forward", "kill", step=7)])
    job.settings = (*SETTINGS, "optimizer.lr=0.5", "model.dim=64", "model.head_dim=16")
    refused = job.attempt()
    said = refused.printed()
    clear = (
        refused.codes[0] == 1 and "optimizer.lr" in said and "model.dim" in said and "Traceback" not in said
    )
    assert clear, said
    job.settings = SETTINGS
    job.attempt()
    assert job.story.finished
    assert weights(job.run) == weights(straight(*SETTINGS).run)
    record("22 other settings: refused", survived=True)
