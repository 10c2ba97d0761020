"""What the tokens that came cost, without the logits of a whole batch ever being in memory.

The output layer and its loss are computed together, some rows at a time, and in training each row's gradient
at once, so that nothing is computed again in the backward pass. 16,384 tokens with 65,536 words of vocabulary
would be 2 GiB of logits in bf16 and twice that for each copy in fp32; a chunk is `LOGITS` of them.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from megachat.model.precision import as_multiplied, wide

IGNORE = -100
"""The label of a position that is not trained on."""
LOGITS = {"cpu": 2**21, "cuda": 2**27}
"""Logits in one chunk. A CPU works on 8 MiB of fp32 in its cache (a twentieth of a step faster than 32 MiB);
on a GPU a product with fewer rows than some thousand waits for the weight to be read."""


def cross_entropy(
    x: Float[Tensor, "*batch dim"], weight: Float[Tensor, "vocab dim"], labels: Int[Tensor, "*batch"]
) -> Float[Tensor, ""]:
    """The sum of -log p(label) in nats, in fp32, over the positions whose label is not `IGNORE`.

    Logits are `x` times `weight`, in the dtype of `x` (or autocast's); log-probabilities are fp32.
    """
    total: Tensor = _Sum.apply(as_multiplied(x.flatten(0, -2)), weight, labels.flatten())
    return total


@torch.no_grad()
def nats(
    x: Float[Tensor, "*batch dim"], weight: Float[Tensor, "vocab dim"], labels: Int[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """-log p(label) at each position, in fp32, 0.0 where it is `IGNORE`. Without gradients."""
    rows, wanted = as_multiplied(x.flatten(0, -2)), labels.flatten()
    used = weight.to(rows.dtype)
    pairs = zip(rows.split(rows_at_once(weight)), wanted.split(rows_at_once(weight)), strict=True)
    return torch.cat([_nats(_logps(row @ used.T), label) for row, label in pairs]).view(labels.shape)


class _Sum(torch.autograd.Function):
    """A sum, so that a row's gradient is known, up to one factor, as soon as its logits are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        used, total = weight.to(x.dtype), torch.zeros((), dtype=wide(x), device=x.device)
        training = any(ctx.needs_input_grad)
        x_gradient = torch.empty_like(x) if training else None
        weight_gradient = torch.zeros_like(weight, dtype=wide(x)) if training else None
        for first in range(0, len(x), rows_at_once(weight)):
            part = slice(first, first + rows_at_once(weight))
            row, label = x[part], labels[part]
            logps = _logps(row @ used.T)
            total += _nats(logps, label).sum()
            if x_gradient is not None and weight_gradient is not None:
                slope = logps.exp_()  # of the loss, by each logit: p(token) - [token is the label]
                slope.scatter_add_(-1, label.clamp(min=0)[:, None], -torch.ones_like(slope[:, :1]))
                slope = slope.mul_((label != IGNORE)[:, None]).to(x.dtype)
                torch.mm(slope, used, out=x_gradient[part])
                weight_gradient += slope.T @ row
        ctx.save_for_backward(x_gradient, weight_gradient)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *factors: Tensor) -> tuple[Tensor, Tensor, None]:
        x_gradient, weight_gradient = ctx.saved_tensors
        (factor,) = factors
        return x_gradient * factor, (weight_gradient * factor).to(ctx.dtype), None


def rows_at_once(weight: Tensor) -> int:
    """Rows of a chunk: a multiple of 128, the tile of a matrix product."""
    return max(128, LOGITS.get(weight.device.type, LOGITS["cpu"]) // len(weight) // 128 * 128)


def _logps(logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
    return F.log_softmax(logits.to(wide(logits)), -1)


def _nats(logps: Float[Tensor, "rows vocab"], labels: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    found = -logps.gather(-1, labels.clamp(min=0)[:, None]).squeeze(-1)
    return torch.where(labels == IGNORE, 0.0, found)
