"""The reward model's loss by hand, and where its score is read."""

from math import exp, log

import torch
from torch import tensor
from torch.testing import assert_close

from megachat.align.rm import bradley_terry, last_score


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
