"""The loss of a vocabulary, chunk by chunk, against torch's of all logits at once."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from megachat.model import cross_entropy as module
from megachat.model.cross_entropy import IGNORE, cross_entropy, nats
from megachat.model.gpt import GPTConfig


@pytest.fixture(autouse=True)
def chunks_of_128_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOGITS", {"cpu": 1})


def example(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """300 rows, the last chunk of which is not full; every seventh label is not trained on."""
    torch.manual_seed(0)
    x = torch.randn(3, 100, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(50, 16, dtype=dtype, requires_grad=True)
    labels = torch.randint(50, (3, 100))
    labels.view(-1)[::7] = IGNORE
    return x, weight, labels


def plain(x: Tensor, weight: Tensor, labels: Tensor, reduction: str) -> Tensor:
    logits = F.linear(x, weight).float().flatten(0, 1)
    return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction=reduction)


def test_a_uniform_model_costs_log_vocab_for_each_trained_token() -> None:
    labels = torch.tensor([[1, 2, IGNORE]])
    x, weight = torch.zeros(1, 3, 4), torch.ones(7, 4)
    assert cross_entropy(x, weight, labels).item() == pytest.approx(2 * math.log(7))
    assert_close(nats(x, weight, labels), torch.tensor([[math.log(7), math.log(7), 0.0]]))


def test_a_token_of_probability_one_half_costs_log_2_and_of_a_quarter_log_4() -> None:
    weight = torch.tensor([[math.log(1)], [math.log(1)], [math.log(2)]])
    assert_close(
        nats(torch.ones(2, 1), weight, torch.tensor([2, 0])), torch.tensor([math.log(2), math.log(4)])
    )


def test_sums_and_gradients_are_those_of_the_full_logits() -> None:
    x, weight, labels = example(torch.float64)
    found = torch.autograd.grad(cross_entropy(x, weight, labels) * 0.3, (x, weight))
    expected = torch.autograd.grad(plain(x, weight, labels, "sum").double() * 0.3, (x, weight))
    assert_close(cross_entropy(x, weight, labels).float(), plain(x, weight, labels, "sum"))
    assert_close(nats(x, weight, labels).float().flatten(), plain(x, weight, labels, "none"))
    assert_close(found, expected, rtol=1e-5, atol=1e-6)  # that of the full logits was taken in fp32


def test_a_weight_that_is_not_trained_changes_nothing_for_what_is_before_it() -> None:
    x, weight, labels = example(torch.float64)
    (expected,) = torch.autograd.grad(cross_entropy(x, weight, labels), (x,))
    weight.requires_grad_(False)
    cross_entropy(x, weight, labels).backward()
    assert_close(x.grad, expected, rtol=0, atol=0)
    assert weight.grad is None


def test_a_term_counts_as_much_as_its_scale_and_so_does_its_gradient() -> None:
    x, weight, labels = example(torch.float64)
    scale = torch.rand(labels.shape)
    terms = plain(x, weight, labels, "none").double().view(labels.shape)
    expected = torch.autograd.grad((terms * scale).sum() * 0.3, (x, weight))
    found = torch.autograd.grad(cross_entropy(x, weight, labels, scale=scale) * 0.3, (x, weight))
    assert_close(found, expected, rtol=1e-5, atol=1e-6)  # that of the full logits was taken in fp32
    whole = cross_entropy(x, weight, labels, scale=torch.ones(labels.shape))
    assert torch.equal(whole, cross_entropy(x, weight, labels))


def test_in_bf16_gradients_are_no_further_from_fp32_than_those_of_the_full_logits() -> None:
    x, weight, labels = example(torch.float32)
    exact = torch.autograd.grad(plain(x, weight, labels, "sum"), (x, weight))
    half, half_weight = (t.detach().bfloat16().requires_grad_() for t in (x, weight))
    full = torch.autograd.grad(plain(half, half_weight, labels, "sum"), (half, half_weight))
    chunked = torch.autograd.grad(cross_entropy(half, half_weight, labels), (half, half_weight))
    for true, theirs, ours in zip(exact, full, chunked, strict=True):
        assert (ours - true).norm() < 1.05 * (theirs - true).norm()


def test_under_autocast_the_weight_is_fp32_and_the_products_bf16() -> None:
    x, weight, labels = example(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_entropy(x, weight, labels)
        expected = plain(x, weight, labels, "sum")
    assert_close(loss, expected)
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    (theirs,) = torch.autograd.grad(expected, weight)
    assert (weight.grad - theirs).norm() < 0.01 * theirs.norm()


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_given_labels_returns_what_its_logits_cost(tied: bool) -> None:
    sizes = {"dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "hidden": 48, "context": 64}
    model = GPTConfig(
        **sizes, moe=None, rope_base=10000.0, qk_norm=True, tied=tied, norm_eps=1e-6, dropout=0.0
    ).build(300)
    tokens, labels = torch.randint(300, (2, 2, 16))
    labels[0, 3:7] = IGNORE
    each = F.cross_entropy(model(tokens).transpose(1, 2), labels, ignore_index=IGNORE, reduction="none")
    assert_close(model(tokens, labels=labels), each.sum())
    assert_close(model(tokens, labels=labels, where=labels != IGNORE), each.sum())
    assert_close(model(tokens, labels=labels, each=True), each)
