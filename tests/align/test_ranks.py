"""Alignment on several ranks: the same losses whatever the layout, and rollouts in every layout."""

import json
from pathlib import Path

import pytest
import torch

from megachat.align.rm import last_score
from megachat.align.rows import padded
from megachat.align.start import scorer
from megachat.train.loop import train_step
from tests.align import tiny
from tests.spawn import on_ranks


def curve(name: str, inputs: Path, run: Path, *overrides: str) -> list[float]:
    """The losses of four steps."""
    sizes = ["batch=8", "micro_batch=2"]
    task = tiny.stage(name, inputs, run, *sizes, *overrides)
    state = tiny.running(task)
    batches = task.batches(state)
    losses = []
    for _ in range(4):
        sums = train_step(task, state, next(batches), rate=1e-2)
        state.progress.step += 1
        losses.append(sums["loss"] / sums["weight"])
    return losses


STAGES = ("sft", "rm", "dpo")


@on_ranks(1)
def one(inputs: Path, folder: Path) -> None:
    (folder / "one.json").write_text(json.dumps({name: curve(name, inputs, folder) for name in STAGES}))


@pytest.fixture(scope="module")
def alone(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the losses of one process."""
    folder = tmp_path_factory.mktemp("ranks")
    one(inputs=inputs, folder=folder)
    return folder


def compare(inputs: Path, alone: Path, run: Path, *overrides: str) -> None:
    expected = json.loads((alone / "one.json").read_text())
    for name in STAGES:
        found = curve(name, inputs, run, *overrides)
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected[name]), rtol=1e-4, atol=0)


@pytest.mark.slow
@on_ranks(2)
def test_two_data_ranks_pay_what_one_process_pays(inputs: Path, alone: Path, run: Path) -> None:
    compare(inputs, alone, run, "parallel=zero1", "parallel.precision=fp32")
    compare(inputs, alone, run, "parallel=zero3", "parallel.precision=fp32")


@pytest.mark.slow
@on_ranks(2)
def test_two_tensor_ranks_pay_what_one_process_pays(inputs: Path, alone: Path, run: Path) -> None:
    compare(inputs, alone, run, "parallel=zero1", "parallel.tensor=2", "parallel.precision=fp32")


def rollouts(inputs: Path, run: Path, *overrides: str) -> None:
    """PPO to its end with its validations and samples, after a look at who has sampled what."""
    settings = [
        "batch=8",
        "micro_batch=4",
        "rollout=16",
        "epochs=2",
        "at_once=3",
        "max_new_tokens=6",
        "rollouts=2",
    ]
    settings += ["validation_prompts=4", "validation_interval=4", "parallel.precision=fp32"]
    task = tiny.stage("ppo", inputs, run, *settings, *overrides)
    state = tiny.running(task)
    torch.manual_seed(state.mesh.rank)  # of no matter: an answer follows from its prompt's number
    (batch, *_) = next(task.batches(state))
    mine = json.dumps(batch.rows.tokens.tolist())
    theirs = state.mesh.gather(mine)
    assert (
        len(set(theirs)) == state.mesh.data
    )  # the ranks that share a model by tensor train on the same answers
    figures = {name: value for name, value in state.notes.items() if not name.startswith("rollout/")}
    assert len(set(state.mesh.gather(json.dumps(figures)))) == 1  # all have the figures of all
    task.execute()
    assert (run / "ppo" / "done.json").is_file()
    assert [row["step"] for row in tiny.rows(run, "ppo")] == list(range(1, 9))


@pytest.mark.slow
@on_ranks(2)
def test_data_ranks_sample_their_own_shares(inputs: Path, run: Path) -> None:
    rollouts(inputs, run, "parallel=zero1")


@pytest.mark.slow
@on_ranks(2)
def test_ranks_that_hold_a_part_of_each_weight_sample_together(inputs: Path, run: Path) -> None:
    rollouts(inputs, run, "parallel=zero3")


@pytest.mark.slow
@on_ranks(2)
def test_tensor_ranks_sample_the_same_answers(inputs: Path, run: Path) -> None:
    rollouts(inputs, run, "parallel=zero1", "parallel.tensor=2")


@pytest.mark.slow
@on_ranks(2)
def test_two_ranks_share_what_the_reference_has_read(inputs: Path, run: Path) -> None:
    sizes = ["batch=9", "micro_batch=2", "parallel=zero3", "parallel.precision=fp32"]
    losses = {}
    for reference in ("live", "precomputed"):
        task = tiny.stage("dpo", inputs, run, *sizes, f"reference={reference}")
        state = tiny.running(task)
        batches, losses[reference] = task.batches(state), [task.measure(state)["loss"]]
        for _ in range(3):
            losses[reference].append(train_step(task, state, next(batches), rate=1e-2)["loss"])
            state.progress.step += 1
    assert losses["precomputed"] == losses["live"]
    assert all(-99 < logp < 0 for pair in state.data.train for logp in pair.reference)  # also of the other's


@pytest.mark.slow
@on_ranks(2)
def test_two_ranks_find_what_the_scores_of_all_answers_are_like(inputs: Path, run: Path) -> None:
    task = tiny.stage("rm", inputs, run, "batch=9", "micro_batch=4", "parallel=zero3", "max_steps=2")
    task.execute()
    state = tiny.running(task)
    model = scorer(task, "rm", state).whole()
    answers = [answer for pair in state.data.train for answer in pair.answers]
    rows = padded(answers, state.tokenizer.pad)
    with torch.no_grad():
        scores = last_score(model(rows.tokens), rows.real).double()
    found = torch.tensor([model.mean, model.deviation], dtype=torch.float64)
    expected = torch.stack([scores.mean(), scores.std(correction=0)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
