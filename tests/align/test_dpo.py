"""DPO's loss by hand, and the place it converges to in closed form."""

from math import log
from pathlib import Path

import pytest
import torch
from torch import full, tensor
from torch.testing import assert_close

from megachat.align.dpo import dpo_loss, of_pair, preference
from megachat.align.logprobs import token_logps
from megachat.align.pairs import Pair
from megachat.align.rows import padded
from megachat.align.start import without_dropout
from megachat.train.loop import train_step
from tests.align import tiny


def test_dpo_is_log_2_when_policy_equals_reference():
    same = Pair(chosen=tensor([-1.0, -9.0]), rejected=tensor([-2.0, -3.0]))
    assert_close(dpo_loss(same, same, beta=0.1), full((2,), log(2)), rtol=0, atol=0)


def test_dpo_by_hand():
    # the policy prefers by -1 + 4 = 3, the reference by -2 + 2.5 = .5: 2.5 nats more; -log sigmoid(.2 * 2.5)
    policy, reference = Pair(tensor([-1.0]), tensor([-4.0])), Pair(tensor([-2.0]), tensor([-2.5]))
    assert_close(preference(policy, reference), tensor([2.5]))
    assert_close(dpo_loss(policy, reference, beta=0.2), tensor([0.4740769841801067]))
    smoothed = 0.9 * 0.4740769841801067 + 0.1 * 0.9740769841801067
    assert_close(dpo_loss(policy, reference, beta=0.2, smoothing=0.1), tensor([smoothed]))


@pytest.mark.parametrize(("smoothing", "margin"), [(0.0, 13.8629436), (0.1, 10.4596856)])
def test_labels_right_eight_times_in_ten_end_at_the_margin_of_the_closed_form(
    smoothing: float, margin: float
):
    # .8 L(h) + .2 L(-h) is least where sigmoid(beta h) is the share of labels that are believed:
    # h = logit(.8) / .1 = 13.8629; smoothing .1 leaves .8 * .9 + .2 * .1 = .74, logit(.74) / .1 = 10.4597.
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    reference = tensor([-1.3, -0.4], dtype=torch.float64)
    optimizer = torch.optim.LBFGS(
        [logits], lr=1, max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        logps = torch.log_softmax(logits, 0)
        policy, kept = Pair(logps[:1], logps[1:]), Pair(reference[:1], reference[1:])
        turned = [Pair(pair.rejected, pair.chosen) for pair in (policy, kept)]
        value = 0.8 * dpo_loss(policy, kept, 0.1, smoothing) + 0.2 * dpo_loss(
            turned[0], turned[1], 0.1, smoothing
        )
        value.sum().backward()
        return value.sum()

    optimizer.step(loss)
    reached = (logits[0] - logits[1]).detach() - (reference[0] - reference[1])
    assert reached.item() == pytest.approx(margin, abs=1e-3)


def test_an_answer_counts_all_its_tokens_with_the_stop_and_none_of_the_prompts(inputs: Path, run: Path):
    task = tiny.stage("dpo", inputs, run)
    state = tiny.running(task)
    pair = state.data.train[0]
    for tokens, mask in (pair.chosen, pair.rejected):
        answer = [token for token, trained in zip(tokens, mask, strict=True) if trained]
        assert answer[-1] == state.tokenizer.end
        asked = state.tokenizer.decode(tokens[: -len(answer)])
        assert asked.endswith("?")
        assert state.tokenizer.decode(answer) in (tiny.answer(asked), tiny.wrong(asked), asked[:2])


def test_the_first_half_of_a_batch_is_the_chosen_one():
    # Four symbols, all equally likely: an answer of three tokens has -3 log 4, one of a single token -log 4.
    rows = padded([([1, 2, 3, 0], [0, 1, 1, 1]), ([1, 2], [0, 1])], pad=0)
    pair = of_pair(lambda tokens, where: torch.zeros(where.sum(), 4), rows)
    assert_close(pair.chosen, tensor([-3 * log(4)]))
    assert_close(pair.rejected, tensor([-log(4)]))


def test_imitation_adds_what_a_token_of_the_chosen_answer_costs(inputs: Path, run: Path):
    task = tiny.stage("dpo", inputs, run, *tiny.PAIRS, "imitation=2")
    state = tiny.running(task)
    (batch,) = next(task.batches(state))
    result = task.loss(state, batch)
    with torch.no_grad():
        logits = state.engines["model"](batch.rows.tokens)[batch.rows.mask]
        logps = token_logps(logits, batch.rows.labels)[:16]
    tokens = (logps != 0).sum(-1)
    assert_close(result.losses["model"], 16 * log(2) - 2 * (logps.sum(-1) / tokens).sum())


def test_the_first_loss_is_log_2_exactly_and_the_reference_never_moves(inputs: Path, run: Path):
    task = tiny.stage("dpo", inputs, run, *tiny.PAIRS)
    state = tiny.running(task)
    before = {name: value.clone() for name, value in state.frozen["reference"].named_parameters()}
    batches = task.batches(state)
    losses = []
    for _ in range(3):
        sums = train_step(task, state, next(batches), rate=1e-2)
        losses.append(sums["loss"] / sums["weight"])
        state.progress.step += 1
    assert losses[0] == pytest.approx(log(2), abs=1e-7)
    assert losses[2] < 0.69
    for name, value in state.frozen["reference"].named_parameters():
        assert torch.equal(value, before[name])
        assert value.grad is None


def test_a_model_trained_with_dropout_starts_at_log_2_too(inputs: Path, run: Path):
    task = tiny.stage("dpo", inputs, run, *tiny.PAIRS)
    state = tiny.running(task)
    for block in state.engines["model"].module.blocks:
        block.dropout = 0.5
    without_dropout(state.engines["model"].module)
    (batch,) = next(task.batches(state))
    assert task.loss(state, batch).losses["model"].item() / 16 == pytest.approx(log(2), abs=1e-7)


def test_it_comes_to_prefer_what_is_preferred(inputs: Path, run: Path):
    task = tiny.stage("dpo", inputs, run, *tiny.PAIRS, "epochs=8", "optimizer.lr=1e-3")
    task.execute()
    rows = tiny.rows(run, "dpo")
    assert rows[0]["loss"] == pytest.approx(log(2), abs=1e-6)
    assert rows[0]["margin"] == 0
    assert rows[-1]["validation/accuracy"] > 0.85
    assert rows[-1]["validation/loss"] < 0.5
