"""A mixture of experts against transformers' Mixtral and Qwen3-MoE, and its penalties by hand."""

from math import log
from typing import Literal

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn, tensor
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from megachat.model.cross_entropy import IGNORE
from megachat.model.gpt import GPT, Checkpointing
from megachat.model.layers import MLP
from megachat.model.moe import Experts, MoE, MoEConfig, one_by_one, pick, routing, together
from megachat.model.size import Flops, Work, active_parameters, parameters
from tests.model.test_gpt import TINY, VOCAB, some_tokens

FOUR = MoEConfig(experts=4, per_token=2, balance=0.01, router_z=0.001)


def tiny(moe: MoEConfig = FOUR, **changed: object) -> GPT:
    """A small model with experts whose every weight is random."""
    torch.manual_seed(0)
    model = TINY.model_copy(update={"moe": moe, **changed}).build(VOCAB)
    for parameter in model.parameters():
        nn.init.normal_(parameter, float(parameter.ndim < 2), 0.3)
    return model.eval()


def in_transformers(model: GPT) -> nn.Module:
    """The same weights in Qwen3-MoE (with qk_norm) or Mixtral (without)."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    assert c.moe is not None
    family, names = (
        (
            "Qwen3Moe",
            {"num_experts": c.moe.experts, "moe_intermediate_size": c.hidden, "norm_topk_prob": True},
        )
        if c.qk_norm
        else ("Mixtral", {"num_local_experts": c.moe.experts, "intermediate_size": c.hidden})
    )
    config = getattr(transformers, f"{family}Config")(
        vocab_size=model.vocab, hidden_size=c.dim, num_hidden_layers=c.layers, num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads, head_dim=c.head_dim, num_experts_per_tok=c.moe.per_token,
        max_position_embeddings=c.context, rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tied,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_base}, **names,
    )  # fmt: skip
    other: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    theirs = {
        "embed": "model.embed_tokens", "blocks": "model.layers", "attn": "self_attn", "q": "q_proj",
        "k": "k_proj", "v": "v_proj", "out": "o_proj", "router": "gate", "down": "down_proj",
        "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "norm": "model.norm",
    }  # fmt: skip
    weights = dict(model.state_dict())
    for index in range(c.layers):
        experts = f"blocks.{index}.mlp.experts"
        both = [weights.pop(f"{experts}.{part}") for part in ("gate", "up")]
        weights[f"{experts}.gate_up_proj"] = torch.cat(both, 1)
    renamed = {
        ".".join(theirs.get(part, part) for part in name.split(".")): value for name, value in weights.items()
    }
    missing, unexpected = other.load_state_dict(renamed, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    return other


@pytest.mark.parametrize("qk_norm", [True, False])
def test_logits_and_gradients_equal_those_of_qwen3_moe_and_mixtral(qk_norm: bool) -> None:
    model, tokens = tiny(qk_norm=qk_norm), some_tokens(2, 40)
    other = in_transformers(model)
    ours, right = model(tokens), other(tokens).logits
    assert_close(ours, right, rtol=0, atol=2e-5)
    for logits in (ours, right):
        F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    theirs = dict(other.named_parameters())
    layer = "model.layers.1.mlp"
    experts = model.blocks[1].mlp.experts
    both = torch.cat([experts.gate.grad, experts.up.grad], 1)
    assert_close(
        model.blocks[1].mlp.router.weight.grad, theirs[f"{layer}.gate.weight"].grad, rtol=1e-4, atol=1e-6
    )
    assert_close(both, theirs[f"{layer}.experts.gate_up_proj"].grad, rtol=1e-4, atol=1e-6)
    assert_close(experts.down.grad, theirs[f"{layer}.experts.down_proj"].grad, rtol=1e-4, atol=1e-6)


def test_the_largest_probabilities_are_made_to_sum_to_1() -> None:
    weights, picked = pick(tensor([[log(1.0), log(3.0), log(6.0)]]), 2)
    assert picked.tolist() == [[2, 1]]
    assert_close(weights, tensor([[6 / 9, 3 / 9]]))


def test_experts_that_are_all_alike_are_one_mlp() -> None:
    torch.manual_seed(1)
    mlp, moe = MLP(8, 12), MoE(8, 12, FOUR)
    with torch.no_grad():
        for name in ("gate", "up", "down"):
            getattr(moe.experts, name).copy_(getattr(mlp, name).weight.expand(4, -1, -1))
    x = torch.randn(2, 5, 8)
    assert_close(moe(x), mlp(x), rtol=1e-5, atol=1e-6)


def test_no_token_is_dropped_when_all_want_the_same_expert() -> None:
    experts = Experts(8, 12, 3)
    for weight in experts.parameters():
        nn.init.normal_(weight)
    x = torch.randn(7, 8)
    alone = [(F.silu(row @ experts.gate[1].T) * (row @ experts.up[1].T)) @ experts.down[1].T for row in x]
    assert_close(experts(x, tensor([0, 7, 0])), torch.stack(alone), rtol=1e-4, atol=1e-5)


def test_three_kernels_compute_what_each_expert_does_by_itself() -> None:
    torch.manual_seed(4)
    weights = [torch.randn(3, *shape, dtype=torch.bfloat16) / 8 for shape in ((24, 16), (24, 16), (16, 24))]
    x, counts = torch.randn(9, 16, dtype=torch.bfloat16), tensor([4, 0, 5])
    found = []
    for compute in (one_by_one, together):
        leaves = [weight.clone().requires_grad_() for weight in weights]
        y = compute(x, counts, *leaves)
        y.float().square().sum().backward()
        found.append([y.detach(), *(leaf.grad for leaf in leaves)])
    assert_close(found[0], found[1], rtol=2e-2, atol=1e-3)
    assert found[0][1][1].abs().sum() == 0  # nobody went to the second


def test_balance_is_1_for_each_token_where_all_is_even_and_more_where_it_is_not() -> None:
    one = MoEConfig(experts=2, per_token=1, balance=1.0, router_z=0.0)
    # Four tokens of probabilities 3/4 and 1/4, two of them turned around: halves, whatever they are.
    even = tensor([[3.0, 1.0], [1.0, 3.0], [3.0, 1.0], [1.0, 3.0]]).log()[None, None]
    found = routing(even, torch.ones(1, 4, dtype=torch.bool), one)
    assert (found.penalty.item(), found.load.item()) == (pytest.approx(4.0), 1.0)
    # All picks go to the first: 2 x (1 x 3/4 + 0 x 1/4), for each token.
    same = tensor([[3.0, 1.0]] * 4).log()[None, None]
    found = routing(same, torch.ones(1, 4, dtype=torch.bool), one)
    assert (found.penalty.item(), found.load.item()) == (pytest.approx(4 * 1.5), 2.0)


def test_the_z_penalty_is_the_square_of_the_log_of_the_sum_of_exponentials() -> None:
    only = MoEConfig(experts=3, per_token=1, balance=0.0, router_z=0.5)
    scores = tensor([[1.0, 3.0, 6.0], [2.0, 2.0, 1.0]]).log()[None, None]  # sums 10 and 5
    found = routing(scores, torch.ones(1, 2, dtype=torch.bool), only)
    assert found.penalty.item() == pytest.approx(0.5 * (log(10) ** 2 + log(5) ** 2))


def test_what_is_not_trained_on_does_not_count() -> None:
    scores = torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(2))
    counted = tensor([[True] * 4 + [False] * 2] * 2 + [[False] * 6])
    there, alone = routing(scores, counted, FOUR), routing(scores[:, :2, :4], counted[:2, :4], FOUR)
    assert_close((there.penalty, there.load), (alone.penalty, alone.load))


def gradients(model: GPT, tokens: Tensor, labels: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss = model(tokens, labels=labels)
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def test_penalties_are_in_the_gradient_and_not_in_the_loss() -> None:
    tokens, labels = some_tokens(2, 16), some_tokens(2, 16, seed=3)
    silent = FOUR.model_copy(update={"balance": 0.0, "router_z": 0.0})
    plain, model = tiny(silent).train(), tiny().train()
    without, found = gradients(plain, tokens, labels), gradients(model, tokens, labels)
    assert_close(found[0], without[0], rtol=0, atol=0)
    # The penalties by themselves, and what the chain rule makes of them.
    model.zero_grad()
    _, scores = model._states(tokens, None, None)
    routing(torch.stack(scores), labels != IGNORE, FOUR).penalty.backward()
    penalties = [parameter.grad for parameter in model.parameters()]
    for (name, _), both, one, other in zip(
        model.named_parameters(), found[1:], without[1:], penalties, strict=True
    ):
        assert_close(both, one if other is None else one + other, rtol=1e-4, atol=1e-4, msg=name)
    assert max(grad.abs().max() for grad in penalties if grad is not None) > 0.01


def test_rows_count_alike_in_one_micro_batch_and_in_two() -> None:
    model = tiny().train()
    tokens, labels = some_tokens(4, 16), some_tokens(4, 16, seed=3)
    whole = gradients(model, tokens, labels)
    halves = [gradients(model, tokens[rows], labels[rows]) for rows in (slice(1), slice(1, 4))]
    assert_close(whole, [a + b for a, b in zip(*halves, strict=True)], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_checkpointing_changes_neither_loss_nor_gradients(checkpointing: Checkpointing) -> None:
    model, tokens = tiny().train(), some_tokens(2, 16)
    plain = gradients(model, tokens, tokens)
    for block in model.blocks:
        block.checkpointing = checkpointing
    assert_close(gradients(model, tokens, tokens), plain, rtol=0, atol=0)


def test_training_evens_out_what_a_router_does_that_prefers_one_expert() -> None:
    torch.manual_seed(0)
    model = TINY.model_copy(update={"moe": FOUR.model_copy(update={"balance": 0.1}), "layers": 1}).build(
        VOCAB
    )
    with torch.no_grad():
        model.blocks[0].mlp_norm.weight[0] = 5.0
        model.embed.weight[:, 0] = 1.0
        model.blocks[0].mlp.router.weight[:2, 0] = 1.0  # everybody to the first two
    optimizer = torch.optim.Adam([model.blocks[0].mlp.router.weight], lr=0.01)
    loads = []
    for _ in range(100):
        tokens = some_tokens(4, 32)
        optimizer.zero_grad()
        model(tokens, labels=tokens).backward()
        optimizer.step()
        assert model.load is not None
        loads.append(model.load.item())
    assert loads[0] == 2.0
    assert loads[-1] < 1.3


def test_active_parameters_leave_out_the_experts_that_a_token_does_not_pass_through() -> None:
    config = TINY.model_copy(update={"moe": FOUR})
    assert parameters(config, VOCAB) == sum(
        parameter.numel() for parameter in config.build(VOCAB).parameters()
    )
    # In each of 2 blocks 2 of 4 experts of 3 x 32 x 48 are left out.
    assert parameters(config, VOCAB) - active_parameters(config, VOCAB) == 2 * 2 * 3 * 32 * 48
    assert active_parameters(TINY, VOCAB) == parameters(TINY, VOCAB)


@pytest.mark.parametrize("recomputed", ["none", "blocks"])
def test_flops_are_those_that_torch_counts(recomputed: Literal["none", "blocks"]) -> None:
    batch, seq = 2, 16
    model = tiny(qk_norm=False).train()
    for block in model.blocks:
        block.checkpointing = {"none": "none", "blocks": "full"}[recomputed]
    # Attention is left out, of which torch does not see all.
    with FlopCounterMode(display=False) as counter:
        model(some_tokens(batch, seq)).sum().backward()
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    flops = Flops(model.config, VOCAB, 3, recomputed).of_hardware(Work(batch * seq, 0, batch * seq))
    twice = 2 * 2 * 4 * 32 * batch * seq  # the scores of both routers, once more for the penalties
    assert counted == flops + twice


def test_more_experts_for_a_token_than_there_are_is_refused() -> None:
    with pytest.raises(ValidationError, match="per_token=5 is more than the experts=4 there are"):
        MoEConfig(experts=4, per_token=5, balance=0.0, router_z=0.0)
