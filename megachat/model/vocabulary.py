"""The two ends of a model, where numbers stand for words: the embedding and the output layer.

Both may hold some of the words only, when ranks share the vocabulary (Shoeybi et al., 2019,
https://arxiv.org/abs/1909.08053, section 3). What the other ranks make of theirs comes through `share`; a
model that is whole has none.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from megachat.model.cross_entropy import Share, cross_entropy, nats


class Embedding(nn.Embedding):
    """The state that each token begins with."""

    share: Share | None = None
    """Which words are here; None: all."""

    def forward(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        """Looked up where the word is; the other ranks add zeros."""
        if self.share is None:
            return super().forward(tokens)
        places, here = self.share.places(tokens)
        return self.share.sum(torch.where(here[..., None], super().forward(places), 0.0))


class Output(nn.Linear):
    """The logits of states, or what the tokens that came cost (`cross_entropy`, `nats`)."""

    share: Share | None = None
    """Which words are here; None: all."""

    def forward(
        self,
        x: Float[Tensor, "*batch dim"],
        labels: Int[Tensor, "*batch"] | None = None,
        each: bool = False,
        scale: Float[Tensor, "*batch"] | None = None,
    ) -> Tensor:
        """With `labels` their sum, each times its `scale`; with `each`, which has no gradient, one by one."""
        return output(x, self.weight, labels, each, self.share, scale)


def output(
    x: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    each: bool,
    share: Share | None,
    scale: Tensor | None = None,
) -> Tensor:
    """What `Output` computes, with whatever weight."""
    if labels is not None:
        assert scale is None or not each, "terms are not scaled, their sum is"
        return nats(x, weight, labels, share) if each else cross_entropy(x, weight, labels, share, scale)
    if share is None:
        return F.linear(x, weight)
    return share.join(F.linear(share.copy(x), weight))
