"""LoRA: what a matrix learns has a low rank (Hu et al., 2021, https://arxiv.org/abs/2106.09685).

The model stays as it is, and beside each of the chosen matrices W of its blocks two small ones are trained,
from the inputs to `rank` numbers (A, here `shrink`) and from those to the outputs (B, `expand`):
W x + alpha / rank * B A x. B is 0 at first, so that the model computes what it did before.

A checkpoint holds W, A and B one by one, for its run to go on from; whoever reads a model from it reads their
sum, a plain model. Nothing else has to know.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Literal, TypeVar

from jaxtyping import Float
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from megachat.config import Config
from megachat.model.blueprint import Blueprint, Read, drawn
from megachat.model.gpt import GPT, Block

Matrix = Literal["attn.q", "attn.k", "attn.v", "attn.out", "mlp.gate", "mlp.up", "mlp.down"]
Model = TypeVar("Model", bound=nn.Module)


class LoRA(Config):
    """Which matrices learn, and how much of them."""

    rank: PositiveInt
    """Numbers between the two small matrices."""
    alpha: PositiveFloat
    """What they add is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)]
    """The share of their inputs that is dropped while training."""
    modules: Annotated[list[Matrix], Field(min_length=1)]
    """The matrices of each block that learn."""

    @property
    def scale(self) -> float:
        """What the product of the two is multiplied by."""
        return self.alpha / self.rank

    def learnt(self, shrink: Tensor, expand: Tensor) -> Tensor:
        """What both add to their matrix."""
        return self.scale * (expand @ shrink)


class Adapted(nn.Module):
    """A linear layer that stays as it is, and what is learnt beside it.

    `megachat.parallel.tensor.plan_of` says how tensor parallelism cuts its parts.
    """

    def __init__(self, base: nn.Linear, lora: LoRA) -> None:
        super().__init__()
        self.lora = lora
        self.base = base
        self.shrink = nn.Linear(base.in_features, lora.rank, bias=False, device="meta")
        self.expand = nn.Linear(lora.rank, base.out_features, bias=False, device="meta")

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """W x + alpha / rank * B A x"""
        # Tensor ranks that share `x` drop the same places, each of its own part.
        states: Tensor = self.shrink(F.dropout(x, self.lora.dropout, self.training))  # *batch rank
        y: Tensor = self.base(x) + self.lora.scale * self.expand(states)
        return y


def adapted(start: Blueprint[Model], lora: LoRA) -> Blueprint[Model]:
    """The same model, of which only fresh small matrices are trained, and a head other than its own.

    They follow from `torch.manual_seed` now: A is normal, of a deviation that leaves states as large as they
    are, B is 0.

    Raises:
        ValueError: its blocks have no such matrix, which is so of the experts of a mixture.
    """
    model, plain = start.model, {}
    for module in model.modules():
        if isinstance(module, GPT):
            module.requires_grad_(False)
    for prefix, block in [*model.named_modules()]:
        for name in dict.fromkeys(lora.modules) if isinstance(block, Block) else []:
            parent, _, last = name.rpartition(".")
            base = getattr(block.get_submodule(parent), last, None)
            if not isinstance(base, nn.Linear):
                raise ValueError(
                    f"lora.modules: the blocks of this model have no matrix {name}; leave it out"
                )
            setattr(block.get_submodule(parent), last, Adapted(base, lora))
            plain[f"weight.{prefix}.{name}.base.weight"] = f"weight.{prefix}.{name}.weight"
    widths = {f"weight.{name}": weight.shape[1] for name, weight in model.named_parameters() if _small(name)}
    fresh = drawn(
        model, lambda name: (0.0, widths[name] ** -0.5 if ".shrink." in name else 0.0), device="cpu"
    )

    def read(name: str, *index: slice) -> Tensor:
        return fresh(name, *index) if name in widths else start.read(plain.get(name, name), *index)

    return Blueprint(model, read)


def merged(read: Read, lora: LoRA) -> Read:
    """Plain weights, where `read` gives those of an adapted model: W + alpha / rank * B A.

    Of a part, too, the whole product is computed and then cut: its bits are the same in all layouts.
    """
    matrices = "|".join(map(re.escape, lora.modules))
    learnt = re.compile(rf"weight\.(?:trunk\.)?blocks\.\d+\.(?:{matrices})\.weight")

    def plain(name: str, *index: slice) -> Tensor:
        if not learnt.fullmatch(name):
            return read(name, *index)
        layer = name.removesuffix(".weight")
        base, shrink, expand = (f"{layer}.{part}.weight" for part in ("base", "shrink", "expand"))
        return read(base, *index) + lora.learnt(read(shrink), read(expand))[index]

    return plain


def summed(weights: Iterable[tuple[str, Tensor]], lora: LoRA) -> Iterator[tuple[str, Tensor]]:
    """Plain weights, one after the other, of those of an adapted model in its own order."""
    base: Tensor | None = None
    shrink: Tensor | None = None
    for name, weight in weights:
        layer, _, part = name.removesuffix(".weight").rpartition(".")
        if part == "base":
            base = weight
        elif part == "shrink":
            shrink = weight
        elif part == "expand":
            assert base is not None
            assert shrink is not None
            yield f"{layer}.weight", base + lora.learnt(shrink, weight)
        else:
            yield name, weight


def _small(name: str) -> bool:
    return name.endswith((".shrink.weight", ".expand.weight"))
