"""The mathematics of learning from sampled answers, which PPO and the GRPO family share.

Everything is of plain tensors and per action: one number for each trained-on token, 0.0 elsewhere, whatever
stands there (a NaN in a masked slot reaches neither loss nor gradient). `new` are log-probabilities under the
policy as it is now, `old` under the one that sampled; they are the same at the first step, where every ratio
is 1. What is divided by which total is said by `shares` and `total_of`, for the loop divides a step's sum by
the total over all its micro-batches and all ranks.

Where the distance to the reference goes in, and what its gradient then is, by enumeration of all that a
policy of four symbols can say in three tokens (error relative to KL's exact gradient; tests/align/oracle.py):

    k1 in the reward   0                  `exact` in the loss   0
    k1 in the loss     1: there is none   k2 in the loss        0 of one token, 0.5 to 0.9 of three
    k3 in the loss     0.7 to 0.9, though its value is exact

k2 and k3 forget that a token changes which tokens come after it (Schulman, 2020,
http://joschu.net/blog/kl-approx.html, has their values, which are right).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Level = Literal["token", "answer"]
"""Whose probability a ratio is of: each token's, or the whole answer's."""
Estimator = Literal["k1", "k2", "k3", "exact"]
Mean = Literal["token", "answer", "constant"]
"""What a loss is the mean over: all tokens; answers, each the mean over its tokens; or answers, each the sum
over its tokens divided by a constant."""
Baseline = Literal["none", "group", "others"]
"""What is expected of an answer: nothing; the mean of its group; the mean of the others of its group."""


@dataclass(frozen=True)
class Clip:
    """How far a probability ratio may move."""

    low: float
    """Below 1."""
    high: float
    """Above 1."""
    dual: float | None = None
    """The largest ratio that counts where the advantage is negative (Ye et al., 2020,
    https://arxiv.org/abs/1912.09729): a token that has become far likelier by accident would else weigh
    as much more as it has."""


def log_ratio(
    new: Float[Tensor, "batch seq"],
    old: Float[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    level: Level = "token",
) -> Float[Tensor, "batch seq"]:
    """How much likelier each action has become in nats, within 20 so that its exponential stays finite.

    Of an `answer` it is the mean over its actions, on each of them: the logarithm of GSPO's ratio
    (Zheng et al., 2025, https://arxiv.org/abs/2507.18071).
    """
    moved = torch.where(mask, new - old, 0.0)
    if level == "answer":
        moved = torch.where(mask, moved.sum(-1, keepdim=True) / lengths_of(mask), 0.0)
    return moved.clamp(-20.0, 20.0)


def clipped_policy_loss(
    new: Float[Tensor, "batch seq"],
    old: Float[Tensor, "batch seq"],
    advantages: Float[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    clip: Clip,
    level: Level = "token",
) -> Float[Tensor, "batch seq"]:
    """-min(ratio * A, clipped ratio * A) per action: nothing to gain beyond the clip, always a way back."""
    ratio = log_ratio(new, old, mask, level).exp()
    advantages = torch.where(mask, advantages, 0.0)
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip.low, 1 + clip.high) * advantages)
    if clip.dual is not None:
        gain = torch.where(advantages < 0, torch.maximum(gain, clip.dual * advantages), gain)
    return -gain


def cispo_loss(
    new: Float[Tensor, "batch seq"],
    old: Float[Tensor, "batch seq"],
    advantages: Float[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    clip: Clip,
    level: Level = "token",
) -> Float[Tensor, "batch seq"]:
    """-(clipped ratio, held constant) * A * log p per action: the clip bounds a gradient and cuts none off.

    MiniMax, 2025, https://arxiv.org/abs/2506.13585.
    """
    ratio = log_ratio(new, old, mask, level).exp().clamp(1 - clip.low, 1 + clip.high).detach()
    return -ratio * torch.where(mask, advantages, 0.0) * torch.where(mask, new, 0.0)


def held_back(
    new: Float[Tensor, "batch seq"],
    old: Float[Tensor, "batch seq"],
    advantages: Float[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    clip: Clip,
    level: Level = "token",
) -> Bool[Tensor, "batch seq"]:
    """The actions whose gradient is cut: the ratio has moved beyond the clip the way the advantage wants.

    Where the advantage is negative also those beyond `clip.dual`.
    """
    ratio = log_ratio(new, old, mask, level).exp()
    worse = ratio < 1 - clip.low
    if clip.dual is not None:
        worse = worse | (ratio > clip.dual)
    return mask & (((advantages > 0) & (ratio > 1 + clip.high)) | ((advantages < 0) & worse))


def truncated_weights(
    trained: Float[Tensor, "batch seq"],
    sampled: Float[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    cap: float,
) -> Float[Tensor, "batch seq"]:
    """How much likelier an action is under the weights in training than it was to the sampler, at most `cap`.

    They weigh losses where the sampler is another program, or has older weights (truncated importance
    sampling; Ionides, 2008, https://doi.org/10.1198/106186008X320456). They have no gradient.
    """
    return torch.where(mask, log_ratio(trained, sampled, mask).exp().clamp(max=cap), 0.0).detach()


def divergence(
    new: Float[Tensor, "batch seq"],
    old: Float[Tensor, "batch seq"],
    reference: Float[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    estimator: Estimator,
) -> Float[Tensor, "batch seq"]:
    """An estimate of the KL divergence from the reference per action, to be a term of the loss.

    `exact` is k1 times the ratio of all of the answer up to the action, so that its gradient holds what the
    action makes of those after it, too.
    """
    drift = torch.where(mask, new - reference, 0.0)
    if estimator == "k1":
        return drift
    if estimator == "k2":
        return drift**2 / 2
    if estimator == "k3":
        return torch.expm1(-drift) + drift
    so_far = torch.where(mask, new - old, 0.0).cumsum(-1).clamp(-20.0, 20.0).exp()
    return so_far * drift


def kl_rewards(
    scores: Float[Tensor, " batch"],
    logps: Float[Tensor, "batch seq"],
    reference: Float[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    coefficient: float,
) -> Float[Tensor, "batch seq"]:
    """-coefficient * k1 on every action, and the score of the answer on its last one."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, -1).amax(-1, keepdim=True)
    paid = torch.where(positions == last, scores[:, None], 0.0)
    return torch.where(mask, paid - coefficient * (logps - reference), 0.0)


def to_go(rewards: Float[Tensor, "batch seq"]) -> Float[Tensor, "batch seq"]:
    """What an action is paid and all that come after it."""
    return rewards.flip(-1).cumsum(-1).flip(-1)


def above(
    scores: Float[Tensor, "groups size"], baseline: Baseline, by_deviation: bool = False
) -> Float[Tensor, "groups size"]:
    """How much better each answer was than expected, from the scores of answers to the same prompt.

    `group`, `by_deviation`: GRPO (Shao et al., 2024, https://arxiv.org/abs/2402.03300); not by it: Dr.GRPO
    (Liu et al., 2025, https://arxiv.org/abs/2503.20783). `others`: RLOO (Ahmadian et al., 2024,
    https://arxiv.org/abs/2402.14740), whose expected gradient is exact, where the group's own mean shrinks it
    by 1 - 1/size. Of a group without spread it is 0 exactly.
    Example: above([[1, 0, 0, 1]], "others") -> [[2/3, -2/3, -2/3, 2/3]].
    """
    size = scores.shape[-1]
    if baseline == "none":
        return scores
    better = torch.where(mixed(scores)[:, None], scores - scores.mean(-1, keepdim=True), 0.0)
    if baseline == "others":
        better = better * size / (size - 1)
    return better / (scores.std(-1, keepdim=True) + 1e-6) if by_deviation else better


def mixed(scores: Float[Tensor, "groups size"]) -> Bool[Tensor, " groups"]:
    """Which groups have spread: of the others no answer is better than another, and nothing can be learnt."""
    return scores.amax(-1) > scores.amin(-1)


def overlong(lengths: Int[Tensor, " batch"], longest: int, soft: int) -> Float[Tensor, " batch"]:
    """A penalty from 0 to -1 over the last `soft` tokens before the limit (DAPO; Yu et al., 2025,
    https://arxiv.org/abs/2503.14476). Example: of 90, 95 and 100 tokens, longest=100, soft=10 -> 0, -.5, -1.
    """
    if not soft:
        return torch.zeros(lengths.shape, device=lengths.device)
    return -((lengths - (longest - soft)) / soft).clamp(0.0, 1.0)


def lengths_of(mask: Bool[Tensor, "batch seq"]) -> Int[Tensor, "batch 1"]:
    """The actions of each answer; 1 of a row that has none, so that one may divide by it."""
    return mask.sum(-1, keepdim=True).clamp(min=1)


def shares(mask: Bool[Tensor, "batch seq"], mean: Mean, constant: int = 1) -> Float[Tensor, "batch seq"]:
    """What the loss of each action counts in the sum that `total_of` divides."""
    if mean == "token":
        return mask.float()
    return mask / (lengths_of(mask) if mean == "answer" else constant)


def total_of(mask: Bool[Tensor, "batch seq"], mean: Mean) -> float:
    """What the sum over these answers is of; added up over the whole step and all ranks it is divided by."""
    return float(mask.sum()) if mean == "token" else float(mask.any(-1).sum())


def explained_variance(
    values: Float[Tensor, "batch seq"], returns: Float[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]
) -> float:
    """The share of the returns' variance that the values foresee; below 0 they do worse than a constant."""
    if mask.sum() < 2 or not (spread := returns[mask].double().var()):
        return 0.0
    return 1 - float((returns - values)[mask].double().var() / spread)
