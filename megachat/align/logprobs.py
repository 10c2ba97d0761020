"""How likely a model finds tokens: per token, per answer, and how undecided it is (entropy).

Everything is computed in fp32 at least, and only at the positions that count: the model is asked for no other
logits (`where=labels != IGNORE`), which saves most of the memory and a good part of the time, and a NaN in a
masked slot reaches neither loss nor gradient. (Multiplying by a mask would not do: NaN * 0 is NaN.)
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from megachat.model.cross_entropy import IGNORE
from megachat.model.precision import wide


def token_logps(
    logits: Float[Tensor, "chosen vocab"], labels: Int[Tensor, "batch seq"], temperature: float = 1.0
) -> Float[Tensor, "batch seq"]:
    """log p(label) at each position, 0.0 where the label is `IGNORE`. Labels are already shifted.

    `logits` are those of the positions with a label, row by row. `temperature` is what the tokens were
    sampled at; at another, these are not the sampler's probabilities.
    """
    counts = labels != IGNORE
    logps = -F.cross_entropy(_wide(logits) / temperature, labels[counts], reduction="none")
    return logps.new_zeros(labels.shape).masked_scatter(counts, logps)


def answer_logps(
    logps: Float[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]
) -> Float[Tensor, " batch"]:
    """The log-probability of each whole answer: a sum, not a mean, over its tokens."""
    return torch.where(mask, logps, 0.0).sum(-1)


def entropy(
    logits: Float[Tensor, "chosen vocab"], mask: Bool[Tensor, "batch seq"], temperature: float = 1.0
) -> Float[Tensor, "batch seq"]:
    """The entropy in nats of the next token at each position of the mask, 0.0 elsewhere.

    `logits` are those of the positions in the mask, row by row.
    """
    logps = F.log_softmax(_wide(logits) / temperature, dim=-1)
    # exp(-inf) * -inf is NaN, its limit is 0: a token of probability 0 adds nothing.
    nats = -torch.where(logps.isneginf(), 0.0, logps.exp() * logps).sum(-1)
    return nats.new_zeros(mask.shape).masked_scatter(mask, nats)


def _wide(logits: Tensor) -> Tensor:
    """In bf16 a log-probability of -20 is off by up to 0.06, and PPO exponentiates differences of them."""
    return logits.to(wide(logits))
