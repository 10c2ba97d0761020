"""The reward model's loss by hand, and where its score is read."""

import json
from collections import defaultdict
from math import exp, log
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from megachat.align.pairs import Ranked, collate, rendered
from megachat.align.rm import bradley_terry, last_score, won
from megachat.align.rows import drawn as order
from megachat.align.rows import padded
from megachat.align.start import scorer
from megachat.data.conversations import Message, Ranking
from megachat.tokenizer.tokenizer import Tokenizer
from megachat.train.loop import Running, Task
from tests.align import tiny


def test_equal_scores_cost_log_2_and_a_lead_of_log_3_means_three_to_one():
    chosen, rejected = tensor([0.7, log(3.0)]), tensor([0.7, 0.0])
    assert_close(bradley_terry(chosen, rejected), tensor([log(2), -log(3 / 4)]))


def test_the_gradient_is_the_probability_of_being_wrong():
    chosen = tensor([2.0], requires_grad=True)
    bradley_terry(chosen, tensor([0.5])).sum().backward()
    assert_close(chosen.grad, tensor([-1 / (1 + exp(1.5))]))


def test_a_hopeless_pair_costs_its_margin_and_not_infinity():
    assert_close(bradley_terry(tensor([-300.0]), tensor([300.0])), tensor([600.0]))


def test_the_score_is_read_at_the_last_real_token_whatever_the_side_of_the_padding():
    scores = tensor([[1.0, 2.0, 3.0, 4.0]])
    for real, expected in [
        ([1, 1, 0, 0], 2.0),
        ([0, 0, 1, 1], 4.0),
        ([1, 1, 1, 1], 4.0),
        ([0, 1, 1, 0], 3.0),
    ]:
        assert last_score(scores, tensor([real]).bool()).tolist() == [expected]


def test_more_padding_does_not_change_the_score():
    scores, real = torch.randn(3, 5), tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 0, 0, 0, 0]]).bool()
    padded = torch.cat([scores, torch.full((3, 4), torch.nan)], 1)
    assert_close(last_score(padded, torch.cat([real, torch.zeros(3, 4).bool()], 1)), last_score(scores, real))


def test_the_models_score_is_that_of_the_answer_alone_however_much_padding_stands_beside_it(
    inputs: Path, run: Path
):
    task = tiny.stage("rm", inputs, run)
    model = task.models(tiny.running(task))["model"].whole().eval()
    tokenizer = Tokenizer.load(inputs / "tokenizer")
    short, long = (
        ([tokenizer.bos, *tokenizer.encode(text), tokenizer.end], [0] * (len(text) + 2))
        for text in ("ab", "abcdefgh")
    )
    with torch.no_grad():
        beside, alone = (
            padded([short, long], tokenizer.end),
            padded([short], tokenizer.pad),
        )  # pad == end is no trap
        first = last_score(model(beside.tokens), beside.real)[0]
        assert_close(first, last_score(model(alone.tokens), alone.real)[0], atol=1e-5, rtol=1e-5)
        assert_close(first, model(torch.tensor([short[0]]))[0, -1], atol=1e-5, rtol=1e-5)


def test_micro_batches_of_one_add_up_to_the_batch(inputs: Path, run: Path):
    task = tiny.stage("rm", inputs, run, *tiny.PAIRS)
    state = tiny.running(task)
    (whole,) = next(task.batches(state))
    pairs = state.data.train
    drawn = [pairs[i] for i in order(len(pairs), task.seed, range(16))]
    singles = [task.loss(state, collate([pair], state)) for pair in drawn]
    together = task.loss(state, whole)
    assert whole.weight == 16
    assert_close(sum(one.losses["model"] for one in singles), together.losses["model"], rtol=1e-4, atol=0)
    assert sum(one.metrics["accuracy"] for one in singles) == together.metrics["accuracy"]


def test_a_tie_is_half_right():
    assert won(tensor([1.0, 2.0, 3.0]), tensor([0.0, 2.0, 4.0])) == 1.5


def test_centring_adds_the_square_of_the_sum(inputs: Path, run: Path):
    plain, centred = (
        tiny.stage("rm", inputs, run, *tiny.PAIRS, f"centring={weight}") for weight in (0.0, 0.5)
    )
    state = tiny.running(plain)
    (batch,) = next(plain.batches(state))
    with torch.no_grad():
        scores = last_score(state.engines["model"](batch.rows.tokens), batch.rows.real)
        more = centred.loss(state, batch).losses["model"] - plain.loss(state, batch).losses["model"]
    assert_close(more, 0.5 * ((scores[:16] + scores[16:]) ** 2).sum(), rtol=1e-4, atol=1e-4)


def test_a_margin_is_what_the_better_answer_must_lead_by():
    # A lead of 2 with a margin of 2 counts as none: log 2; of 2 + log 3 as log 3: log(4 / 3).
    chosen, rejected = tensor([3.0, 3.0 + log(3)]), tensor([1.0, 1.0])
    assert_close(bradley_terry(chosen, rejected, tensor([2.0, 2.0])), tensor([log(2), log(4 / 3)]))


@pytest.mark.parametrize(("smoothing", "expected"), [(0.0, log(4)), (0.1, log(0.74 / 0.26))])
def test_labels_right_eight_times_in_ten_end_at_the_lead_of_the_closed_form(
    smoothing: float, expected: float
):
    # logit(.8) = 1.3863; smoothing .1 leaves .8 * .9 + .2 * .1 = .74 and logit(.74) = 1.0460.
    lead, nothing = torch.zeros(1, requires_grad=True), torch.zeros(1)
    optimizer = torch.optim.LBFGS([lead], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        right = bradley_terry(lead, nothing, smoothing=smoothing)
        value = (0.8 * right + 0.2 * bradley_terry(nothing, lead, smoothing=smoothing)).sum()
        value.backward()
        return value

    optimizer.step(loss)
    assert lead.item() == pytest.approx(expected, abs=1e-3)


def ranked(state: Running, *texts: tuple[str, ...]) -> list[Ranked]:
    """The answers to `ab?`, the best first."""
    one = [Ranking((Message("user", "ab?"),), answers) for answers in texts]
    return rendered(one, state.tokenizer, 24)


def test_of_a_ranking_all_two_answers_are_compared_and_the_prompt_counts_one(inputs: Path, run: Path):
    task = tiny.stage("rm", inputs, run, "centring=0", *tiny.PAIRS)
    state = tiny.running(task)
    three, two = ranked(state, ("abab", "abcd", "a"), ("abab", "hh"))
    batch = collate([three, two], state)
    rows = [row[real].tolist() for row, real in zip(batch.rows.tokens, batch.rows.real, strict=True)]
    assert rows == [
        tokens
        for tokens, _ in (
            *(x.answers[0] for x in (three, two)),
            *(x.answers[1] for x in (three, two)),
            three.answers[2],
        )
    ]
    assert [*zip(batch.better.tolist(), batch.worse.tolist(), strict=True)] == [
        (0, 2),
        (0, 4),
        (2, 4),
        (1, 3),
    ]
    assert_close(batch.share, tensor([1 / 3, 1 / 3, 1 / 3, 1.0]))
    assert (batch.weight, batch.samples) == (2.0, 2)
    pairs = [
        collate(ranked(state, texts), state)
        for texts in (("abab", "abcd"), ("abab", "a"), ("abcd", "a"), ("abab", "hh"))
    ]
    with torch.no_grad():
        alone = [task.loss(state, pair).losses["model"] for pair in pairs]
        together = task.loss(state, batch).losses["model"]
    assert_close(together, sum(alone[:3]) / 3 + alone[3], rtol=1e-4, atol=1e-5)


def test_rankings_and_margins_are_read_and_dpo_takes_them_as_pairs(inputs: Path, run: Path, tmp_path: Path):
    lines = [
        {"prompt": "ab?", "answers": ["abab", "abcd", "a"]},
        {"prompt": "cd?", "chosen": "cdcd", "rejected": "c", "margin": 2},
    ]
    (tmp_path / "ranked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = ["preferences=rankings", f"preferences.path={tmp_path}/ranked.jsonl", "preferences.held_out=0"]
    state = tiny.running(tiny.stage("rm", inputs, run, *source, *tiny.PAIRS))
    assert [(len(one.answers), one.margin) for one in state.data.train] == [(3, 0.0), (2, 2.0)]
    assert collate(state.data.train, state).margin.tolist() == [0.0, 0.0, 0.0, 2.0]
    state = tiny.running(tiny.stage("dpo", inputs, run, *source, *tiny.PAIRS))
    assert [len(one.answers) for one in state.data.train] == [2, 2, 2, 2]
    path = tmp_path / "wrong.jsonl"
    path.write_text('{"prompt": "cd?", "chosen": "cdcd", "rejected": "c", "margin": "large"}\n')
    with pytest.raises(ValueError, match=r"wrong.jsonl:1: expected \"margin\": a number, got 'large'"):
        tiny.running(tiny.stage("rm", inputs, run, f"preferences.path={path}"))


def test_what_scores_are_like_is_saved_with_the_model_and_read_by_who_scores_with_it(inputs: Path, run: Path):
    task = tiny.stage("rm", inputs, run, *tiny.PAIRS, "max_steps=3")
    task.execute()
    read = scorer(task, "rm", tiny.running(task)).model
    state = tiny.running(tiny.stage("ppo", inputs, run, *tiny.ROLLOUTS))
    assert state.frozen["reward"].mean == read.mean
    with torch.no_grad():
        answers = [answer for pair in state_pairs(task) for answer in pair.answers]
        rows = padded(answers, state.tokenizer.pad)
        scores = last_score(state.frozen["reward"](rows.tokens), rows.real).double()
    assert read.mean == pytest.approx(scores.mean().item(), abs=1e-5)
    assert read.deviation == pytest.approx(scores.std(correction=0).item(), rel=1e-4)
    normal = read.normalised(scores)
    assert normal.mean().abs() < 1e-4
    assert normal.std(correction=0).item() == pytest.approx(1.0, rel=1e-3)


def state_pairs(task: Task) -> list[Ranked]:
    pairs: list[Ranked] = tiny.running(task).data.train
    return pairs


@pytest.mark.slow
def test_trl_computes_the_same_loss():
    from trl.trainer.reward_trainer import RewardTrainer

    scores, margin = torch.randn(8, generator=torch.Generator().manual_seed(0)), tensor([0.0, 1.0, 0.5, 2.0])
    gathered = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer: Any = SimpleNamespace(
        model=torch.nn.Identity(), accelerator=gathered, _metrics={"train": defaultdict(list)},
        args=SimpleNamespace(center_rewards_coefficient=0.01), _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    batch = {"margin": margin, "attention_mask": torch.ones(8, 1)}
    theirs = RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=scores[:, None]), batch)
    chosen, rejected = scores.chunk(2)
    ours = bradley_terry(chosen, rejected, margin) + 0.01 * (chosen + rejected) ** 2
    assert_close(ours.mean(), theirs)


def test_it_learns_to_tell_true_answers_from_wrong_and_short_ones(inputs: Path, run: Path):
    task = tiny.stage("rm", inputs, run, *tiny.PAIRS, "epochs=8")
    task.execute()
    rows = tiny.rows(run, "rm")
    assert rows[0]["loss"] == pytest.approx(log(2), abs=0.4)
    assert rows[-1]["validation/accuracy"] > 0.85  # on prompts it has never seen
    assert sum(row["loss"] for row in rows[-10:]) / 10 < 0.3


def test_a_model_that_scores_cannot_be_fine_tuned_to_write(inputs: Path, run: Path):
    with pytest.raises(
        ValueError, match="rm needs a model that writes text; `rm` trained one that scores it"
    ):
        tiny.running(tiny.stage("rm", inputs, run, "start=rm"))
