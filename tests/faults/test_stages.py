"""Faults 1 and 9 in alignment: a rank dies or is asked to stop, and every model comes out the same.

What sets these stages apart: judges that are loaded again at every start, answers that are sampled and not
saved, and in PPO two models, of which a rank may have updated one.
"""

import signal
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest

from tests.align import tiny
from tests.fault_table import record
from tests.faults.inject import Fault
from tests.faults.ranks import Job, Story, tensors

pytestmark = pytest.mark.faults

INTERVAL = 4
STEPS = 12
COMMON = (
    "parallel=zero2", "parallel.precision=fp32", "batch=8", "micro_batch=2", f"max_steps={STEPS}",
    "schedule=cosine", "schedule.warmup=0.2",
    f"checkpoint_interval={INTERVAL}", "checkpoint_background=false",
)  # fmt: skip
SETTINGS = {
    "sft": (*COMMON, "epochs=9", "context=16"),
    "rm": (*COMMON, "epochs=1"),
    "dpo": (*COMMON, "epochs=1", "imitation=0.1"),
    # Three rollouts of four steps; the policy learns from the second on.
    "ppo": (
        *COMMON, "rollouts=3", "rollout=16", "epochs=2", "at_once=4", "max_new_tokens=6", "critic_first=1",
        "validation_prompts=4", "optimizer.lr=1e-3",
    ),
}  # fmt: skip
KILLS = {
    "sft": [Fault("backward", "kill", step=6, rank=1), Fault("step", "kill", step=11)],
    "rm": [Fault("backward", "kill", step=7), Fault("step", "kill", step=10, rank=0)],
    "dpo": [Fault("backward", "kill", step=6, rank=0), Fault("step", "kill", step=11, rank=1)],
    "ppo": [
        Fault("answers", "kill", step=5, rank=1),
        Fault("backward", "kill", step=7),
        Fault("step", "kill", step=8, rank=0),
        Fault("step:critic", "kill", step=10, rank=1),
    ],
}
"""Between a checkpoint and the next one."""

Undisturbed = Callable[[str], Job]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data to start from."""
    return tiny.make(tmp_path_factory.mktemp("stages") / "inputs")


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """`undisturbed("sft")`: the finished job of a stage that nothing happened to."""

    @cache
    def get(name: str) -> Job:
        job = Job(tmp_path_factory.mktemp(name), inputs, SETTINGS[name], name=name)
        (attempt,) = job.go().attempts
        assert attempt.codes == [0, 0], attempt.said
        return job

    return get


def survived(fault: str, story: Story, reference: Job, saved: Sequence[int], limit: int) -> None:
    """Each attempt went on from the checkpoint of its step in `saved`, and in the end nothing differs."""
    job = story.job
    costs = story.costs()
    assert story.finished, story.attempts[-1].said
    for attempt, step in zip(story.attempts[1:], saved, strict=True):
        assert f"{job.name}: goes on from step {step} " in attempt.printed(), attempt.said
    assert tensors(job.stage) == tensors(reference.stage)
    assert story.samples() == reference.story.samples()
    steps = [row["step"] for row in tiny.rows(job.run, job.name) if "loss" in row]
    assert steps == [*range(1, STEPS + 1)]
    assert all(lost <= limit for lost, _ in costs), costs
    for lost, seconds in costs:
        record(fault, survived=True, lost=lost, seconds=seconds)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_rank_that_dies_costs_at_most_the_steps_since_the_last_save(
    name: str, inputs: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    job = Job(tmp_path, inputs, SETTINGS[name], name=name)
    story = job.go(*([fault] for fault in KILLS[name]))
    for attempt in story.attempts[:-1]:
        assert -signal.SIGKILL in attempt.codes, attempt.said
    saved = [(fault.step - 1) // INTERVAL * INTERVAL for fault in KILLS[name]]
    survived(f"1 a rank of {name} dies", story, undisturbed(name), saved, limit=INTERVAL)


def test_ppo_when_asked_to_stop_learns_from_the_answers_it_has_waits_for_no_others_and_loses_no_step(
    inputs: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Also in the last rollout: what follows is validation alone."""
    job = Job(tmp_path, inputs, [*SETTINGS["ppo"], "checkpoint_background=true"], name="ppo")
    story = job.go(
        [Fault("backward", "signal", step=2, rank=1, value=signal.SIGUSR1)],
        [Fault("answers", "signal", step=5, rank=0, value=signal.SIGTERM)],
        [Fault("step:critic", "signal", step=11, value=signal.SIGUSR1)],
    )
    assert [attempt.codes for attempt in story.attempts] == [[0, 0]] * 4
    for attempt, step in zip(story.attempts, (4, 4, 12), strict=False):
        assert f"asked to stop; saved at step {step}" in attempt.printed(), attempt.said
    survived("9 signal in PPO", story, undisturbed("ppo"), [4, 4, 12], limit=0)


def test_both_models_of_ppo_learn(inputs: Path, undisturbed: Undisturbed) -> None:
    """Or it would mean little that they are the same."""
    learnt = tensors(undisturbed("ppo").stage)
    for role, start in {"model": "sft", "critic": "rm"}.items():
        before = {
            name.replace("model/", f"{role}/"): value for name, value in tensors(inputs / start).items()
        }
        assert before
        assert all(learnt[name] != value for name, value in before.items()), role
