"""How much better each action was than expected: generalised advantage estimation, and whitening.

Schulman et al., 2016, https://arxiv.org/abs/1506.02438. The actions are the trained-on tokens and nothing
else: from the last token of one answer the estimate jumps to the first of the next, over whatever the user
said in between, and after the last action there is nothing.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def gae(
    rewards: Float[Tensor, "batch seq"],
    values: Float[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    gamma: float,
    lam: float,
) -> tuple[Float[Tensor, "batch seq"], Float[Tensor, "batch seq"]]:
    """Advantages, and returns (what the values should have been), both 0.0 at masked positions.

    Example: rewards [0, ?, 1], values [.5, ?, .5], mask [1, 0, 1], gamma 1, lam .5
    -> advantages [.25, 0, .5]: the last is 1 - .5, the first is (.5 - .5) + .5 * .5.
    """
    advantages = torch.zeros_like(values)
    next_value, running = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for position in reversed(range(values.shape[1])):
        here, value = mask[:, position], values[:, position]
        surprise = rewards[:, position] + gamma * next_value - value
        # At a gap both are carried over it, not reset: the next action is the one after the gap.
        running = torch.where(here, surprise + gamma * lam * running, running)
        next_value = torch.where(here, value, next_value)
        advantages[:, position] = torch.where(here, running, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def whiten(
    x: Float[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    total: Callable[[Tensor], Tensor] = lambda summed: summed,
) -> Float[Tensor, "batch seq"]:
    """Mean 0 and variance 1 over the trained-on tokens of the whole batch, 0.0 elsewhere.

    `total` adds a number up over the ranks, so that four ranks with a quarter of the batch each see one mean.
    """
    count = total(mask.sum().to(x.dtype))
    mean = total(torch.where(mask, x, 0.0).sum()) / count
    variance = total(torch.where(mask, (x - mean) ** 2, 0.0).sum()) / count
    return torch.where(mask, (x - mean) * torch.rsqrt(variance + 1e-8), 0.0)
