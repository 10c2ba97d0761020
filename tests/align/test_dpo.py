"""DPO's loss by hand, and the place it converges to in closed form."""

import shutil
from dataclasses import replace
from math import log
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import full, tensor
from torch.testing import assert_close

from megachat.align.dpo import of_pair
from megachat.align.logprobs import token_logps
from megachat.align.pairs import Pair, collate
from megachat.align.preference import dpo_loss, preference
from megachat.align.rows import Rows, padded
from megachat.align.start import without_dropout
from megachat.config import decode
from megachat.model.cross_entropy import IGNORE
from megachat.tokenizer.tokenizer import Tokenizer
from megachat.train.loop import Task, train_step
from tests.align import tiny
from tests.tiny_model import write_model


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


LOSSES = [("robust",), ("ipo", "loss.beta=1"), ("simpo",), ("orpo",)]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss[0])
def test_every_loss_comes_to_prefer_what_is_preferred(loss: tuple[str, ...], inputs: Path, run: Path):
    chosen = ["epochs=5", "optimizer.lr=1e-3", f"loss={loss[0]}", *loss[1:]]
    tiny.stage("dpo", inputs, run, *tiny.PAIRS, *chosen).execute()
    rows = tiny.rows(run, "dpo")
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["validation/accuracy"] > 0.85
    last = rows[-1]
    assert last["margin"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"], abs=1e-4)


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_a_loss_that_needs_no_reference_loads_none(loss: str, inputs: Path, run: Path):
    task = tiny.stage("dpo", inputs, run, *tiny.PAIRS, f"loss={loss}")
    assert tiny.running(task).frozen == {}
    assert task.along() == 0


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo", "orpo"])
def test_neither_order_nor_company_nor_padding_changes_what_pairs_cost(loss: str, inputs: Path, run: Path):
    task = tiny.stage("dpo", inputs, run, *tiny.PAIRS, f"loss={loss}", "imitation=0.5")
    state = tiny.running(task)
    with torch.no_grad():
        for parameter in state.engines["model"].module.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    pairs = state.data.train[:8]
    together = task.loss(state, collate(pairs, state))
    turned = task.loss(state, collate(pairs[::-1], state))
    singles = [task.loss(state, collate([pair], state)) for pair in pairs]
    rows = padded([pair.chosen for pair in pairs] + [pair.rejected for pair in pairs], state.tokenizer.end)
    wider = [F.pad(x, (0, 3), value=y) for x, y in ((rows.tokens, 0), (rows.labels, IGNORE), (rows.real, 0))]
    beside = task.loss(state, replace(collate(pairs, state), rows=Rows(*wider)))
    for name, value in (together.losses | together.metrics).items():
        assert value.abs() > 1e-3, name
        for other in (turned, beside):
            assert_close((other.losses | other.metrics)[name], value, rtol=1e-5, atol=1e-4)
        alone = sum((one.losses | one.metrics)[name] for one in singles)
        assert_close(alone, value, rtol=1e-5, atol=1e-4)


def test_a_reference_read_beforehand_gives_the_same_losses_to_the_last_bit(inputs: Path, run: Path):
    # 116 pairs or so in batches of 16: the last batch of the first epoch holds some of the second.
    losses = {}
    for reference in ("live", "precomputed"):
        task = tiny.stage("dpo", inputs, run, "batch=16", "micro_batch=5", f"reference={reference}")
        state = tiny.running(task)
        assert list(state.frozen) == (["reference"] if reference == "live" else [])
        batches, losses[reference] = task.batches(state), [task.measure(state)["loss"]]
        assert len(state.data.train) % 16
        for _ in range(len(state.data.train) // 16):
            losses[reference].append(train_step(task, state, next(batches), rate=1e-2)["loss"])
            state.progress.step += 1
    assert losses["precomputed"] == losses["live"]
    assert losses["live"][1] / 16 == pytest.approx(log(2), abs=1e-7)
    assert losses["live"][-1] < losses["live"][1]


def test_a_run_does_not_go_on_with_another_reference(inputs: Path, run: Path, tmp_path: Path):
    own = shutil.copytree(inputs, tmp_path / "own")

    def steps(count: int) -> Task:
        return tiny.stage("dpo", own, run, *tiny.PAIRS, "resume=any", f"max_steps={count}")

    steps(2).execute()
    steps(3).execute()
    shutil.rmtree(own / "sft")
    tokenizer = Tokenizer.load(own / "tokenizer")
    write_model(own / "sft", decode(tiny.SHAPE).build(tokenizer.vocab), tokenizer)
    with pytest.raises(
        ValueError, match="dpo has trained against another reference until step 3: the model of `sft` was"
    ):
        steps(4).execute()
