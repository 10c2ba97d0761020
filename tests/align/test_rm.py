"""The reward model's loss by hand, and where its score is read."""

from math import exp, log
from pathlib import Path

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from megachat.align.pairs import collate
from megachat.align.rm import bradley_terry, last_score, won
from megachat.align.rows import drawn as order
from megachat.align.rows import padded
from megachat.tokenizer.tokenizer import Tokenizer
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
