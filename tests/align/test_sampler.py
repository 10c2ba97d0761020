"""A sampler that is not quite the policy: how far it is off is logged, and weights make up for it."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, tensor
from torch.testing import assert_close

from megachat.align import rollout
from megachat.align.rollout import Rollout, as_rows, disagreement
from megachat.align.rows import Rows, padded
from megachat.config import ConfigError
from megachat.model.generate import Written, write
from megachat.train.loop import Running, Task
from tests.align import tiny

STAGES = {"ppo": ["critic_first=0"], "grpo": ["group=4", "rewards=model"]}


def stage(name: str, inputs: Path, run: Path, *overrides: str) -> tuple[Task, Running]:
    sizes = [*tiny.ROLLOUTS, "epochs=1", "batch=32", "micro_batch=32"]
    task = tiny.stage(name, inputs, run, *sizes, *STAGES[name], *overrides)
    return task, tiny.running(task)


@pytest.fixture
def stale(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Running], nn.Module]:
    """Makes a run sample with other weights than it trains."""

    def take(state: Running) -> nn.Module:
        older = copy.deepcopy(state.engines["model"].module)
        with torch.no_grad():
            for weight in older.parameters():
                weight.mul_(1.5)

        def written(_: nn.Module, *arguments: Any) -> Iterator[Written]:
            yield from write(older, *arguments)

        monkeypatch.setattr(rollout, "write", written)
        return older

    return take


def test_the_disagreement_by_hand():
    logps, sampled = tensor([[-1.0, torch.nan], [-2.0, 0.0]]), tensor([[-1.0, 0.0], [-2.0 - log(2), 9.0]])
    figures = disagreement(logps, sampled, tensor([[True, False], [True, False]]))
    assert figures == pytest.approx({"sampler/error": 1.5, "sampler/kl": (2 - 1 - log(2)) / 2}, rel=1e-6)


def test_the_samplers_numbers_stand_where_the_labels_are():
    rows = padded([([1, 2, 3, 4], [0, 1, 0, 1]), ([5, 6], [0, 1])], pad=0)  # a gap, and a shorter row
    assert as_rows([[-1.0, -2.0], [-3.0]], rows).tolist() == [[-1, 0, -2, 0], [-3, 0, 0, 0]]


def test_weights_are_ratios_up_to_the_cap_and_without_a_cap_all_are_one():
    labels = tensor([[5, 6, 7], [8, -100, -100]])
    nothing = torch.zeros(2, 3)
    sampled = tensor([[log(0.5), log(0.5), log(0.5)], [log(0.5), 3.0, 3.0]])
    logps = tensor([[log(0.5), log(0.25), 0.0], [log(0.9), torch.nan, 0.0]])
    scores, rows = torch.zeros(2), Rows(labels, labels, labels > 0)
    made = Rollout(rows, labels[:, 0] > 0, scores, logps, nothing, nothing, nothing, sampled)
    assert_close(made.weights(1.5), tensor([[1, 0.5, 1.5], [1.5, 0, 0]]))
    assert_close(made.weights(None), tensor([[1.0, 1, 1], [1, 0, 0]]))


@pytest.mark.parametrize("name", STAGES)
def test_the_policys_own_sampler_is_off_by_rounding_alone(name: str, inputs: Path, run: Path):
    task, state = stage(name, inputs, run)
    (batch,) = next(task.batches(state))
    assert 1 <= state.notes["sampler/error"] < 1 + 1e-4
    assert 0 <= state.notes["sampler/kl"] < 1e-6
    assert torch.equal(batch.weights, batch.rows.mask.float())


@pytest.mark.parametrize("name", STAGES)
def test_a_sampler_with_other_weights_is_told_and_its_tokens_are_weighed(
    name: str, inputs: Path, run: Path, stale: Callable[[Running], nn.Module]
):
    task, state = stage(name, inputs, run, "importance_cap=1.25")
    older = stale(state)
    (batch,) = next(task.batches(state))
    mask = batch.rows.mask
    with torch.no_grad():
        apart = batch.logps - task.logps(older, batch.rows)
    assert_close(batch.weights, torch.where(mask, apart.exp().clamp(max=1.25), 0.0), rtol=1e-3, atol=1e-4)
    assert batch.weights[mask].max() == 1.25 > batch.weights[mask].min()
    errors = apart[mask].abs().exp().mean().item()
    assert state.notes["sampler/error"] == pytest.approx(errors, rel=1e-3)
    assert errors > 1.05
    assert state.notes["sampler/kl"] > 1e-3


@pytest.mark.parametrize("name", STAGES)
def test_the_loss_of_a_token_counts_its_weight(name: str, inputs: Path, run: Path):
    task, state = stage(name, inputs, run)
    (batch,) = next(task.batches(state))
    weights = 2 * torch.rand_like(batch.logps)
    left = torch.where(torch.arange(weights.shape[1]) < 8, weights, 0.0)  # of the first positions alone
    whole, first, rest = (
        task.loss(state, replace(batch, weights=some)).losses for some in (weights, left, weights - left)
    )
    assert first["model"].item() != 0 != rest["model"].item()
    assert whole["model"].item() == pytest.approx(first["model"].item() + rest["model"].item(), rel=1e-4)
    twice = task.loss(state, replace(batch, weights=2 * weights)).losses
    assert twice["model"].item() == pytest.approx(2 * whole["model"].item(), rel=1e-5)
    if name == "ppo":
        assert twice["critic"].item() == whole["critic"].item()


def test_a_cap_below_one_is_refused(inputs: Path, run: Path):
    with pytest.raises(ConfigError, match="importance_cap"):
        tiny.stage("ppo", inputs, run, *tiny.ROLLOUTS, "importance_cap=0.5")
