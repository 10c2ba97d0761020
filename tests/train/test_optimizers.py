"""What each optimizer does to one weight in one step, by hand."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from megachat.model.gpt import GPTConfig
from megachat.model.heads import Scalar
from megachat.parallel.engine import newton_schulz
from megachat.parallel.muon import owners, scaled
from megachat.train.optimizers import SGD, Adam, AdamW, Muon, Optimizer

TINY = GPTConfig(
    dim=8, layers=1, heads=2, kv_heads=1, head_dim=4, hidden=12, context=16,
    rope_base=1e4, moe=None, qk_norm=True, tied=False, norm_eps=1e-6, dropout=0.0,
)  # fmt: skip
MUON = Muon(lr=0.1, weight_decay=0.2, momentum=0.95, betas=(0.9, 0.95), eps=1e-12)


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


def test_newton_schulz_turns_a_rotation_into_itself_but_for_the_polynomials_error() -> None:
    # Both singular values of a 2 x 2 rotation are 1, of the normalised one 1 / sqrt(2). Five times
    # s -> 3.4445 s - 4.775 s^3 + 2.0315 s^5 (Jordan et al.) makes 0.7071 to 0.7034, 0.8717, 0.8600 and so on.
    rotation = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    singular = 0.5**0.5
    for _ in range(5):
        singular = 3.4445 * singular - 4.7750 * singular**3 + 2.0315 * singular**5
    assert_close(newton_schulz(7 * rotation), singular * rotation, rtol=1e-5, atol=1e-6)


def test_a_step_of_muon_is_as_large_as_one_of_adamw() -> None:
    # Two ones in eight numbers: a root mean square of 1/2, times 0.2 * sqrt(4).
    step = scaled(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]))
    assert step.square().mean().sqrt().item() == pytest.approx(0.2)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (8, 8)])
def test_muon_steps_are_torchs(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Linear(*shape, bias=False) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    start = ours.weight.detach().clone()
    groups = [{"params": [ours.weight], "weight_decay": 0.2, "muon": True}]
    optimizers = [
        MUON.build(groups),
        torch.optim.Muon(theirs.parameters(), lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(4):
        gradient = torch.randn_like(ours.weight)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            model.weight.grad = gradient.clone()
            optimizer.step()
    # Theirs iterates in bf16, which has 8 bits.
    assert (ours.weight - theirs.weight).norm() < 0.02 * (ours.weight - start).norm()
    momentum = [optimizer.state_dict()["state"][0]["momentum_buffer"] for optimizer in optimizers]
    assert_close(*momentum)


def test_muon_leaves_vectors_embeddings_and_heads_to_adamw() -> None:
    model = Scalar(TINY.build(11))
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.full_like(parameter, 0.5)
    MUON.build(MUON.groups(model)).step()
    after = {name: value.flatten()[0].item() for name, value in model.named_parameters()}
    # AdamW's first step is 0.1; what decays shrinks by 0.1 * 0.2 before.
    assert after["trunk.embed.weight"] == after["score.weight"] == pytest.approx(0.98 - 0.1)
    assert after["trunk.norm.weight"] == after["score.bias"] == pytest.approx(1 - 0.1)
    groups = MUON.groups(TINY.build(11))
    assert [len(group["params"]) for group in groups] == [7, 2, 5]  # q k v out gate up down; embed, head
    assert [group.get("muon", False) for group in groups] == [True, False, False]


def test_adamw_of_muon_is_torchs() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    plain = AdamW(lr=0.1, weight_decay=0.2, betas=(0.9, 0.95), eps=1e-12)
    pairs = [(ours, MUON.build(MUON.groups(ours))), (theirs, plain.build(plain.groups(theirs)))]
    for _ in range(3):
        x = torch.randn(5, 4)
        for model, optimizer in pairs:
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    assert_close(list(ours.parameters()), list(theirs.parameters()))


def test_muon_passes_over_what_has_no_gradient() -> None:
    model = TINY.build(11)
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = MUON.build(MUON.groups(model))
    optimizer.step()
    assert_close(list(model.parameters()), before, rtol=0, atol=0)
    assert not optimizer.state


def test_each_matrix_is_computed_by_a_rank_that_has_most_of_it_in_turn() -> None:
    assert owners([[4, 2], [3, 3], [3, 3]]) == [0, 1, 0]
    assert owners([[0, 0, 5], [2, 2, 1], [2, 2, 1]]) == [2, 0, 1]
    assert owners([[2, 4]]) == [1]  # half is not enough
    assert owners([[3, 5], [3, 5]]) == [0, 1]
    assert owners([]) == []


def test_the_one_kernel_steps_as_the_many_do() -> None:
    torch.manual_seed(0)
    ours, plain = (nn.Linear(33, 7) for _ in range(2))
    plain.load_state_dict(ours.state_dict())
    settings = AdamW(lr=0.1, weight_decay=0.2, betas=(0.9, 0.95), eps=1e-8)
    fused = settings.build(settings.groups(ours))
    many = torch.optim.AdamW(
        settings.groups(plain), lr=0.1, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False
    )
    assert fused.defaults["fused"]
    for _ in range(5):
        for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        fused.step()
        many.step()
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
