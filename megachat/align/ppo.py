"""Proximal policy optimisation (Schulman et al., 2017, https://arxiv.org/abs/1707.06347) on a reward model.

The distance to the reference is in the reward, as k1 = log p - log p_reference of the sampled token.
There its gradient is exactly that of the KL-regularised objective;
in the loss k1 has a gradient of 0 and k3 a wrong one.
The stop token is an action like any other, and the reward model's score is paid on it.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


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


def log_ratio(
    new: Float[Tensor, "batch seq"], old: Float[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq"]:
    """How much likelier each action has become in nats, within 20 so that its exponential stays finite."""
    return torch.where(mask, new - old, 0.0).clamp(-20.0, 20.0)


def clipped_policy_loss(
    new: Float[Tensor, "batch seq"],
    old: Float[Tensor, "batch seq"],
    advantages: Float[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    clip: float,
) -> Float[Tensor, "batch seq"]:
    """-min(ratio * A, clipped ratio * A) per action: nothing to gain beyond `clip`, and always a way back."""
    ratio = log_ratio(new, old, mask).exp()
    advantages = torch.where(mask, advantages, 0.0)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def held_back(
    new: Float[Tensor, "batch seq"],
    old: Float[Tensor, "batch seq"],
    advantages: Float[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    clip: float,
) -> Bool[Tensor, "batch seq"]:
    """The actions whose gradient is cut: the ratio has moved beyond `clip` the way the advantage wants."""
    ratio = log_ratio(new, old, mask).exp()
    return mask & (((advantages > 0) & (ratio > 1 + clip)) | ((advantages < 0) & (ratio < 1 - clip)))


def clipped_value_loss(
    new: Float[Tensor, "batch seq"],
    old: Float[Tensor, "batch seq"],
    returns: Float[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    clip: float,
) -> Float[Tensor, "batch seq"]:
    """Half the squared error of the value, or of it held within `clip` of the old: the worse of the two."""
    new, old, returns = (torch.where(mask, x, 0.0) for x in (new, old, returns))
    held = old + (new - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((new - returns) ** 2, (held - returns) ** 2)
