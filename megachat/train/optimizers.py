"""Optimizers as settings: AdamW, Adam, SGD, Muon, and which parameters decay."""

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import nn

from megachat.config import Config
from megachat.parallel import muon
from megachat.parallel.engine import newton_schulz

Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Config):
    """Settings that build a torch optimizer."""

    orthogonal: ClassVar[bool] = False
    """Whether the matrices of the blocks are a group apart, marked `muon`."""
    lr: PositiveFloat
    """The peak learning rate; the schedule scales it."""
    weight_decay: NonNegativeFloat
    """Shrinks matrices, not norms and biases, by lr * weight_decay each step."""

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups: matrices, which decay, and vectors, which do not."""
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        matrices = {name: weight for name, weight in trained.items() if weight.ndim >= 2}
        apart = {name for name in matrices if self.orthogonal and ".blocks." in f".{name}"}
        groups: list[dict[str, Any]] = [
            {"params": [matrices[name] for name in matrices if name in apart], "muon": True},
            {"params": [matrices[name] for name in matrices if name not in apart]},
            {"params": [weight for weight in trained.values() if weight.ndim < 2], "weight_decay": 0.0},
        ]
        return [{"weight_decay": self.weight_decay} | group for group in groups if group["params"]]

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer over parameter groups."""
        raise NotImplementedError


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101)."""

    betas: tuple[Beta, Beta]
    """Decay rates of the first and second moment."""
    eps: PositiveFloat
    """Added to the root of the second moment."""

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """`torch.optim.AdamW`, fused: on a CPU, too, that takes a tenth of the time."""
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=_fused(groups))


class Adam(Optimizer):
    """Adam, with weight decay added to the gradient (Kingma and Ba, 2015, https://arxiv.org/abs/1412.6980)."""

    betas: tuple[Beta, Beta]
    """Decay rates of the first and second moment."""
    eps: PositiveFloat
    """Added to the root of the second moment."""

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """`torch.optim.Adam`, fused: on a CPU, too, that takes a tenth of the time."""
        return torch.optim.Adam(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=_fused(groups))


class SGD(Optimizer):
    """Stochastic gradient descent with momentum."""

    momentum: Beta
    """How much of the last step is kept; 0 switches it off."""

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """`torch.optim.SGD`."""
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum)


class Muon(Optimizer):
    """Muon for the matrices of the blocks, AdamW for all else (`megachat.parallel.muon` says why).

    Steps are as large as AdamW's, so `lr` and `weight_decay` are those that AdamW would be given.
    """

    orthogonal: ClassVar[bool] = True
    momentum: Beta
    """How much of the last steps a matrix keeps; Nesterov's form."""
    betas: tuple[Beta, Beta]
    """Of AdamW: decay rates of the first and second moment."""
    eps: PositiveFloat
    """Of AdamW: added to the root of the second moment."""

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Ours, with DeepSpeed's Newton-Schulz iterations."""
        return muon.Muon(groups, self.lr, self.momentum, self.betas, self.eps, _fused(groups), newton_schulz)


def _fused(groups: list[dict[str, Any]]) -> bool:
    """Whether there is one kernel for all that a step does to a parameter."""
    return all(parameter.device.type in ("cuda", "cpu") for group in groups for parameter in group["params"])
