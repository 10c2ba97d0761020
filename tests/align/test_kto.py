"""KTO's loss by hand and beside TRL's, its baseline, and that neither depends on how a batch is cut."""

from collections import defaultdict
from math import exp
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from megachat.align.preference import kto_loss
from megachat.config import ConfigError
from megachat.train.loop import Running, Task, train_step
from tests.align import tiny
from tests.spawn import on_ranks


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def test_kto_by_hand():
    # beta .5, baseline 1: a good answer that leads by 3 is 2 nats above it, a bad one 2 below -1.
    leads, good = tensor([3.0, 3.0, -1.0]), tensor([True, False, False])
    expected = [1 - sigmoid(0.5 * 2), 3 * (1 - sigmoid(-0.5 * 2)), 3 * (1 - sigmoid(0.5 * 2))]
    assert_close(kto_loss(leads, good, tensor(1.0), 0.5, 1.0, 3.0), tensor(expected))


def test_the_gradient_is_largest_at_the_baseline_and_points_up_for_good_answers():
    # d/dlead of -sigmoid(beta * lead) at 0: -beta / 4
    leads = tensor([0.0, 0.0, 40.0], requires_grad=True)
    kto_loss(leads, tensor([True, False, True]), tensor(0.0), 0.4, 1.0, 1.0).sum().backward()
    assert leads.grad is not None
    assert_close(leads.grad, tensor([-0.1, 0.1, 0.0]), atol=1e-6, rtol=0)


def test_a_policy_that_is_its_reference_pays_half(inputs: Path, run: Path):
    task, state = started(inputs, run)
    (batch,) = next(task.batches(state))
    result = task.loss(state, batch)
    assert batch.baseline == 0
    assert result.losses["model"].item() == pytest.approx(16 / 2)
    assert result.metrics["accuracy"] == (~batch.good).sum()  # a lead of 0 is not above the baseline


def started(inputs: Path, run: Path, *overrides: str) -> tuple[Task, Running]:
    task = tiny.stage("kto", inputs, run, *tiny.PAIRS, *overrides)
    return task, tiny.running(task)


def disturbed(state: Running) -> None:
    """A policy that has moved."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in state.engines["model"].module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))


def test_the_baseline_is_what_a_step_gains_on_the_answers_to_other_prompts(inputs: Path, run: Path):
    task, state = started(inputs, run, "micro_batch=3")
    disturbed(state)
    step = next(task.batches(state))
    texts = []
    for batch in step:
        for row, other in zip(batch.rows.tokens.tolist(), batch.others.tokens.tolist(), strict=True):
            texts.append([state.tokenizer.decode(tokens).partition("?") for tokens in (row, other)])
    for (own, _, _), (prompt, _, _) in texts:
        assert own == prompt
    answers, others = ([text[which][2] for text in texts] for which in (0, 1))
    assert others == [*answers[1:], answers[0]]  # over the micro-batches' ends
    model, reference = state.engines["model"].module, state.frozen["reference"]
    gained = []
    for batch in step:
        for row in range(batch.samples):
            tokens, labels = batch.others.tokens[row], batch.others.labels[row]
            where = labels != -100
            both = [
                judge(tokens[None]).log_softmax(-1)[0][where].gather(1, labels[where][:, None]).sum()
                for judge in (model, reference)
            ]
            gained.append((both[0] - both[1]).item())
    assert len(gained) == 16
    assert step[0].baseline.item() == pytest.approx(max(0.0, sum(gained) / 16), rel=1e-4)
    assert not step[0].baseline.requires_grad


def test_a_baseline_below_zero_counts_as_zero(inputs: Path, run: Path, monkeypatch: pytest.MonkeyPatch):
    task, state = started(inputs, run)
    monkeypatch.setattr("megachat.align.kto._leads", lambda *_: torch.full((16,), -2.0))
    (batch,) = next(task.batches(state))
    assert batch.baseline == 0


def test_micro_batches_do_not_change_the_loss(inputs: Path, run: Path):
    losses = []
    for size in (16, 5):
        task, state = started(inputs, run, f"micro_batch={size}")
        disturbed(state)
        losses.append(train_step(task, state, next(task.batches(state)), rate=0.0)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_step_of_one_answer_is_refused(inputs: Path, run: Path):
    with pytest.raises(ConfigError, match="batch=1 has no other answer to compare with"):
        tiny.stage("kto", inputs, run, "batch=1")


def test_good_answers_become_likelier_and_bad_ones_less_likely(inputs: Path, run: Path):
    tiny.stage("kto", inputs, run, *tiny.PAIRS, "epochs=6", "optimizer.lr=3e-3").execute()
    last = tiny.rows(run, "kto")[-1]
    assert last["validation/rewards/good"] > last["validation/rewards/bad"] + 0.5
    assert last["validation/accuracy"] > 0.8
    assert last["validation/loss"] < 0.43


@pytest.mark.slow
def test_trl_computes_the_same_loss():
    from trl.trainer.kto_trainer import KTOTrainer

    draw = torch.Generator().manual_seed(3)
    policy, reference = (-9 * torch.rand(2, 6, generator=draw) for _ in range(2))  # answers, others' answers
    reference[1] -= 3.0
    good = tensor([True, False, True, True, False, False])
    alone = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer: Any = SimpleNamespace(
        model=torch.nn.Identity(), accelerator=alone, aux_loss_enabled=False, precompute_ref_logps=True,
        calculate_KL=True, loss_type="kto", beta=0.1, desirable_weight=1.0, undesirable_weight=1.5,
        _compute_kl_logps=lambda *_: policy[1], _metrics={"train": defaultdict(list)},
        _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    logps = policy[0][:, None]
    figures = SimpleNamespace(log_probs=logps, entropy=logps, mean_logits=logps)
    mask = torch.ones(6, 2, dtype=torch.long)
    batch = {
        "input_ids": mask, "attention_mask": mask, "completion_mask": mask, "label": good,
        "ref_logps": reference[0], "ref_KL_logps": reference[1],
    }  # fmt: skip
    theirs = KTOTrainer._compute_loss(trainer, lambda **_: figures, batch, False)
    baseline = (policy[1] - reference[1]).mean().clamp(min=0)
    assert baseline > 0
    ours = kto_loss(policy[0] - reference[0], good, baseline, 0.1, 1.0, 1.5).mean()
    assert_close(ours, theirs, rtol=1e-5, atol=0)


@on_ranks(2)
def on_two(inputs: Path, run: Path, alone: float) -> None:
    assert step_of(inputs, run, "parallel=zero3", "parallel.precision=fp32") == pytest.approx(alone, rel=1e-4)


def step_of(inputs: Path, run: Path, *overrides: str) -> float:
    """The loss of the third step."""
    task, state = started(inputs, run, "micro_batch=3", "batch=9", *overrides)
    batches = task.batches(state)
    for _ in range(3):
        sums = train_step(task, state, next(batches), rate=1e-2)
        state.progress.step += 1
    return sums["loss"] / sums["weight"]


@on_ranks(1)
def on_one(inputs: Path, run: Path) -> None:
    (run / "loss").parent.mkdir(parents=True, exist_ok=True)
    (run / "loss").write_text(str(step_of(inputs, run)))


@pytest.mark.slow
def test_two_data_ranks_pay_what_one_process_pays(inputs: Path, run: Path):
    on_one(inputs=inputs, run=run)
    on_two(inputs=inputs, run=run, alone=float((run / "loss").read_text()))
