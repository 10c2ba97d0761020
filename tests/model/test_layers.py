"""The cache, and rotations; attention as a whole is compared with other implementations in test_gpt.py."""

import math

import pytest
import torch
from torch import Tensor, tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from megachat.model import layers
from megachat.model.layers import Cache, Rope, Spans
from tests.model.test_gpt import some_tokens, tiny


def test_a_quarter_turn_swaps_the_halves_of_a_head() -> None:
    # The first pair turns by its position in radians, the second (base 4: 4 ** -0.5) by half as much.
    rope = Rope.at(tensor([0, 1]), 4, 4.0, torch.float32)
    x = tensor([1.0, 0.0, 0.0, 2.0]).expand(1, 2, 1, 4)
    turned = [math.cos(1), -2 * math.sin(0.5), math.sin(1), 2 * math.cos(0.5)]
    assert_close(rope(x)[0, :, 0], tensor([[1.0, 0.0, 0.0, 2.0], turned]))


@pytest.mark.parametrize("pieces", [[13], [12, 1], [1] * 13, [4, 8, 1], [5, 1, 1, 6]])
def test_reading_in_pieces_equals_reading_at_once(pieces: list[int]) -> None:
    model, tokens = tiny(), some_tokens(2, 13)
    cache = Cache(20)
    with torch.no_grad():
        for piece in tokens.split(pieces, dim=1):
            logits = model(piece, cache=cache)
        assert_close(logits, model(tokens)[:, -1:], rtol=0, atol=1e-5)
    assert cache.length == 13


@pytest.mark.parametrize("pieces", [[9], [8, 1], [3, 6]])
def test_pads_on_the_left_are_not_seen(pieces: list[int]) -> None:
    model, tokens = tiny(), some_tokens(3, 9)
    cache = Cache(9, padding=tensor([0, 4, 8]))
    with torch.no_grad():
        for piece in tokens.split(pieces, dim=1):
            logits = model(piece, cache=cache)
        for row, pads in enumerate([0, 4, 8]):
            alone = model(tokens[row : row + 1, pads:])[:, -1]
            assert_close(logits[row : row + 1, -1], alone, rtol=0, atol=1e-5)


def test_pads_see_pads_so_that_no_softmax_is_empty() -> None:
    mask = Cache(4, padding=tensor([2])).mask(4, torch.device("cpu"))
    assert mask is not None
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_a_cache_keeps_the_rows_it_is_told_to() -> None:
    model, tokens = tiny(), some_tokens(3, 9)
    cache = Cache(9, padding=tensor([2, 0, 5]))
    with torch.no_grad():
        model(tokens[:, :8], cache=cache)
        cache.keep(tensor([2, 0]))
        logits = model(tokens[[2, 0], 8:], cache=cache)
        assert_close(logits[0, 0], model(tokens[2:3, 5:])[0, -1], rtol=0, atol=1e-5)
        assert_close(logits[1, 0], model(tokens[0:1, 2:])[0, -1], rtol=0, atol=1e-5)


def test_no_mask_is_made_where_none_is_needed() -> None:
    cpu = torch.device("cpu")
    assert Cache(9).mask(5, cpu) is None
    assert Cache(9, length=5).mask(1, cpu) is None
    assert Cache(9, length=2).mask(2, cpu).tolist() == [[[[True, True, True, False], [True] * 4]]]


DOCUMENTS = tensor([[0, 0, 0, 1, 2], [2, 2, 2, 2, 2], [3, 4, 4, 4, 5]])
"""The second document ends with its row: rows are of different windows."""


def test_spans_begin_with_each_document_and_each_row() -> None:
    spans = Spans.of(DOCUMENTS, torch.device("cpu"))
    assert spans.starts.tolist() == [0, 3, 4, 5, 10, 11, 14, 15]
    assert spans.starts.dtype == torch.int32
    assert spans.longest == 5


def one_by_one(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, _: Tensor, longest: int, __: int, **named: object
) -> Tensor:
    """What a GPU's kernel computes."""
    assert named == {"window_size": (-1, 0), "enable_gqa": True}
    parts = zip(*(t.tensor_split(starts[1:-1].long()) for t in (q, k, v)), strict=True)
    assert longest >= int(starts.diff().max())
    return torch.cat([
        scaled_dot_product_attention(
            *(t.transpose(0, 1) for t in part), is_causal=True, enable_gqa=True
        ).transpose(0, 1)
        for part in parts
    ])  # fmt: skip


def test_spans_give_what_a_mask_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny(), some_tokens(3, 5)
    masked = model(tokens, DOCUMENTS)
    monkeypatch.setattr(layers, "varlen_attn", one_by_one)
    monkeypatch.setattr(Spans, "fit", lambda device, dtype: True)
    assert_close(model(tokens, DOCUMENTS), masked, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_a_gpus_kernel_gives_what_a_mask_gives(autocast: bool) -> None:
    model, tokens = tiny().cuda(), some_tokens(3, 5).cuda()
    if not layers.VARLEN:
        pytest.skip("this torch has no attention for documents")
    model = model if autocast else model.bfloat16()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        masked, spans = model(tokens, DOCUMENTS.cuda()), model(tokens, DOCUMENTS)
    assert (masked - spans).float().norm() < 0.02 * masked.float().norm()
