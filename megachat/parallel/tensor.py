"""How tensor parallelism cuts a model: the table beside it becomes DeepSpeed AutoTP's `partition_config`.

A plan maps parameter-holding modules (`blocks.*.attn.q`, `*` for any number) to one of
`column` (outputs are split: weight rows), `row` (inputs are split: weight columns, results summed),
`replicate-sum` (every rank holds the whole and sees its own heads only, so gradients are summed), or `vocab`
(some of the words: `megachat/model/vocabulary.py`). What is not named stays whole.

The vocabulary is cut here and not by AutoTP, whose output layer has one form, from states to logits, and no
room for a loss that is computed with them; `.github/DECISIONS.md` has the rest.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megachat.model.gpt import GPTConfig
from megachat.model.lora import Adapted
from megachat.parallel.mesh import Mesh, divisors


def partition_config(plan: Mapping[str, str]) -> dict[str, Any]:
    """DeepSpeed's `tensor_parallel.partition_config` for a model's plan.

    Example: {"blocks.*.mlp.down": "row"} -> pattern `^blocks\\.\\d+\\.mlp\\.down\\.weight$`, partition type
    `row`.
    """
    specs: list[dict[str, Any]] = []
    for module, cut in plan.items():
        pattern = f"^{_pattern(module)}\\.weight$"
        if cut in ("column", "row"):
            specs.append({"patterns": [pattern], "partition_type": cut})
        elif cut == "replicate-sum":
            specs.append({"patterns": [pattern], "partition_type": "skip", "grad_allreduce": True})
        else:
            assert cut == "vocab", f"tensor_plan[{module!r}] is {cut!r}"
    return {"use_default_specs": False, "layer_specs": specs}


def cut_by_deepspeed(plan: Mapping[str, str], module: str) -> bool:
    """Whether AutoTP will cut the weight of a module."""
    cuts = [cut for planned, cut in plan.items() if re.fullmatch(_pattern(planned), module)]
    return any(cut in ("column", "row") for cut in cuts)


def plan_of(model: nn.Module) -> dict[str, str]:
    """The plan beside a model; of an adapted one (`megachat.model.lora`), with the parts of its layers.

    The layer's own cut goes through one of the two small matrices. The other is whole, and its gradient is
    the same on every rank: AutoTP sums gradients of the inputs of a `column` layer, and the outputs of a
    `row` layer. What is not trained has no gradients to be summed.
    Example: {"mlp.up": "column"} -> {"mlp.up.base": "column", "mlp.up.expand": "column"}
    """
    plan: dict[str, str] = getattr(model, "tensor_plan", {})
    if not any(isinstance(module, Adapted) for module in model.modules()):
        return plan
    parts = {"column": ("base", "expand"), "row": ("base", "shrink")}
    adapters = {f"{module}.{part}": cut for module, cut in plan.items() for part in parts.get(cut, ())}
    return {module: cut for module, cut in plan.items() if cut != "replicate-sum"} | adapters


def _pattern(module: str) -> str:
    return re.escape(module).replace(r"\*", r"\d+")


def cut_vocabulary(model: nn.Module, plan: Mapping[str, str], mesh: Mesh) -> None:
    """Leaves this tensor rank its words of each module that the plan cuts so, before DeepSpeed takes them."""
    for name, module in model.named_modules():
        if plan.get(name) != "vocab" or mesh.tensor == 1:
            continue
        words = Words(module.weight.shape[0], mesh)
        if words.count < mesh.tensor:
            raise ValueError(
                f"parallel.tensor={mesh.tensor} ranks cannot share a vocabulary of {words.count}"
            )
        weight = module.weight
        weight.data = weight.data[words.own.start : words.own.stop].clone()
        weight.tensor_model_parallel = True  # by which ZeRO 1-3 count it in the gradient norm on every rank
        module.share = words


@dataclass(frozen=True)
class Words:
    """This tensor rank's words of a vocabulary, for `megachat.model.cross_entropy.Share`."""

    count: int
    """Of all ranks."""
    mesh: Mesh

    @property
    def own(self) -> range:
        """Those that are here."""
        return part_of(self.count, self.mesh.tensor_rank, self.mesh.tensor)

    @property
    def most(self) -> int:
        """The most words that one of the ranks has."""
        return -(-self.count // self.mesh.tensor)

    def places(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Where each word is in the weights, and whether it is here."""
        here = (words >= self.own.start) & (words < self.own.stop)
        return (words - self.own.start).clamp(0, len(self.own) - 1), here

    def sum(self, part: Tensor) -> Tensor:
        """Over the tensor ranks."""
        total: Tensor = Sum.apply(part, self.mesh.tensor_group)
        return total

    def copy(self, x: Tensor) -> Tensor:
        """`x`, whose gradients are summed."""
        same: Tensor = _Copy.apply(x, self.mesh.tensor_group)
        return same

    def join(self, part: Tensor) -> Tensor:
        """The last dimension of all ranks, one after another."""
        joined: Tensor = _Join.apply(part, self)
        return joined

    def gather(self, part: Tensor) -> Tensor:
        """What each rank has, one after another."""
        parts = [torch.empty_like(part) for _ in range(self.mesh.tensor)]
        dist.all_gather(parts, part.contiguous(), group=self.mesh.tensor_group)
        return torch.stack(parts)


class Sum(torch.autograd.Function):
    """Of what each rank has, the same on all; its gradient goes to each of them."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        total = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        return slopes[0], None


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        total = slopes[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, words: Words) -> Tensor:
        ctx.own = words.own
        return whole(part, -1, words.count, words.mesh.tensor_group, words.mesh.tensor)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        return slopes[0][..., ctx.own.start : ctx.own.stop], None


def part_of(count: int, rank: int, ranks: int) -> range:
    """Which of `count` a rank has, as equally as they divide. Example: part_of(5, 1, 2) -> range(2, 5)"""
    return range(count * rank // ranks, count * (rank + 1) // ranks)


def check_fits(config: GPTConfig, tensor: int, expert: int) -> None:
    """Raises unless heads and MLP divide evenly, and experts: each rank gets whole ones."""
    if expert > 1 and config.moe is None:
        raise ValueError(
            f"parallel.expert={expert} spreads experts, and the model has none; use 1, or a model.moe"
        )
    if config.moe is not None and config.moe.experts % expert:
        raise ValueError(
            f"parallel.expert={expert} does not divide model.moe.experts={config.moe.experts}; "
            f"use one of {divisors(config.moe.experts)}"
        )
    if tensor > 1 and config.moe is not None:
        raise ValueError(
            f"parallel.tensor={tensor} does not cut the experts of a mixture (model.moe); use "
            "parallel.tensor=1, and parallel.expert to spread experts over data ranks"
        )
    for name in ("heads", "kv_heads", "hidden"):
        if getattr(config, name) % tensor:
            raise ValueError(
                f"parallel.tensor={tensor} does not divide model.{name}={getattr(config, name)}; "
                f"use one of {[n for n in divisors(config.kv_heads) if config.hidden % n == 0]}"
            )


def split_axis(full: torch.Size, local: torch.Size) -> int | None:
    """The axis along which this rank holds a part, or None when it holds the whole."""
    assert len(full) == len(local), f"{tuple(full)} and {tuple(local)} are not the same parameter"
    different = [axis for axis in range(len(full)) if full[axis] != local[axis]]
    assert len(different) <= 1, f"a parameter of shape {tuple(full)} is cut along {different}"
    return different[0] if different else None


def whole(part: Tensor, axis: int | None, count: int, group: Any, ranks: int) -> Tensor:
    """The full tensor of which every rank of a group holds `part`: its share of `count` along `axis`."""
    if axis is None:
        return part
    sizes = [len(part_of(count, rank, ranks)) for rank in range(ranks)]
    shape = [*part.shape]
    shape[axis] = max(sizes)
    padded = part.new_zeros(shape)  # gloo gathers parts of one size only
    padded.narrow(axis, 0, part.shape[axis]).copy_(part)
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([found.narrow(axis, 0, n) for found, n in zip(parts, sizes, strict=True)], dim=axis)
