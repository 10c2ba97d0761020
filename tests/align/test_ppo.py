"""PPO's pieces by hand, and its gradient against the exact one, over all that a tiny policy can say."""

from itertools import pairwise
from math import log

import pytest
import torch
from torch import Tensor, tensor
from torch.testing import assert_close

from megachat.align.advantages import gae
from megachat.align.logprobs import answer_logps, token_logps
from megachat.align.ppo import clipped_policy_loss, clipped_value_loss, held_back, kl_rewards, log_ratio

STOP, SYMBOLS, LENGTH = 0, 4, 3


def sentences(prefix: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    """Everything three symbols and a stop token can say in at most three tokens."""
    if len(prefix) == LENGTH or (prefix and prefix[-1] == STOP):
        return [prefix]
    return [sentence for symbol in range(SYMBOLS) for sentence in sentences((*prefix, symbol))]


class Everything:
    """A policy with its own logits after every prefix: expectations are sums and gradients are exact."""

    def __init__(self, reward_seed: int = 0) -> None:
        """Draws the policy, the reference, the reward and the critic."""
        said = sentences()
        random = torch.Generator().manual_seed(reward_seed)
        prefixes = sorted({sentence[:i] for sentence in said for i in range(len(sentence))})
        self.tokens = tensor([[*sentence, *[0] * (LENGTH - len(sentence))] for sentence in said])
        self.mask = tensor([[i < len(sentence) for i in range(LENGTH)] for sentence in said])
        self.prefix = tensor(
            [
                [prefixes.index(sentence[:i]) if i < len(sentence) else 0 for i in range(LENGTH)]
                for sentence in said
            ]
        )

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, dtype=torch.float64)

        self.policy, self.reference = (
            draw(len(prefixes), SYMBOLS).requires_grad_(),
            draw(len(prefixes), SYMBOLS),
        )
        self.scores, self.critic = draw(len(said)), draw(len(prefixes))

    def logps(self, logits: Tensor) -> Tensor:
        """Per token, of every sentence."""
        return token_logps(logits[self.prefix], torch.where(self.mask, self.tokens, -100))

    def exact(self, coefficient: float) -> Tensor:
        """The gradient of -(E[score] - coefficient * KL(policy || reference))."""
        policy, reference = (answer_logps(self.logps(x), self.mask) for x in (self.policy, self.reference))
        objective = (policy.exp() * (self.scores - coefficient * (policy - reference))).sum()
        return torch.autograd.grad(-objective, self.policy)[0]

    def ppo(self, coefficient: float, critic: bool) -> Tensor:
        """The expected gradient of the first PPO step on sentences sampled from the policy."""
        old, reference = self.logps(self.policy).detach(), self.logps(self.reference)
        values = self.critic[self.prefix] if critic else torch.zeros_like(old)
        rewards = kl_rewards(self.scores, old, reference, self.mask, coefficient)
        advantages, _ = gae(rewards, values, self.mask, gamma=1.0, lam=1.0)
        loss = clipped_policy_loss(self.logps(self.policy), old, advantages, self.mask, clip=0.2).sum(-1)
        weights = answer_logps(old, self.mask).exp()
        return torch.autograd.grad((weights * loss).sum(), self.policy)[0]


def test_the_probabilities_of_everything_that_can_be_said_add_up_to_one():
    world = Everything()
    assert len(world.tokens) == 40  # 1 + 3 * (1 + 3 * 4)
    assert answer_logps(world.logps(world.policy), world.mask).exp().sum().item() == pytest.approx(
        1, abs=1e-12
    )


@pytest.mark.parametrize("critic", [False, True])
@pytest.mark.parametrize("coefficient", [0.0, 0.3])
def test_the_expected_gradient_is_exactly_that_of_reward_minus_kl(coefficient: float, critic: bool):
    world = Everything()
    exact = world.exact(coefficient)
    assert ((world.ppo(coefficient, critic) - exact).norm() / exact.norm()).item() < 1e-12


def test_rewards_are_minus_k1_and_the_score_is_paid_on_the_stop_token():
    mask = tensor([[False, True, True, False], [True, True, True, True]])
    logps = tensor([[torch.nan, -1.0, -2.0, torch.nan], [-1.0, -1.0, -1.0, -1.0]])
    reference = tensor([[0.0, -1.5, -1.0, torch.nan], [-1.0, -1.0, -1.0, -3.0]])
    rewards = kl_rewards(tensor([5.0, -2.0]), logps, reference, mask, coefficient=0.1)
    # k1: .5, -1 and 0, 0, 0, 2
    assert_close(rewards, tensor([[0.0, -0.05, 5.1, 0.0], [0.0, 0.0, 0.0, -2.2]]))


def test_a_row_without_an_action_is_paid_nothing():
    nothing = torch.zeros(1, 3)
    assert_close(kl_rewards(tensor([5.0]), nothing, nothing, torch.zeros(1, 3).bool(), 0.1), nothing)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 1.0, -1.0, -1.0),  # on policy: the plain policy gradient
        (1.0, -1.0, 1.0, 1.0),
        (1.5, 1.0, -1.2, 0.0),  # already far enough the right way: no gradient
        (1.5, -1.0, 1.5, 1.5),  # far the wrong way: pulled back at full strength
        (0.5, 1.0, -0.5, -0.5),
        (0.5, -1.0, 0.8, 0.0),
    ],
)
def test_the_clip_takes_away_gains_and_never_the_way_back(
    ratio: float, advantage: float, loss: float, gradient: float
):
    new, old, on = tensor([[log(ratio)]], requires_grad=True), tensor([[0.0]]), tensor([[True]])
    out = clipped_policy_loss(new, old, tensor([[advantage]]), on, clip=0.2)
    out.sum().backward()
    assert_close(out.detach(), tensor([[loss]]))
    assert_close(new.grad, tensor([[gradient]]))
    assert held_back(new.detach(), old, tensor([[advantage]]), on, clip=0.2).item() is (gradient == 0)


@pytest.mark.parametrize(
    ("value", "loss", "gradient"),
    [
        (1.1, 0.5 * 0.9**2, -0.9),  # within the clip: the plain squared error, old 1, return 2
        (1.5, 0.5 * 0.8**2, 0.0),  # already moved .5 towards the return: held at 1.2
        (0.5, 0.5 * 1.5**2, -1.5),  # away from the return: pulled back
        (3.5, 0.5 * 1.5**2, 1.5),  # past the return by more than the clip would be short of it
    ],
)
def test_the_value_moves_at_most_the_clip_towards_its_return(value: float, loss: float, gradient: float):
    new, on = tensor([[value]], requires_grad=True), tensor([[True]])
    out = clipped_value_loss(new, tensor([[1.0]]), tensor([[2.0]]), on, clip=0.2)
    out.sum().backward()
    assert_close(out.detach(), tensor([[loss]]))
    assert_close(new.grad, tensor([[gradient]]))


def test_nan_in_masked_slots_reaches_neither_the_losses_nor_the_gradients():
    mask = tensor([[True, False]])
    new = tensor([[-1.0, torch.nan]], requires_grad=True)
    noisy = tensor([[-1.0, torch.nan]])
    loss = clipped_policy_loss(new, noisy, noisy, mask, 0.2) + clipped_value_loss(
        new, noisy, noisy, mask, 0.2
    )
    loss.sum().backward()
    assert_close(loss.detach(), tensor([[1.0, 0.0]]))
    assert new.grad is not None
    assert new.grad.isfinite().all()
    assert new.grad[0, 1] == 0


def test_an_absurd_ratio_stays_finite():
    far = log_ratio(tensor([[500.0, -500.0]]), tensor([[0.0, 0.0]]), tensor([[True, True]]))
    assert far.tolist() == [[20.0, -20.0]]


def test_the_policy_climbs_to_the_gibbs_distribution_of_the_reward():
    # One-token answers: the best policy under reward - beta * KL is reference * exp(reward / beta), scaled.
    beta, reference = 0.3, torch.log_softmax(tensor([0.3, -0.7, 1.1, 0.0], dtype=torch.float64), 0)
    scores, on = tensor([0.9, 0.1, 0.4, 0.6], dtype=torch.float64), torch.ones(4, 1).bool()
    logits = reference.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    distances = []
    for _ in range(300):
        new = torch.log_softmax(logits, 0)[:, None]
        old = new.detach()
        rewards = kl_rewards(scores, old, reference[:, None], on, beta)
        advantages = rewards - (old.exp() * rewards).sum()
        loss = (old.exp() * clipped_policy_loss(new, old, advantages, on, 0.2)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        best = torch.softmax(reference + scores / beta, 0)
        distances.append(0.5 * (torch.softmax(logits.detach(), 0) - best).abs().sum().item())
    assert distances[-1] < 1e-3 < distances[0]
    assert all(after <= before + 0.02 for before, after in pairwise(distances[::50]))
