"""PPO-ptx: text beside answers has a mean of its own, whoever reads it, and goes on where it stood."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from megachat.align.ppo import PPO
from megachat.align.text import Text
from megachat.data.loader import share
from megachat.train.loop import train_step
from megachat.train.pretrain import collate
from tests.align import tiny
from tests.spawn import on_ranks

MIXED = [*tiny.ROLLOUTS, "critic_first=0", "pretraining_mix=0.5", "pretraining_rows=5", "micro_batch=3"]
PLAIN = ["optimizer=sgd", "optimizer.momentum=0", "clip=0"]


def step(inputs: Path, run: Path, *overrides: str) -> tuple[dict[str, float], list[torch.Tensor], Any]:
    """The figures of one step of plain descent by 1, how far each weight of the policy moved, and the run."""
    task = tiny.stage("ppo", inputs, run, *MIXED, *PLAIN, *overrides)
    state = tiny.running(task)
    weights = [*state.engines["model"].module.parameters()]
    before = [weight.detach().clone() for weight in weights]
    sums = train_step(task, state, next(task.batches(state)), rate=1.0)
    return sums, [then - now.detach() for then, now in zip(before, weights, strict=True)], state


def test_the_gradient_is_the_policys_and_the_mix_of_the_mean_over_text(inputs: Path, run: Path):
    sums, both, state = step(inputs, run)
    alone, answers, _ = step(inputs, run, "pretraining_mix=0")
    fresh = tiny.running(tiny.stage("ppo", inputs, run, *MIXED)).engines["model"].module
    text = collate(share(state.data.text, 0, 5, 0, 1))
    mean = fresh(text.inputs, text.documents, labels=text.labels) / (text.labels >= 0).sum()
    mean.backward()
    for found, without, weight in zip(both, answers, fresh.parameters(), strict=True):
        assert_close(found, without + 0.5 * weight.grad, rtol=1e-3, atol=1e-6)
    assert sums["text/loss"] / sums["weight"] == pytest.approx(mean.item(), rel=1e-5)
    assert sums["weight"] == alone["weight"]  # the answers' tokens alone
    assert (sums["loss"] - alone["loss"]) / sums["weight"] == pytest.approx(0.5 * mean.item(), rel=1e-5)
    assert sums["critic/gradient_norm"] == pytest.approx(alone["critic/gradient_norm"], rel=1e-6)


def test_without_a_mix_no_text_is_needed(inputs: Path, run: Path, tmp_path: Path):
    bare = tmp_path / "bare"
    shutil.copytree(inputs, bare)
    shutil.rmtree(bare / "encode")
    task = tiny.stage("ppo", bare, run, *tiny.ROLLOUTS)
    assert task.reads() == ["tokenizer", "sft", "rm"]
    assert not any(isinstance(batch, Text) for batch in next(task.batches(tiny.running(task))))
    assert tiny.stage("ppo", inputs, run, *MIXED).reads() == ["tokenizer", "sft", "rm", "encode"]


def test_each_step_reads_on_in_the_order_of_the_corpus(inputs: Path, run: Path):
    task = tiny.stage("ppo", inputs, run, *MIXED)
    state = tiny.running(task)
    batches, read = task.batches(state), []
    for _ in range(3):
        parts = [batch for batch in next(batches) if isinstance(batch, Text)]
        assert [len(part.tokens.inputs) for part in parts] == [3, 2]
        read += [row.tolist() for part in parts for row in part.tokens.inputs]
    assert read == [np.asarray(state.data.text[place].tokens)[:-1].tolist() for place in range(15)]
    assert state.progress.state["text"] == 15


def test_the_text_stays_out_while_the_critic_learns_alone(inputs: Path, run: Path):
    sums, moved, _ = step(inputs, run, "critic_first=1")
    assert all(not weight.any() for weight in moved)
    assert sums["critic/gradient_norm"] > 0
    assert sums["text/loss"] > 0


def test_a_run_that_was_cut_off_reads_on_to_the_last_bit(inputs: Path, run: Path, tmp_path: Path):
    settings = [*MIXED, "rollouts=2", "checkpoint_interval=4", "checkpoint_keep=9", "max_new_tokens=4"]
    whole = tmp_path / "whole"
    for folder in (whole, run):
        tiny.stage("ppo", inputs, folder, *settings).execute()
    shutil.rmtree(run / "ppo" / "checkpoints" / "step-00000008")
    (run / "ppo" / "done.json").unlink()
    tiny.stage("ppo", inputs, run, *settings).execute()
    names = ("loss", "text/loss", "gradient_norm", "critic/loss")
    first, second = (
        [[row[name] for name in names] for row in tiny.rows(folder, "ppo")] for folder in (whole, run)
    )
    assert first == second
    assert len(first) == 8
    manifest = json.loads((run / "ppo/checkpoints/step-00000008/manifest.json").read_text())
    assert manifest["progress"]["state"]["text"] == 40


def test_a_run_that_goes_on_with_other_text_is_refused(inputs: Path, run: Path):
    task = tiny.stage("ppo", inputs, run, *MIXED)
    state = tiny.running(task)
    state.progress.data["fingerprint"] = "another"
    with pytest.raises(ValueError, match=r"is not what this run has read until step 0"):
        task.prepare(state)


def mixed(inputs: Path, run: Path, *overrides: str) -> list[list[float]]:
    """The figures of three steps; seven rows of text do not divide by the ranks."""
    sizes = ["batch=8", "rollout=16", "epochs=2", "micro_batch=2", "at_once=3", "max_new_tokens=6"]
    sizes += ["critic_first=0", "pretraining_mix=2", "parallel.precision=fp32"]
    task = tiny.stage("ppo", inputs, run, *sizes, *overrides)
    assert isinstance(task, PPO)
    state = tiny.running(task)
    batches, found = task.batches(state), []
    for _ in range(3):
        sums = train_step(task, state, next(batches), rate=1e-3)
        state.progress.step += 1
        found.append([sums[name] / sums["weight"] for name in ("loss", "text/loss", "gradient_norm")])
    return found


@on_ranks(1)
def alone(inputs: Path, folder: Path) -> None:
    found = {rows: mixed(inputs, folder, f"pretraining_rows={rows}") for rows in (7, 2)}
    (folder / "alone.json").write_text(json.dumps(found))


@on_ranks(3)
def on_three(inputs: Path, folder: Path) -> None:
    expected = json.loads((folder / "alone.json").read_text())
    for rows, layout in ((7, "parallel=zero3"), (2, "parallel=zero2")):  # two rows: one rank has none
        found = mixed(inputs, folder, f"pretraining_rows={rows}", layout)
        assert_close(torch.tensor(found), torch.tensor(expected[str(rows)]), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_three_ranks_read_and_pay_what_one_does(inputs: Path, tmp_path: Path) -> None:
    alone(inputs=inputs, folder=tmp_path)
    on_three(inputs=inputs, folder=tmp_path)
