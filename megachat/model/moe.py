"""A mixture of experts: many MLPs, of which each token passes through the few that a router picks for it.

As in Mixtral (Jiang et al., 2024, https://arxiv.org/abs/2401.04088): a softmax over the experts' scores, of
which the largest count, made to sum to 1. No token is dropped, however many want the same expert.

Left alone, a router soon sends everything to a few experts, which alone then learn. Two penalties keep it
from that; they are in the gradient of the loss over labels, and not in its value:
- balance (Fedus et al., 2021, https://arxiv.org/abs/2101.03961, section 2.2): experts x the sum over them of
  their share of the picks x their mean probability, 1 when all are even. Of each row by itself, as in
  DeepSeek-V3 (2024, https://arxiv.org/abs/2412.19437, section 2.1.2): a sum over rows is the same however
  they are dealt out to micro-batches and ranks, and what is made of a whole micro-batch is not.
- z (Zoph et al., 2022, https://arxiv.org/abs/2202.08906, section 2.2): the square of the logarithm of the sum
  of exponentials of a token's scores, which keeps the scores small and so exact in bf16.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from megachat.config import Config
from megachat.model.precision import as_multiplied


class MoEConfig(Config):
    """How many experts there are, and how they are picked. Each is an MLP of the model's `hidden`."""

    experts: Annotated[int, Field(ge=2)]
    """MLPs of each block."""
    per_token: PositiveInt
    """Experts that each token passes through."""
    balance: NonNegativeFloat
    """How much uneven use of the experts weighs against the loss; Switch and Mixtral use 0.01 to 0.02."""
    router_z: NonNegativeFloat
    """How much large scores of the router weigh against the loss; ST-MoE uses 0.001."""

    @model_validator(mode="after")
    def _consistent(self) -> "MoEConfig":
        if self.per_token > self.experts:
            raise ValueError(f"per_token={self.per_token} is more than the experts={self.experts} there are")
        return self


def pick(
    scores: Float[Tensor, "tokens experts"], per_token: int
) -> tuple[Float[Tensor, "tokens per_token"], Int[Tensor, "tokens per_token"]]:
    """For each token which experts it passes through, and how much each of them counts, in fp32.

    Example: of scores log([1, 3, 6]) two make weights [6/9, 3/9] of experts [2, 1].
    """
    weights, picked = scores.float().softmax(-1).topk(per_token, -1)
    return weights / weights.sum(-1, keepdim=True), picked


class Experts(nn.Module):
    """SwiGLU MLPs side by side, their matrices stacked."""

    def __init__(self, dim: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(experts, hidden, dim))
        self.up = nn.Parameter(torch.empty(experts, hidden, dim))
        self.down = nn.Parameter(torch.empty(experts, dim, hidden))

    def forward(
        self, x: Float[Tensor, "picks dim"], counts: Int[Tensor, " experts"]
    ) -> Float[Tensor, "picks dim"]:
        """The first `counts[0]` rows through the first expert, the next through the second, and so on."""
        # By hand: autocast does not know the products of a GPU.
        x, *weights = (as_multiplied(tensor) for tensor in (x, self.gate, self.up, self.down))
        compute = together if x.is_cuda and x.dtype == torch.bfloat16 else one_by_one
        return compute(x, counts, *weights)


def one_by_one(x: Tensor, counts: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """What `Experts` computes, each with its own products: on a CPU any one of them fills all cores."""
    parts = zip(x.split(counts.tolist()), gate, up, down, strict=True)
    return torch.cat(
        [F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down) for x, gate, up, down in parts]
    )


def together(x: Tensor, counts: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """What `Experts` computes, in three kernels, without waiting for the counts: on a GPU, in bf16."""
    ends = counts.cumsum(0, dtype=torch.int32)
    gate, up, down = (weight.transpose(1, 2) for weight in (gate, up, down))
    inside = F.silu(torch._grouped_mm(x, gate, offs=ends)) * torch._grouped_mm(x, up, offs=ends)
    return torch._grouped_mm(inside, down, offs=ends)


class MoE(nn.Module):
    """In the place of a block's MLP."""

    def __init__(self, dim: int, hidden: int, config: MoEConfig) -> None:
        super().__init__()
        self.per_token = config.per_token
        self.router = nn.Linear(dim, config.experts, bias=False)
        self.experts = Experts(dim, hidden, config.experts)

    def forward(self, x: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq dim"]:
        """Each token by itself: the weighted sum of what its experts make of it."""
        tokens = x.flatten(0, 1)
        weights, picked = pick(self.router(tokens), self.per_token)
        order = picked.flatten().argsort(stable=True)  # the picks, expert by expert
        counts = picked.flatten().bincount(minlength=self.router.out_features)
        made = self.experts(tokens.index_select(0, order // self.per_token), counts)
        back = made.index_select(0, order.argsort()).unflatten(0, picked.shape)  # tokens per_token dim
        return (back * weights[..., None]).sum(1).to(made.dtype).view_as(x)


@dataclass(frozen=True)
class Routing:
    """What the routers of a model have done."""

    penalty: Tensor
    """To be added to a loss that sums over tokens."""
    load: Tensor
    """How many times the average the busiest expert of a block has to do, in the mean over blocks."""


def routing(
    scores: Float[Tensor, "layers batch seq experts"], counted: Bool[Tensor, "batch seq"], config: MoEConfig
) -> Routing:
    """From all routers' scores, of the tokens that are counted.

    Example: one row whose tokens all have scores log([1, 3, 6]) and one pick each: the balance is 3 x 1 x
    0.6 for every token, the load 3.
    """
    scores = scores.float()
    probabilities = scores.softmax(-1) * counted[..., None]
    picked = scores.topk(config.per_token, -1).indices
    picks = torch.zeros_like(scores).scatter(-1, picked, 1.0) * counted[..., None]
    tokens = counted.sum(-1)[:, None].clamp(min=1)  # of each row
    shares = picks.sum(2) / (config.per_token * tokens)  # layers batch experts
    uneven = config.experts * (shares * probabilities.sum(2)).sum()
    large = (scores.logsumexp(-1).square() * counted).sum()
    work = picks.sum((1, 2))  # layers experts
    load = (work.amax(-1) / work.mean(-1).clamp(min=1e-9)).mean()
    return Routing(config.balance * uneven + config.router_z * large, load.detach())
