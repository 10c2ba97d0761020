"""Optimizers as settings: AdamW, Adam, SGD, and which parameters decay."""

from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import nn

from megachat.config import Config

Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Config):
    """Settings that build a torch optimizer."""

    lr: PositiveFloat
    """The peak learning rate; the schedule scales it."""
    weight_decay: NonNegativeFloat
    """Shrinks matrices, not norms and biases, by lr * weight_decay each step."""

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Two parameter groups: matrices, which decay, and vectors, which do not."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in trained if parameter.ndim >= 2]
        vectors = [parameter for parameter in trained if parameter.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": self.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

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
        """`torch.optim.AdamW`, fused on a GPU."""
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=_on_gpu(groups))


class Adam(Optimizer):
    """Adam, with weight decay added to the gradient (Kingma and Ba, 2015, https://arxiv.org/abs/1412.6980)."""

    betas: tuple[Beta, Beta]
    """Decay rates of the first and second moment."""
    eps: PositiveFloat
    """Added to the root of the second moment."""

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """`torch.optim.Adam`, fused on a GPU."""
        return torch.optim.Adam(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=_on_gpu(groups))


class SGD(Optimizer):
    """Stochastic gradient descent with momentum."""

    momentum: Beta
    """How much of the last step is kept; 0 switches it off."""

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """`torch.optim.SGD`."""
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum)


def _on_gpu(groups: list[dict[str, Any]]) -> bool:
    return all(parameter.is_cuda for group in groups for parameter in group["params"])
