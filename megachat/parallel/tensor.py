"""How tensor parallelism cuts a model: the table beside it becomes DeepSpeed AutoTP's `partition_config`.

A plan maps parameter-holding modules (`blocks.*.attn.q`, `*` for any number) to one of
`column` (outputs are split: weight rows), `row` (inputs are split: weight columns, results summed), or
`replicate-sum` (every rank holds the whole and sees its own heads only, so gradients are summed).
What is not named stays whole.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megachat.model.gpt import GPTConfig
from megachat.parallel.mesh import Mesh, divisors


def partition_config(plan: Mapping[str, str]) -> dict[str, Any]:
    """DeepSpeed's `tensor_parallel.partition_config` for a model's plan.

    Example: {"blocks.*.mlp.down": "row"} -> pattern `^blocks\\.\\d+\\.mlp\\.down\\.weight$`, partition type
    `row`.
    """
    specs: list[dict[str, Any]] = []
    for module, cut in plan.items():
        pattern = "^" + re.escape(module).replace(r"\*", r"\d+") + r"\.weight$"
        if cut in ("column", "row"):
            specs.append({"patterns": [pattern], "partition_type": cut})
        else:
            assert cut == "replicate-sum", f"tensor_plan[{module!r}] is {cut!r}"
            specs.append({"patterns": [pattern], "partition_type": "skip", "grad_allreduce": True})
    return {"use_default_specs": False, "layer_specs": specs}


def check_fits(config: GPTConfig, tensor: int) -> None:
    """Raises unless heads and MLP divide evenly: each rank gets whole heads."""
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


def whole(part: Tensor, axis: int | None, mesh: Mesh) -> Tensor:
    """The full tensor of which every tensor rank holds `part`."""
    if axis is None:
        return part
    parts = [torch.empty_like(part) for _ in range(mesh.tensor)]
    dist.all_gather(parts, part.contiguous(), group=mesh.tensor_group)
    return torch.cat(parts, dim=axis)
