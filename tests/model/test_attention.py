"""Attention in blocks, against torch's own of the whole square."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from megachat.model.attention import attend
from megachat.model.gpt import same_document


def example(seq: int, kv_heads: int, dtype: torch.dtype, head_dim: int = 8) -> list[Tensor]:
    torch.manual_seed(0)
    heads = (4, kv_heads, kv_heads)
    # As the model makes them: heads and positions are swapped, so they are not contiguous.
    drawn = [torch.randn(2, seq, count, head_dim, dtype=dtype).transpose(1, 2) for count in heads]
    return [t.detach().requires_grad_() for t in drawn]


def documents(seq: int) -> Tensor:
    """Other lengths in each row, some longer than a block."""
    return torch.stack([torch.arange(seq) // 23, torch.arange(seq) // 150])


@pytest.mark.parametrize("seq", [1, 64, 200])  # 200: three blocks and a part of one, and recomputed
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_results_and_gradients_are_those_of_torch(seq: int, kv_heads: int, masked: bool) -> None:
    inputs = example(seq, kv_heads, torch.float64)
    mask = same_document(documents(seq)) if masked else None
    slope = torch.randn(2, 4, seq, 8, dtype=torch.float64)
    found = attend(*inputs, mask)
    expected = F.scaled_dot_product_attention(*inputs, mask, is_causal=mask is None, enable_gqa=True)
    assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(y, inputs, slope) for y in (found, expected))
    assert_close(ours, theirs)


@pytest.mark.parametrize("head_dim", [8, 64])  # with 64 the probabilities are kept, with 8 computed again
def test_in_bf16_it_is_as_near_to_fp32_as_rounding_lets_it(head_dim: int) -> None:
    inputs = example(200, 2, torch.float32, head_dim)
    exact = attend(*inputs, None)
    half = [t.detach().bfloat16().requires_grad_() for t in inputs]
    rounded = attend(*half, None)
    assert rounded.dtype == torch.bfloat16
    slope = torch.randn_like(exact)
    pairs = zip(
        (exact, *torch.autograd.grad(exact, inputs, slope)),
        (rounded, *torch.autograd.grad(rounded, half, slope.bfloat16())),
        strict=True,
    )
    for true, found in pairs:
        assert (found - true).norm() < 0.02 * true.norm()  # bf16 keeps 8 bits: 0.4 % for each rounding


def test_rows_may_share_a_mask() -> None:
    inputs = example(70, 4, torch.float32)
    assert_close(attend(*inputs, torch.ones(1, 1, 70, 70, dtype=torch.bool).tril()), attend(*inputs, None))


def test_under_autocast_products_are_in_bf16() -> None:
    inputs = example(10, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(*inputs, None).dtype == torch.bfloat16
