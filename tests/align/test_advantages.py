"""GAE against numbers worked out by hand, and whitening over everything that is trained on."""

import torch
from torch import tensor
from torch.testing import assert_close

from megachat.align.advantages import gae, whiten

ALL = tensor([[True, True, True]])


def test_gae_by_hand():
    # d2 = 1 - .4 = .6; d1 = 0 + .9*.4 - .2 = .16; d0 = 0 + .9*.2 - .1 = .08; gamma * lam = .45
    # A2 = .6; A1 = .16 + .45*.6 = .43; A0 = .08 + .45*.43 = .2735
    rewards, values = tensor([[0.0, 0.0, 1.0]]), tensor([[0.1, 0.2, 0.4]])
    advantages, returns = gae(rewards, values, ALL, gamma=0.9, lam=0.5)
    assert_close(advantages, tensor([[0.2735, 0.43, 0.6]]))
    assert_close(returns, tensor([[0.3735, 0.63, 1.0]]))


def test_lambda_1_is_the_return_minus_the_value_and_lambda_0_is_one_step():
    rewards, values = tensor([[0.5, -1.0, 2.0]]), tensor([[0.3, 0.7, 0.2]])
    assert_close(gae(rewards, values, ALL, 1.0, 1.0)[0], tensor([[1.5 - 0.3, 1.0 - 0.7, 2.0 - 0.2]]))
    assert_close(
        gae(rewards, values, ALL, 1.0, 0.0)[0], tensor([[0.5 + 0.7 - 0.3, -1.0 + 0.2 - 0.7, 2.0 - 0.2]])
    )


def test_gae_jumps_over_what_the_user_said_between_two_answers():
    # Over the four actions alone: d = 0, 0, 0, .5 with gamma 1, so A = .5 * .95^3, .5 * .95^2, .5 * .95, .5.
    # Resetting at the gap, as OpenRLHF does, gives .341 and .359 for the first two.
    mask = tensor([[True, True, False, False, True, True]])
    values, rewards = tensor([[0.5, 0.5, 0.3, 0.3, 0.5, 0.5]]), tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 1.0]])
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.95)
    assert_close(advantages, tensor([[0.4286875, 0.45125, 0.0, 0.0, 0.475, 0.5]]))
    assert_close(returns, tensor([[0.9286875, 0.95125, 0.0, 0.0, 0.975, 1.0]]))


def test_nothing_follows_the_last_action_whatever_stands_in_the_padding():
    values, rewards = tensor([[0.25, torch.nan, 7.0]]), tensor([[1.0, 9.0, torch.nan]])
    advantages, returns = gae(rewards, values, tensor([[True, False, False]]), gamma=1.0, lam=0.95)
    assert_close(advantages, tensor([[0.75, 0.0, 0.0]]))
    assert_close(returns, tensor([[1.0, 0.0, 0.0]]))


def test_rows_do_not_see_each_other():
    rewards, values = torch.randn(3, 5), torch.randn(3, 5)
    mask = torch.rand(3, 5) < 0.6
    together = gae(rewards, values, mask, 0.99, 0.9)[0]
    alone = [gae(rewards[i : i + 1], values[i : i + 1], mask[i : i + 1], 0.99, 0.9)[0] for i in range(3)]
    assert_close(together, torch.cat(alone))


def test_whitening_is_over_the_unmasked_tokens_of_the_whole_batch():
    # the tokens 1, 3, 5, 7: mean 4, variance (9 + 1 + 1 + 9) / 4 = 5
    x = tensor([[1.0, 3.0, torch.nan], [5.0, -99.0, 7.0]])
    mask = tensor([[True, True, False], [True, False, True]])
    expected = tensor([[-3.0, -1.0, 0.0], [1.0, 0.0, 3.0]]) / 5**0.5
    assert_close(whiten(x, mask), expected)


def test_two_ranks_whiten_as_one_does():
    x, mask = torch.randn(4, 6), torch.rand(4, 6) < 0.7
    parts, masks = x.split([1, 3]), mask.split([1, 3])
    queues: list[list[torch.Tensor]] = []

    def recorder(replies: list[torch.Tensor]):
        """Plays the other rank: adds what it would have sent."""
        sent: list[torch.Tensor] = []
        queues.append(sent)

        def total(summed):
            sent.append(summed)
            return summed + (replies[len(sent) - 1] if len(sent) <= len(replies) else 0)

        return total

    count, mean = mask.sum(), torch.where(mask, x, 0.0).sum() / mask.sum()
    replies = []
    for part, m in zip(parts, masks, strict=True):
        replies.append(
            [
                m.sum().to(x.dtype),
                torch.where(m, part, 0.0).sum(),
                torch.where(m, (part - mean) ** 2, 0.0).sum(),
            ]
        )
    assert sum(reply[0] for reply in replies) == count
    first = whiten(parts[0], masks[0], recorder(replies[1]))
    second = whiten(parts[1], masks[1], recorder(replies[0]))
    assert_close(torch.cat([first, second]), whiten(x, mask), rtol=1e-5, atol=1e-6)


def test_equal_advantages_whiten_to_zero_and_not_to_nan():
    assert_close(
        whiten(torch.full((2, 2), 0.3), torch.ones(2, 2).bool()), torch.zeros(2, 2), atol=1e-3, rtol=0
    )
