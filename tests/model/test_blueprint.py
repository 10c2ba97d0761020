"""Weights that are drawn or read when it is known which are needed."""

import torch
from torch.testing import assert_close

from megachat.model.blueprint import Blueprint
from megachat.model.heads import Scalar, scored
from tests.model.test_gpt import TINY, VOCAB, some_tokens, tiny


def test_a_blueprint_has_no_memory_and_its_whole_is_what_build_gives() -> None:
    torch.manual_seed(3)
    planned = TINY.blueprint(VOCAB)
    assert all(parameter.is_meta for parameter in planned.model.parameters())
    torch.manual_seed(3)
    assert_close(planned.whole().state_dict(), TINY.build(VOCAB).state_dict(), rtol=0, atol=0)


def test_a_weight_is_the_same_in_parts_and_in_any_order() -> None:
    read, names = TINY.blueprint(VOCAB).read, ["blocks.1.mlp.up", "embed", "blocks.0.mlp.up"]
    first = [read(f"weight.{name}.weight") for name in names]
    for name, tensor in reversed([*zip(names, first, strict=True)]):
        assert torch.equal(read(f"weight.{name}.weight", slice(3, 9), slice(2, 4)), tensor[3:9, 2:4])
    assert not torch.equal(first[0], first[2])  # each matrix has its own


def test_two_models_of_a_run_differ() -> None:
    torch.manual_seed(0)
    one, other = TINY.blueprint(VOCAB), TINY.blueprint(VOCAB)
    assert not torch.equal(one.read("weight.embed.weight"), other.read("weight.embed.weight"))


def test_a_fresh_score_is_read_beside_the_trunks_weights() -> None:
    trunk = tiny(tied=False)
    weights = {f"weight.{name}": tensor for name, tensor in trunk.state_dict().items()}
    planned = scored(Blueprint(TINY.blueprint(VOCAB).model, lambda name, *index: weights[name][index]))
    score = planned.read("weight.score.weight")
    model = planned.whole(dtype=torch.float64)
    assert torch.equal(model.score.weight, score.double())
    expected = Scalar(trunk.double())
    expected.score.load_state_dict(model.score.state_dict())
    with torch.no_grad():
        assert_close(model.eval()(some_tokens(2, 5)), expected(some_tokens(2, 5)))
