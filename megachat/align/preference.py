"""What a preference between two answers costs: DPO and the losses that followed it.

Each is a function of plain tensors and a block of settings, `loss=dpo` on the command line. What a loss calls
the reward of an answer is what it compares: its loss falls as the reward of `chosen` leaves that of
`rejected` behind. Two of them know no reference; none is loaded for them.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from megachat.align.pairs import Pair
from megachat.config import Config

Share = Annotated[float, Field(ge=0, lt=0.5)]


@dataclass(frozen=True)
class Answers:
    """How likely a model finds whole answers."""

    logps: Float[Tensor, " batch"]
    """Of each answer: a sum over its tokens."""
    tokens: Int[Tensor, " batch"]
    """How many there are, the stop token included."""

    @property
    def mean(self) -> Float[Tensor, " batch"]:
        """The log-probability per token."""
        return self.logps / self.tokens


def preference(
    policy: Pair[Float[Tensor, " batch"]], reference: Pair[Float[Tensor, " batch"]]
) -> Float[Tensor, " batch"]:
    """How much more, in nats, the policy prefers `chosen` to `rejected` than the reference does."""
    return (policy.chosen - policy.rejected) - (reference.chosen - reference.rejected)


def dpo_loss(
    policy: Pair[Float[Tensor, " batch"]],
    reference: Pair[Float[Tensor, " batch"]],
    beta: float,
    smoothing: float = 0.0,
) -> Float[Tensor, " batch"]:
    """-log sigmoid(beta * preference), where a share `smoothing` of the labels is believed to be wrong."""
    margin = beta * preference(policy, reference)
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def robust_loss(
    policy: Pair[Float[Tensor, " batch"]],
    reference: Pair[Float[Tensor, " batch"]],
    beta: float,
    wrong: float,
) -> Float[Tensor, " batch"]:
    """What DPO's loss would be under right labels, on average, when a share `wrong` of them is turned."""
    margin = beta * preference(policy, reference)
    return -((1 - wrong) * F.logsigmoid(margin) - wrong * F.logsigmoid(-margin)) / (1 - 2 * wrong)


def ipo_loss(
    policy: Pair[Float[Tensor, " batch"]], reference: Pair[Float[Tensor, " batch"]], beta: float
) -> Float[Tensor, " batch"]:
    """(preference - 1 / (2 beta))^2, of log-probabilities per token: to lead by that much, and no more."""
    return (preference(policy, reference) - 1 / (2 * beta)) ** 2


def simpo_loss(policy: Pair[Float[Tensor, " batch"]], beta: float, gamma: float) -> Float[Tensor, " batch"]:
    """-log sigmoid(beta * (chosen - rejected) - gamma), of log-probabilities per token."""
    return -F.logsigmoid(beta * (policy.chosen - policy.rejected) - gamma)


def odds_loss(policy: Pair[Float[Tensor, " batch"]]) -> Float[Tensor, " batch"]:
    """-log sigmoid(log(odds of chosen / odds of rejected)), of log-probabilities per token."""
    return -F.logsigmoid(log_odds(policy.chosen) - log_odds(policy.rejected))


def log_odds(logps: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """log(p / (1 - p)), finite also for what is certain.

    log(1 - p) is computed the way that loses no digits on its side of p = 1/2 (Maechler, 2012,
    https://cran.r-project.org/package=Rmpfr, vignette log1mexp).
    """
    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    likely = logps > -math.log(2)
    inside = torch.where(likely, logps, -1.0)  # a branch that is not taken must not have a NaN gradient
    outside = torch.where(likely, -1.0, logps)
    against = torch.where(likely, torch.log(-torch.expm1(inside)), torch.log1p(-torch.exp(outside)))
    return logps - against


def kto_loss(
    leads: Float[Tensor, " batch"],
    good: Bool[Tensor, " batch"],
    baseline: Float[Tensor, ""],
    beta: float,
    desirable: float,
    undesirable: float,
) -> Float[Tensor, " batch"]:
    """weight * (1 - sigmoid(beta * (lead - baseline))) of a good answer, the lead turned round for a bad one.

    `leads`: log(policy / reference) of each answer. Kahneman and Tversky's idea of value: what counts is the
    distance from what one is used to, which is the `baseline`, and ever less the further away it is.
    """
    distance = torch.where(good, leads - baseline, baseline - leads)
    weight = torch.where(good, desirable, undesirable)
    return weight * torch.sigmoid(-beta * distance)


class Objective(Config):
    """What is made small, given how likely the policy and the reference find both answers."""

    compares: ClassVar[bool] = True
    """Whether with a reference. Those that do not are given one that finds every answer equally likely."""

    def cost(self, policy: Pair[Answers], reference: Pair[Answers]) -> Float[Tensor, " batch"]:
        """The loss of each pair."""
        raise NotImplementedError

    def reward(self, policy: Answers, reference: Answers) -> Float[Tensor, " batch"]:
        """What the loss takes the policy to think of each answer."""
        raise NotImplementedError


class DPO(Objective):
    """Direct preference optimisation (Rafailov et al., 2023, https://arxiv.org/abs/2305.18290); with
    `smoothing` its conservative form (Mitchell, 2023, https://ericmitchell.ai/cdpo.pdf).

    Log-probabilities are summed over the answer's tokens, not averaged: so the paper derives it.
    """

    beta: PositiveFloat
    """How hard the policy is held to the reference; the paper uses 0.1 to 0.5."""
    smoothing: Share
    """The share of preference labels believed to be wrong."""

    def cost(self, policy: Pair[Answers], reference: Pair[Answers]) -> Float[Tensor, " batch"]:
        """DPO's loss."""
        return dpo_loss(_summed(policy), _summed(reference), self.beta, self.smoothing)

    def reward(self, policy: Answers, reference: Answers) -> Float[Tensor, " batch"]:
        """beta * log(policy / reference)."""
        return self.beta * (policy.logps - reference.logps)


class Robust(Objective):
    """DPO that undoes what turned labels do to its loss, instead of believing them less
    (Chowdhury et al., 2024, https://arxiv.org/abs/2403.00409)."""

    beta: PositiveFloat
    """How hard the policy is held to the reference."""
    wrong: Share
    """The share of preference labels known to be turned."""

    def cost(self, policy: Pair[Answers], reference: Pair[Answers]) -> Float[Tensor, " batch"]:
        """The unbiased loss, which may be negative."""
        return robust_loss(_summed(policy), _summed(reference), self.beta, self.wrong)

    def reward(self, policy: Answers, reference: Answers) -> Float[Tensor, " batch"]:
        """beta * log(policy / reference)."""
        return self.beta * (policy.logps - reference.logps)


class IPO(Objective):
    """Identity preference optimisation (Azar et al., 2023, https://arxiv.org/abs/2310.12036), which does not
    run away where all labels agree.

    Log-probabilities are per token, which its authors have confirmed to be what they computed, though the
    paper does not say so.
    """

    beta: PositiveFloat
    """The paper's tau: the policy is to prefer `chosen` by 1 / (2 beta) nats per token more than before."""

    def cost(self, policy: Pair[Answers], reference: Pair[Answers]) -> Float[Tensor, " batch"]:
        """The squared distance."""
        return ipo_loss(_mean(policy), _mean(reference), self.beta)

    def reward(self, policy: Answers, reference: Answers) -> Float[Tensor, " batch"]:
        """beta * log(policy / reference) per token."""
        return self.beta * (policy.mean - reference.mean)


class SimPO(Objective):
    """Simple preference optimisation (Meng et al., 2024, https://arxiv.org/abs/2405.14734): the reward is
    what generation maximises, the log-probability per token, and there is no reference to hold it."""

    compares: ClassVar[bool] = False

    beta: PositiveFloat
    """What a nat per token is worth; the paper uses 2 to 10."""
    gamma: NonNegativeFloat
    """By how much `chosen` is to lead; the paper uses 0.3 to 1.6 at beta 2 to 2.5."""

    def cost(self, policy: Pair[Answers], reference: Pair[Answers]) -> Float[Tensor, " batch"]:
        """SimPO's loss."""
        return simpo_loss(_mean(policy), self.beta, self.gamma)

    def reward(self, policy: Answers, reference: Answers) -> Float[Tensor, " batch"]:
        """beta * log-probability per token."""
        return self.beta * policy.mean


class ORPO(Objective):
    """Odds ratio preference optimisation (Hong et al., 2024, https://arxiv.org/abs/2403.07691): imitation of
    `chosen`, and an odds ratio that pushes `rejected` away. It may start from a base model."""

    compares: ClassVar[bool] = False

    odds: NonNegativeFloat
    """The paper's lambda: the weight of the odds ratio beside imitation; it uses 0.1 to 0.25."""

    def cost(self, policy: Pair[Answers], reference: Pair[Answers]) -> Float[Tensor, " batch"]:
        """-log p per token of `chosen`, and the odds ratio's loss."""
        return self.odds * odds_loss(_mean(policy)) - policy.chosen.mean

    def reward(self, policy: Answers, reference: Answers) -> Float[Tensor, " batch"]:
        """The weighted log-odds of a token."""
        return self.odds * log_odds(policy.mean)


def _summed(pair: Pair[Answers]) -> Pair[Tensor]:
    return Pair(pair.chosen.logps, pair.rejected.logps)


def _mean(pair: Pair[Answers]) -> Pair[Tensor]:
    return Pair(pair.chosen.mean, pair.rejected.mean)
