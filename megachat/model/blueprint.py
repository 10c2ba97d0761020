"""A model before it has memory: its modules on the meta device, and where its weights are to be had.

It is cut for a rank while it weighs nothing, and only what the rank will hold is drawn or read. Otherwise a
model that needs a thousand GPUs would have to fit into each of them at the start.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from megachat.model.draws import seed_of

Read = Callable[..., Tensor]
"""`read("weight.<parameter>")` gives a full tensor, `read(name, *slices)` the part that slices, one an axis,
pick."""

Model = TypeVar("Model", bound=nn.Module, covariant=True)


@dataclass(frozen=True)
class Blueprint(Generic[Model]):
    """A model without weights, and the weights."""

    model: Model
    """Parameters are on the meta device; a few small ones may be there, if `read` gives them, too."""
    read: Read

    def whole(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Model:
        """The model itself, from now on with all of its weights."""
        self.model.to(dtype=dtype).to_empty(device=device)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(self.read(f"weight.{name}"))
        return self.model


def drawn(
    model: nn.Module, distribution: Callable[[str], tuple[float, float]], device: torch.device | str
) -> Read:
    """Fresh weights from the mean and deviation of each name: normal, or all the mean where that is 0.

    Each follows from `torch.manual_seed` when this is called and from its name: whole or in parts, on any
    rank, in any order it is the same, on one kind of device.
    """
    seed = int(torch.randint(2**62, ()))
    shapes = {f"weight.{name}": parameter.shape for name, parameter in model.named_parameters()}

    def read(name: str, *index: slice) -> Tensor:
        mean, deviation = distribution(name)
        tensor = torch.full(shapes[name], mean, device=device)
        if deviation:
            generator = torch.Generator(device).manual_seed(seed_of(seed, name))
            tensor.normal_(mean, deviation, generator=generator)
        return tensor[index]

    return read
