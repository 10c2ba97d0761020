"""What the tokens that came cost, without the logits of a whole batch ever being in memory.

The output layer and its loss are computed together, some rows at a time, and in training each row's gradient
at once, so that nothing is computed again in the backward pass. 16,384 tokens with 65,536 words of vocabulary
would be 2 GiB of logits in bf16 and twice that for each copy in fp32; a chunk is `LOGITS` of them.

Where ranks share the vocabulary (Shoeybi et al., 2019, https://arxiv.org/abs/1909.08053, section 3) each has
the logits of its own words. They tell each other one number a row: the logarithm of what it would divide by.
"""

from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from megachat.model.precision import as_multiplied, wide

IGNORE = -100
"""The label of a position that is not trained on."""
LOGITS = {"cpu": 2**21, "cuda": 2**27}
"""Logits in one chunk. A CPU works on 8 MiB of fp32 in its cache (a twentieth of a step faster than 32 MiB);
on a GPU a product with fewer rows than some thousand waits for the weight to be read."""


@runtime_checkable
class Share(Protocol):
    """The words of a vocabulary that are here, and what ranks that have others make of theirs.

    Every rank has the same states, and all call these together. All but `gather` pass gradients on.
    """

    @property
    def most(self) -> int:
        """The most words that one of the ranks has."""
        raise NotImplementedError

    def places(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Where each word is in the weights, and whether it is here; some place where it is not."""
        raise NotImplementedError

    def sum(self, part: Tensor) -> Tensor:
        """Of what each rank has made of its own words; what follows from it is the same on all."""
        raise NotImplementedError

    def copy(self, x: Tensor) -> Tensor:
        """`x` itself; each rank is about to make something else of it, so gradients are summed."""
        raise NotImplementedError

    def join(self, part: Tensor) -> Tensor:
        """The last dimension of all words, of which each rank has its own."""
        raise NotImplementedError

    def gather(self, part: Tensor) -> Tensor:
        """What each rank has, one after another."""
        raise NotImplementedError


def cross_entropy(
    x: Float[Tensor, "*batch dim"],
    weight: Float[Tensor, "words dim"],
    labels: Int[Tensor, "*batch"],
    share: Share | None = None,
    scale: Float[Tensor, "*batch"] | None = None,
) -> Float[Tensor, ""]:
    """The sum of -log p(label) in nats, in fp32, over the positions whose label is not `IGNORE`.

    Logits are `x` times `weight`, in the dtype of `x` (or autocast's); log-probabilities are fp32. With
    `share`, `weight` is that of some words, and the sum that over all of them. `scale` multiplies each term.
    """
    scale = None if scale is None else scale.flatten()
    total: Tensor = _Sum.apply(as_multiplied(x.flatten(0, -2)), weight, labels.flatten(), share, scale)
    return total


@torch.no_grad()
def nats(
    x: Float[Tensor, "*batch dim"],
    weight: Float[Tensor, "words dim"],
    labels: Int[Tensor, "*batch"],
    share: Share | None = None,
) -> Float[Tensor, "*batch"]:
    """-log p(label) at each position, in fp32, 0.0 where it is `IGNORE`. Without gradients."""
    rows, (places, here) = as_multiplied(x.flatten(0, -2)), _places(labels.flatten(), share)
    used, size = weight.to(rows.dtype), _rows(weight, share)
    parts = zip(rows.split(size), places.split(size), here.split(size), strict=True)
    found = torch.cat([_nats(_logps(row @ used.T, share), place, own) for row, place, own in parts])
    return (found if share is None else share.sum(found)).view(labels.shape)


class _Sum(torch.autograd.Function):
    """A sum, so that a row's gradient is known, up to one factor, as soon as its logits are."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, share: Share | None, scale: Tensor | None
    ) -> Tensor:
        used, total = weight.to(x.dtype), torch.zeros((), dtype=wide(x), device=x.device)
        training = any(ctx.needs_input_grad)
        x_gradient = torch.empty_like(x) if training else None
        # Without a gradient of its own where it stays as it is (LoRA).
        learns = ctx.needs_input_grad[1]
        weight_gradient = torch.zeros_like(weight, dtype=wide(x)) if learns else None
        places, here = _places(labels, share)
        for first in range(0, len(x), _rows(weight, share)):
            part = slice(first, first + _rows(weight, share))
            row, place, own = x[part], places[part], here[part]
            logps = _logps(row @ used.T, share)
            found = _nats(logps, place, own)
            total += (found if scale is None else found * scale[part]).sum()
            if x_gradient is not None:
                slope = logps.exp_()  # of the loss, by each logit: p(token) - [token is the label]
                slope.scatter_add_(-1, place[:, None], -own[:, None].to(slope.dtype))
                counts = (labels[part] != IGNORE)[:, None]
                slope = slope.mul_(counts if scale is None else counts * scale[part, None]).to(x.dtype)
                torch.mm(slope, used, out=x_gradient[part])
                if weight_gradient is not None:
                    weight_gradient += slope.T @ row
        if share is not None:
            total = share.sum(total)
            x_gradient = None if x_gradient is None else share.sum(x_gradient)
        ctx.save_for_backward(x_gradient, weight_gradient)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *factors: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        x_gradient, weight_gradient = ctx.saved_tensors
        (factor,) = factors
        for_weight = None if weight_gradient is None else (weight_gradient * factor).to(ctx.dtype)
        return x_gradient * factor, for_weight, None, None, None


def rows_at_once(words: int, device: str) -> int:
    """Rows of a chunk: a multiple of 128, the tile of a matrix product."""
    return max(128, LOGITS.get(device, LOGITS["cpu"]) // words // 128 * 128)


def _rows(weight: Tensor, share: Share | None) -> int:
    """On all ranks the same, for they call each other after each chunk."""
    return rows_at_once(len(weight) if share is None else share.most, weight.device.type)


def _places(labels: Int[Tensor, " rows"], share: Share | None) -> tuple[Tensor, Tensor]:
    """Where the weight of each label is, and whether there is a label, and it is here."""
    places, here = (labels, True) if share is None else share.places(labels)
    return places.clamp(min=0), (labels != IGNORE) & here


def _logps(logits: Float[Tensor, "rows words"], share: Share | None) -> Float[Tensor, "rows words"]:
    logits = logits.to(wide(logits))
    if share is None:
        return F.log_softmax(logits, -1)
    divisors = share.gather(logits.logsumexp(-1))  # ranks rows
    return logits.sub_(divisors.logsumexp(0)[:, None])


def _nats(
    logps: Float[Tensor, "rows words"], places: Int[Tensor, " rows"], here: Bool[Tensor, " rows"]
) -> Float[Tensor, " rows"]:
    return torch.where(here, -logps.gather(-1, places[:, None]).squeeze(-1), 0.0)
