"""The cache, and rotations; attention as a whole is compared with other implementations in test_gpt.py."""

import math

import pytest
import torch
from torch import Tensor, tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from megachat.model import layers
from megachat.model.attention import look_back
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
    cache, read = Cache(2, 20), 0
    with torch.no_grad():
        for piece in tokens.split(pieces, dim=1):
            logits = model(piece, cache=cache.read([read, read], piece.shape[1]))
            read += piece.shape[1]
        assert_close(logits, model(tokens)[:, -1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("pieces", [[9], [8, 1], [3, 6]])
def test_pads_on_the_right_are_not_seen_and_are_written_over(pieces: list[int]) -> None:
    model, tokens = tiny(), some_tokens(3, 18)
    cache = Cache(3, 20)
    lengths, starts = [9, 5, 1], [0, 0, 0]
    with torch.no_grad():
        logits = model(tokens[:, :9], cache=cache.read(starts, 9, lengths))
        for row, length in enumerate(lengths):
            assert_close(logits[row, 0], model(tokens[row : row + 1, :length])[0, -1], rtol=0, atol=1e-5)
        for count in pieces:  # what comes next for each, which is not what stood in its padding
            new = torch.stack([row[n : n + count] for row, n in zip(tokens.flip(0), lengths, strict=True)])
            logits = model(new, cache=cache.read(lengths, count))
            lengths = [length + count for length in lengths]
        for row, (first, length) in enumerate(zip([9, 5, 1], lengths, strict=True)):
            text = torch.cat((tokens[row, :first], tokens.flip(0)[row, first:length]))
            assert_close(logits[row, 0], model(text[None])[0, -1], rtol=0, atol=1e-5)


def test_texts_in_other_slots_are_left_alone_and_may_be_moved() -> None:
    model, tokens = tiny(), some_tokens(3, 9)
    cache = Cache(3, 9)
    with torch.no_grad():
        model(tokens[:1, :8], cache=cache.read([0], 8))
        model(tokens[1:, :6], cache=cache.read([0, 0], 6, first=1))
        cache.move(2, 0)
        logits = model(tokens[[2, 1], 6:7], cache=cache.read([6, 6], 1))
        assert_close(logits[0, 0], model(tokens[2:3, :7])[0, -1], rtol=0, atol=1e-5)
        assert_close(logits[1, 0], model(tokens[1:2, :7])[0, -1], rtol=0, atol=1e-5)


def test_a_token_sees_its_own_text_up_to_itself_and_no_mask_is_made_where_all_is_new() -> None:
    cache = Cache(2, 5)
    reading = cache.read([1, 2], 2)
    mask = reading.mask(reading.places(2, torch.device("cpu")))
    assert mask is not None
    assert mask[:, 0].int().tolist() == [
        [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]],
        [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]],
    ]
    fresh = cache.read([0, 0], 4)
    assert fresh.mask(fresh.places(4, torch.device("cpu"))) is None


def test_a_text_that_outgrows_its_slot_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="longer than its slot"):
        Cache(2, 5).read([3, 4], 2)


def test_looking_back_is_attention_over_what_is_remembered() -> None:
    draws = torch.Generator().manual_seed(0)
    q = torch.randn(3, 4, 2, 8, generator=draws)
    k, v = torch.randn(2, 3, 2, 10, 8, generator=draws)
    mask = torch.arange(10) <= tensor([[4, 5], [0, 1], [8, 9]])[:, None, :, None]
    expected = scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    assert_close(look_back(q, k, v, mask), expected, rtol=0, atol=1e-6)


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
