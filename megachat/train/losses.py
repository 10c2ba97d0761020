"""What a language model pays for a batch, as sums.

The loop divides by the tokens of the whole step, over all ranks.
"""

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100
"""The label of a position that is not trained on."""


def cross_entropy(
    logits: Float[Tensor, "batch seq vocab"], labels: Int[Tensor, "batch seq"]
) -> Float[Tensor, ""]:
    """The sum of -log p(label) in nats, in fp32, over the positions whose label is not `IGNORE`."""
    return F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )
