"""Log-probabilities: against torch's own log-softmax, against numbers by hand, and with NaN about."""

from math import log

import torch
from torch import tensor
from torch.testing import assert_close

from megachat.align.logprobs import answer_logps, entropy, token_logps
from megachat.model.cross_entropy import IGNORE


def test_token_logps_are_those_of_a_softmax_worked_out_by_hand():
    logits = tensor([[log(1.0), log(3.0)], [log(4.0), log(1.0)]])  # softmax: 1/4 3/4, and 4/5 1/5
    assert_close(token_logps(logits, tensor([[1, 1]])), tensor([[log(0.75), log(0.2)]]))


def test_the_temperature_divides_the_logits():
    logits = tensor([[log(1.0), log(9.0)]])  # at temperature 2: square roots, 1 to 3
    assert_close(token_logps(logits, tensor([[1]]), temperature=2.0), tensor([[log(0.75)]]))
    nats = -(0.25 * log(0.25) + 0.75 * log(0.75))
    assert_close(entropy(logits, tensor([[True]]), temperature=2.0), tensor([[nats]]))


def test_logits_go_to_the_positions_with_a_label_and_the_others_are_zero():
    labels = tensor([[IGNORE, 1], [0, IGNORE]])
    logits = tensor([[log(1.0), log(3.0)], [log(4.0), log(1.0)]])
    assert_close(token_logps(logits, labels), tensor([[0.0, log(0.75)], [log(0.8), 0.0]]))


def test_bf16_logits_are_worked_on_in_fp32():
    logits = torch.randn(2, 3, 50).bfloat16()
    labels = torch.randint(0, 50, (2, 3))
    expected = torch.log_softmax(logits.float(), -1).gather(-1, labels[..., None])[..., 0]
    logps = token_logps(logits.flatten(0, 1), labels)
    assert logps.dtype == torch.float32
    assert_close(logps, expected)


def test_a_batch_without_a_single_label_gives_zeros():
    logps = token_logps(torch.randn(0, 5, requires_grad=True), torch.full((2, 3), IGNORE))
    assert_close(logps, torch.zeros(2, 3))
    logps.sum().backward()


def test_an_answer_is_the_sum_of_its_tokens_and_masked_nan_stays_out():
    logps = tensor([[-1.0, torch.nan, -2.5], [-0.5, -0.25, torch.nan]])
    mask = tensor([[True, False, True], [True, True, False]])
    assert_close(answer_logps(logps, mask), tensor([-3.5, -0.75]))


def test_entropy_of_a_fair_choice_is_the_log_of_the_choices_and_an_impossible_token_adds_nothing():
    logits = tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, -torch.inf, -torch.inf]])
    assert_close(entropy(logits, tensor([[True, True, False]])), tensor([[log(4), log(2), 0.0]]))
