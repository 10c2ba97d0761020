"""All that a tiny policy can say: expectations are sums over 40 answers, and gradients are exact.

No sampling, so no noise: a surrogate loss whose expected gradient is not what its name says is found at once.
"""

import torch
from torch import Tensor, tensor

from megachat.align.advantages import gae
from megachat.align.logprobs import answer_logps, token_logps
from megachat.align.policy import Clip, clipped_policy_loss, kl_rewards

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
        return token_logps(logits[self.prefix[self.mask]], torch.where(self.mask, self.tokens, -100))

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
        loss = clipped_policy_loss(
            self.logps(self.policy), old, advantages, self.mask, clip=Clip(0.2, 0.2)
        ).sum(-1)
        weights = answer_logps(old, self.mask).exp()
        return torch.autograd.grad((weights * loss).sum(), self.policy)[0]

    @property
    def probabilities(self) -> Tensor:
        """Of every sentence under the policy, held constant."""
        return answer_logps(self.logps(self.policy), self.mask).exp().detach()

    def gradient(self, loss: Tensor) -> Tensor:
        """Of a loss of each sentence, or of each of its tokens, expected under the policy."""
        weights = self.probabilities
        return torch.autograd.grad(
            (weights * (loss.sum(-1) if loss.dim() == 2 else loss)).sum(), self.policy
        )[0]

    def divergence(self) -> tuple[float, Tensor]:
        """KL(policy || reference) and its gradient."""
        policy, reference = (answer_logps(self.logps(x), self.mask) for x in (self.policy, self.reference))
        kl = (policy.exp() * (policy - reference)).sum()
        return kl.item(), torch.autograd.grad(kl, self.policy)[0]


def error(found: Tensor, exact: Tensor) -> float:
    """Relative to the exact one's length."""
    return ((found - exact).norm() / exact.norm()).item()
