"""Every stage in any layout: three ranks, then two by two, then one, and nobody can tell from its losses.

A batch of 8 samples on 3 data ranks is 3, 3 and 2. Sampled answers are the same ones on any rank, so the
losses of PPO's policy and critic can be compared as those of other stages can.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megachat.model.size import NOTHING, Work
from megachat.train.loop import flops_of, train_step
from tests.align import tiny
from tests.spawn import on_ranks

STAGES = {
    "sft": ["epochs=9", "context=16", "validation=0.2", "prompt_weight=0.25"],
    "rm": ["epochs=1"],
    "dpo": ["epochs=1", "imitation=0.1"],
    "ppo": [
        "rollout=16", "at_once=3", "epochs=1", "max_new_tokens=6", "critic_first=0", "validation_prompts=4",
        "optimizer.lr=1e-3",
    ],
    "grpo": [
        "rollout=16", "group=4", "at_once=3", "epochs=1", "max_new_tokens=6", "validation_prompts=4",
        "optimizer.lr=1e-3", "rewards=[model,length]", "rewards.length.longest=2", "variant.mean=token",
    ],
}  # fmt: skip
SAMPLING = ("ppo", "grpo")
COMPARED = ("loss", "critic/loss", "gradient_norm", "critic/gradient_norm", "accuracy", "margin")
COMPARED += ("reward/mean", "answer/length", "advantage", "validation/")


def train(inputs: Path, run: Path, steps: int, *overrides: str) -> None:
    """Every stage goes on to its step `steps`, in this layout. All start from what lies in `inputs`."""
    for name, settings in STAGES.items():
        sizes = ["batch=8", "micro_batch=2", "resume=any", "parallel.precision=fp32", "validation_interval=2"]
        upto = f"rollouts={steps // 2}" if name in SAMPLING else f"max_steps={steps}"
        tiny.stage(name, inputs, run / name, *sizes, *settings, upto, *overrides).execute()


@pytest.mark.parametrize("name", STAGES)
def test_an_idle_micro_batch_changes_nothing_to_the_last_bit(name: str, inputs: Path, run: Path) -> None:
    ends = []
    for idle in (False, True):
        task = tiny.stage(name, inputs, run, "batch=8", "micro_batch=4", *STAGES[name])
        state = tiny.running(task)
        batches = next(task.batches(state))
        if idle:
            batches += [replace(batches[0], weight=0.0, work=NOTHING, samples=0)]
        sums = train_step(task, state, batches, rate=1e-2)
        weights = [weight for engine in state.engines.values() for weight in engine.module.parameters()]
        ends.append((sums, state.progress, weights))
    (sums, progress, weights), (other_sums, other_progress, other_weights) = ends
    assert sums == other_sums
    assert progress == other_progress
    assert all(torch.equal(one, other) for one, other in zip(weights, other_weights, strict=True))


@pytest.mark.parametrize("name", STAGES)
def test_a_step_takes_the_flops_that_are_counted(name: str, inputs: Path, run: Path) -> None:
    task = tiny.stage(name, inputs, run, "batch=8", "micro_batch=8", *STAGES[name])
    state = tiny.running(task)
    (batch,) = next(task.batches(state))
    # Among the kernels of attention torch counts only the plain one, which computes the whole square.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        result = task.loss(state, batch)
        for role, loss in result.losses.items():
            state.engines[role].backward(loss, last=True)
    flops = flops_of(task, state.engines["model"].module)
    if name in SAMPLING:
        assert flops is None  # rollouts, judges and a critic: no number of passes tells them
        return
    tokens = batch.inputs if name == "sft" else batch.rows.tokens
    rows, seq = tokens.shape
    logits = math.ceil(batch.work.logits / 128) * 128  # the model pads them
    assert flops is not None
    assert flops.of_model(Work(rows * seq, rows * seq**2, logits)) == counter.get_total_flops()


@on_ranks(1)
def alone(inputs: Path, run: Path, steps: int) -> None:
    train(inputs, run, steps, "parallel=zero0")


@on_ranks(3)
def on_three(inputs: Path, run: Path, steps: int) -> None:
    train(inputs, run, steps, "parallel=zero3")


@on_ranks(4)
def two_by_two(inputs: Path, run: Path, steps: int) -> None:
    train(inputs, run, steps, "parallel=zero2_tp2")


def go_on(leg: Callable[..., None], inputs: Path, run: Path, since: int, steps: int) -> None:
    """A leg that starts at step `since`: every row up to it stays as it is, with its times, to the byte."""
    metrics = {name: run / name / name / "metrics.jsonl" for name in STAGES}
    earlier = {name: path.read_text() for name, path in metrics.items()}
    leg(inputs=inputs, run=run, steps=steps)
    for name, kept in earlier.items():
        assert len(kept.splitlines()) == since, name
        assert metrics[name].read_text().startswith(kept), f"{name} started over"
        assert [row["step"] for row in tiny.rows(run / name, name)][since:] == [*range(since + 1, steps + 1)]


@pytest.mark.slow
def test_every_stage_moves_from_three_ranks_to_two_by_two_to_one(inputs: Path, tmp_path: Path) -> None:
    undisturbed, moved = tmp_path / "undisturbed", tmp_path / "moved"
    alone(inputs=inputs, run=undisturbed, steps=6)
    on_three(inputs=inputs, run=moved, steps=2)
    go_on(two_by_two, inputs, moved, since=2, steps=4)
    go_on(alone, inputs, moved, since=4, steps=6)
    for name in STAGES:
        expected, found = tiny.rows(undisturbed / name, name), tiny.rows(moved / name, name)
        assert [row["step"] for row in found] == list(range(1, 7)), name
        # Rows differ in length: other samples, or other answers, would be another number of tokens.
        assert [row["tokens"] for row in found] == [row["tokens"] for row in expected], name
        for there, here in zip(expected, found, strict=True):
            compared = [key for key in there if key.startswith(COMPARED)]
            assert "loss" in compared
            assert ("critic/loss" in compared) == (name == "ppo")
            assert {key: here[key] for key in compared} == pytest.approx(
                {key: there[key] for key in compared}, rel=1e-4, abs=1e-6
            ), (name, here["step"])


def noisy(inputs: Path, run: Path, layout: str) -> None:
    settings = ["neftune=5", "batch=8", "micro_batch=4", "max_steps=3", "epochs=9", "parallel.precision=fp32"]
    tiny.stage("sft", inputs, run, *settings, f"parallel={layout}").execute()


@on_ranks(1)
def noisy_alone(inputs: Path, run: Path) -> None:
    noisy(inputs, run, "zero0")


@on_ranks(2)
def noisy_in_two_halves(inputs: Path, run: Path) -> None:
    noisy(inputs, run, "zero1_tp2")


@pytest.mark.slow
def test_ranks_that_share_a_model_add_the_same_noise(inputs: Path, tmp_path: Path) -> None:
    noisy_alone(inputs=inputs, run=tmp_path / "one")
    noisy_in_two_halves(inputs=inputs, run=tmp_path / "two")
    one, two = (tiny.rows(tmp_path / name, "sft") for name in ("one", "two"))
    assert len(one) == 3
    for there, here in zip(one, two, strict=True):
        for key in ("loss", "gradient_norm"):
            assert here[key] == pytest.approx(there[key], rel=1e-4)
