"""LoRA: by hand, from where it starts, and that what is read of it is a plain model of the same logits."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn, tensor
from torch.testing import assert_close

from megachat.model.blueprint import Blueprint
from megachat.model.heads import Scalar, scored
from megachat.model.lora import Adapted, LoRA, adapted, merged
from megachat.model.moe import MoEConfig
from tests.model.test_gpt import TINY, VOCAB, some_tokens, tiny

ALL = ["attn.q", "attn.k", "attn.v", "attn.out", "mlp.gate", "mlp.up", "mlp.down"]


def lora(modules: list[str] = ALL, **changed: Any) -> LoRA:
    return LoRA(**{"rank": 2, "alpha": 6.0, "dropout": 0.0, "modules": modules} | changed)


def start(tied: bool = True) -> Blueprint[Any]:
    """A model's own weights, to be read."""
    weights = {f"weight.{name}": tensor for name, tensor in tiny(tied=tied).state_dict().items()}
    return Blueprint(
        TINY.model_copy(update={"tied": tied}).blueprint(VOCAB).model,
        lambda name, *index: weights[name][index],
    )


def learnt(settings: LoRA) -> tuple[nn.Module, dict[str, Tensor]]:
    """An adapted model that has learnt something, and its weights."""
    torch.manual_seed(1)
    model = adapted(start(), settings).whole(dtype=torch.float64).eval()
    for name, weight in small(model):
        if name.endswith("expand.weight"):
            nn.init.normal_(weight)
    return model, {f"weight.{name}": weight.detach() for name, weight in model.named_parameters()}


def small(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)


def test_an_adapted_layer_by_hand() -> None:
    layer = Adapted(nn.Linear(2, 2, bias=False), lora(rank=1, alpha=3)).to_empty(device="cpu")
    layer.base.weight.data = tensor([[1.0, 2.0], [3.0, 4.0]])
    layer.shrink.weight.data = tensor([[1.0, -1.0]])
    layer.expand.weight.data = tensor([[2.0], [0.0]])
    # W x = (5 + 14, 15 + 28); A x = 5 - 7 = -2, B A x = (-4, 0), and three times that is added.
    assert_close(layer(tensor([5.0, 7.0])), tensor([7.0, 43.0]))


def test_at_the_start_it_computes_what_the_model_does_to_the_last_bit() -> None:
    model = adapted(start(), lora()).whole().eval()
    assert torch.equal(model(some_tokens(2, 9)), start().whole().eval()(some_tokens(2, 9)))


def test_what_is_trained_is_rank_times_inputs_and_outputs_and_nothing_else() -> None:
    dim, hidden = TINY.dim, TINY.hidden
    queries, keys = TINY.heads * TINY.head_dim, TINY.kv_heads * TINY.head_dim
    for modules, width in (
        (["attn.q", "attn.v"], (dim + queries) + (dim + keys)),
        (ALL, 2 * (dim + queries) + 2 * (dim + keys) + 3 * (dim + hidden)),
    ):
        model = adapted(start(tied=False), lora(modules)).model
        assert sum(weight.numel() for _, weight in small(model)) == TINY.layers * 2 * width
        assert {name.split(".")[-2] for name, _ in small(model)} == {"shrink", "expand"}


def test_the_score_of_a_scorer_is_trained_too() -> None:
    model = adapted(scored(start()), lora(["attn.q"])).whole()
    assert isinstance(model, Scalar)
    trained = {name for name, _ in small(model)}
    assert trained - {"score.weight", "score.bias"} == {
        f"trunk.blocks.{block}.attn.q.{part}.weight"
        for block in range(TINY.layers)
        for part in ("shrink", "expand")
    }
    assert torch.equal(model.trunk.embed.weight, start().whole().embed.weight)


@pytest.mark.parametrize("modules", [["attn.k", "mlp.down"], ALL])
def test_what_is_read_is_a_plain_model_of_the_same_logits(modules: list[str]) -> None:
    model, weights = learnt(lora(modules))
    read = merged(lambda name, *index: weights[name][index], lora(modules))
    plain = Blueprint(start().model, read).whole(dtype=torch.float64).eval()
    tokens = some_tokens(2, 9)
    assert_close(plain(tokens), model(tokens), rtol=1e-10, atol=1e-12)
    before = start().whole(dtype=torch.float64).eval()(tokens)
    assert (before - plain(tokens)).abs().max() > 1e-3


def test_a_part_of_what_is_merged_is_that_part_to_the_last_bit() -> None:
    _, weights = learnt(lora())
    read = merged(lambda name, *index: weights[name][index].float(), lora())
    for name in ("blocks.1.mlp.down", "blocks.0.attn.k", "embed"):
        whole = read(f"weight.{name}.weight")
        assert torch.equal(read(f"weight.{name}.weight", slice(1, 4), slice(2, 7)), whole[1:4, 2:7])


def test_fresh_matrices_are_the_same_in_parts_and_differ_from_layer_to_layer() -> None:
    torch.manual_seed(3)
    one = adapted(start(), lora())
    torch.manual_seed(3)
    other = adapted(start(), lora())
    name = "weight.blocks.{}.mlp.up.shrink.weight"
    first = one.read(name.format(0))
    assert torch.equal(other.read(name.format(0), slice(0, 1), slice(3, 9)), first[:1, 3:9])
    assert not torch.equal(first, one.read(name.format(1)))
    assert not one.read("weight.blocks.0.mlp.up.expand.weight").any()


def test_inputs_are_dropped_in_training_alone() -> None:
    torch.manual_seed(0)
    layer = Adapted(nn.Linear(64, 4, bias=False), lora(rank=4, dropout=0.5)).to_empty(device="cpu")
    for weight in layer.parameters():
        nn.init.normal_(weight)
    x = torch.randn(8, 64)
    assert not torch.equal(layer(x), layer(x))
    assert_close(layer.eval()(x), layer(x), rtol=0, atol=0)


def test_a_matrix_that_the_blocks_do_not_have_is_named() -> None:
    mixture = MoEConfig(experts=4, per_token=2, balance=0.01, router_z=0.001)
    experts = TINY.model_copy(update={"moe": mixture}).blueprint(VOCAB)
    with pytest.raises(ValueError, match=r"lora.modules: .* no matrix mlp.gate; leave it out"):
        adapted(experts, lora())
