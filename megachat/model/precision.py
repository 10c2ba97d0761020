"""In which dtypes to compute: products in what autocast says, sums and exponentials in fp32 at least."""

import torch
from torch import Tensor


def wide(x: Tensor) -> torch.dtype:
    """fp32, or what `x` is if that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def dtype_of_products(x: Tensor) -> torch.dtype:
    """In which autocast, if it is on, would compute a matrix product of `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def as_multiplied(x: Tensor) -> Tensor:
    """`x` in that dtype."""
    return x.to(dtype_of_products(x))
