"""Scores of reward models and critics."""

import pytest
import torch
from torch.testing import assert_close

from megachat.model.heads import Scalar
from tests.model.test_gpt import TINY, VOCAB, some_tokens, tiny


def test_a_score_is_the_linear_of_the_trunks_last_states() -> None:
    model, tokens = Scalar(tiny()), some_tokens(2, 9)
    by_hand = (model.trunk.hidden(tokens) * model.score.weight[0]).sum(-1) + model.score.bias
    assert_close(model(tokens), by_hand, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("autocast", [False, True])
def test_a_score_keeps_24_bits_in_a_bf16_model(autocast: bool) -> None:
    model = Scalar(tiny())
    if not autocast:
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        scores = model(some_tokens(2, 9))
    assert scores.dtype == torch.float32
    assert (scores != scores.bfloat16().float()).any()


def test_a_score_does_not_see_later_tokens_nor_other_documents() -> None:
    model, tokens = Scalar(tiny()), some_tokens(1, 12)
    documents = torch.tensor([[0] * 5 + [1] * 7])
    assert_close(model(tokens)[:, :5], model(tokens[:, :5]), rtol=0, atol=1e-5)
    assert_close(model(tokens, documents)[:, 5:], model(tokens[:, 5:]), rtol=0, atol=1e-5)


def test_every_weight_gets_a_gradient_though_the_trunk_had_an_output_layer() -> None:
    model = Scalar(tiny(tied=False))
    model(some_tokens(2, 9)).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert not any("head" in name for name in model.state_dict())


def test_the_first_scores_have_deviation_one_over_root_of_dim_plus_one() -> None:
    torch.manual_seed(0)
    model = Scalar(TINY.model_copy(update={"dim": 4095, "layers": 1, "hidden": 8}).build(VOCAB))
    assert model.score.weight.std().item() == pytest.approx(1 / 64, rel=0.05)
    assert model.score.bias.tolist() == [0.0]


def test_the_trunk_keeps_its_weights_and_its_plan() -> None:
    trunk = tiny()
    embedding = trunk.embed.weight.clone()
    model = Scalar(trunk)
    assert_close(model.trunk.embed.weight, embedding, rtol=0, atol=0)
    assert model.tensor_plan["trunk.blocks.*.attn.out"] == "row"
