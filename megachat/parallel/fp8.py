"""Products of matrices in FP8, by torchao (https://github.com/pytorch/ao).

A GPU that has it multiplies twice as many numbers a second as in bf16, and what is cast costs some of that.
Weights, activations and gradients stay as they are; what goes into a product is scaled and cast for it, and
the product comes out in bf16 again. Weights and activations keep 3 bits after the point (e4m3), gradients 2
and a wider range (e5m2; Micikevicius et al., 2022, https://arxiv.org/abs/2209.05433).
"""

from dataclasses import replace

import torch
from torch import nn

TILE = 16
"""Both sides of a matrix must be multiples of it."""
HOPPER_OR_ADA = (8, 9)
"""The first compute capability with FP8."""


def use_fp8(block: nn.Module, recipe: str, device: torch.device) -> None:
    """Has all linear layers of a block multiply in FP8; their parameters stay the same objects.

    Raises:
        ValueError: torchao is not installed, or a matrix does not fit.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise ValueError(
            f"parallel.fp8={recipe} needs torchao: pip install 'megachat[fp8]', or set parallel.fp8=none"
        ) from None
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) and (module.in_features % TILE or module.out_features % TILE):
            raise ValueError(
                f"parallel.fp8={recipe}: {name} is {module.in_features} x {module.out_features}, and both "
                f"must be multiples of {TILE}; change model.dim, model.hidden or the heads, or set "
                "parallel.fp8=none"
            )
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= HOPPER_OR_ADA
    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=not native)
    convert_to_float8_training(block, config=config)
