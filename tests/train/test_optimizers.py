"""What each optimizer does to one weight in one step, by hand."""

import pytest
import torch
from torch import nn

from megachat.train.optimizers import SGD, Adam, AdamW, Optimizer


def stepped(settings: Optimizer) -> tuple[float, float]:
    """A matrix weight and a bias of 1, after one step with gradients of 0.5."""
    model = nn.Linear(1, 1)
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.full_like(parameter, 0.5)
    settings.build(settings.groups(model)).step()
    return model.weight.item(), model.bias.item()


def test_adamw_takes_a_step_of_the_learning_rate_and_decays_matrices_only() -> None:
    # First step of Adam: m / sqrt(v) = sign(g), so -0.1; the matrix first shrinks by 0.1 * 0.2 of itself.
    weight, bias = stepped(AdamW(lr=0.1, weight_decay=0.2, betas=(0.9, 0.95), eps=1e-12))
    assert (weight, bias) == pytest.approx((0.98 - 0.1, 1 - 0.1))


def test_adam_adds_decay_to_the_gradient_which_its_scaling_cancels() -> None:
    weight, bias = stepped(Adam(lr=0.1, weight_decay=0.2, betas=(0.9, 0.95), eps=1e-12))
    assert (weight, bias) == pytest.approx((0.9, 0.9))


def test_sgd_follows_the_gradient() -> None:
    # weight: 1 - 0.1 * (0.5 + 0.2 * 1); bias: 1 - 0.1 * 0.5
    assert stepped(SGD(lr=0.1, weight_decay=0.2, momentum=0.9)) == pytest.approx((0.93, 0.95))
