"""The model against transformers' Qwen3 and Llama, and against itself."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from megachat.model.gpt import GPT, GPTConfig, noisy, same_document
from megachat.model.layers import Rope

TINY = GPTConfig(
    dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=48, context=64, rope_base=10_000.0,
    moe=None, qk_norm=True, tied=True, norm_eps=1e-6, dropout=0.0,
)  # fmt: skip
VOCAB = 50


def tiny(seed: int = 0, **changed: object) -> GPT:
    """A small model whose every weight, norms too, is random: at 1, a forgotten norm would go unnoticed."""
    torch.manual_seed(seed)
    model = TINY.model_copy(update=changed).build(VOCAB)
    for parameter in model.parameters():
        nn.init.normal_(parameter, float(parameter.ndim < 2), 0.3)
    return model.eval()


def some_tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def logits_of_transformers(model: GPT, tokens: Tensor) -> Tensor:
    """What the same weights give there."""
    with torch.no_grad():
        logits: Tensor = in_transformers(model)(tokens).logits
        return logits


def in_transformers(model: GPT) -> Any:
    """The same weights in Qwen3 (with qk_norm) or Llama (without)."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    family = "Qwen3" if c.qk_norm else "Llama"
    config = getattr(transformers, f"{family}Config")(
        vocab_size=model.vocab, hidden_size=c.dim, num_hidden_layers=c.layers, num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads, head_dim=c.head_dim, intermediate_size=c.hidden,
        max_position_embeddings=c.context, rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tied,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_base},
    )  # fmt: skip
    other = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    theirs = {
        "embed": "model.embed_tokens", "blocks": "model.layers", "attn": "self_attn", "q": "q_proj",
        "k": "k_proj", "v": "v_proj", "out": "o_proj",
        "gate": "gate_proj", "up": "up_proj", "down": "down_proj",
        "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "norm": "model.norm",
        "head": "lm_head",
    }  # fmt: skip
    renamed = {
        ".".join(theirs.get(part, part) for part in name.split(".")): value
        for name, value in model.state_dict().items()
    }
    missing, unexpected = other.load_state_dict(renamed, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if c.tied else [])
    return other


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_logits_equal_those_of_qwen3_and_llama(qk_norm: bool, kv_heads: int, tied: bool) -> None:
    model = tiny(qk_norm=qk_norm, kv_heads=kv_heads, tied=tied, rope_base=5000.0)
    tokens = some_tokens(2, 40)
    with torch.no_grad():
        assert_close(model(tokens), logits_of_transformers(model, tokens), rtol=0, atol=5e-5)


def test_documents_in_one_row_are_read_as_if_each_stood_alone() -> None:
    model, tokens = tiny(), some_tokens(1, 30)
    documents = torch.tensor([7] * 11 + [8] + [9] * 18)[None]
    alone = [model(tokens[:, a:b]) for a, b in [(0, 11), (11, 12), (12, 30)]]
    assert_close(model(tokens, documents), torch.cat(alone, dim=1), rtol=0, atol=1e-5)


def test_a_token_sees_itself_and_what_came_before_in_its_document() -> None:
    mask = same_document(torch.tensor([[3, 3, 5]]))
    assert mask[0, 0].tolist() == [[True, False, False], [True, True, False], [False, False, True]]


def test_logits_do_not_depend_on_later_tokens() -> None:
    model, tokens = tiny(), some_tokens(1, 20)
    assert_close(model(tokens)[:, :9], model(tokens[:, :9]), rtol=0, atol=1e-5)


def test_logits_of_some_positions_are_those_of_all_at_these_positions() -> None:
    model, tokens = tiny(), some_tokens(2, 7)
    where = torch.zeros(2, 7, dtype=torch.bool)
    where[0, 3] = where[1, 0] = where[1, 6] = True
    assert_close(model(tokens, where=where), model(tokens)[[0, 1, 1], [3, 0, 6]], rtol=0, atol=1e-5)


def test_checkpointing_changes_memory_but_neither_loss_nor_gradients() -> None:
    tokens = some_tokens(2, 16)
    found = []
    for checkpointing in ("none", "selective", "full"):
        model = tiny(dropout=0.1).train()
        for block in model.blocks:
            block.checkpointing = checkpointing
        torch.manual_seed(3)
        loss = model(tokens, torch.zeros_like(tokens)).square().mean()
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    assert_close(found[0], found[1], rtol=0, atol=0)
    assert_close(found[0], found[2], rtol=0, atol=0)


def test_dropout_acts_in_training_alone() -> None:
    model, tokens = tiny(dropout=0.5), some_tokens(1, 8)
    assert_close(model(tokens), model(tokens), rtol=0, atol=0)
    model.train()
    assert (model(tokens) - model(tokens)).abs().max() > 0.01


def test_noise_is_bounded_by_the_length_of_its_own_document() -> None:
    torch.manual_seed(0)
    documents = torch.tensor([[0] * 4 + [1] * 25 + [-1] * 3, [0] * 16 + [1] * 16])
    noise = noisy(torch.zeros(2, 32, 100), documents, alpha=5.0)
    parts = [noise[0, :4], noise[0, 4:29], noise[0, 29:], noise[1, :16], noise[1, 16:]]
    for part, length in zip(parts, (4, 25, 3, 16, 16), strict=True):
        most = 5.0 / (length * 100) ** 0.5
        assert part.abs().max() <= most
        assert part.abs().max() > 0.95 * most  # of 300 draws or more: missed once in 5 million times
        assert abs(part.square().sum() - 25 / 3) < 4 * 25 / (180 * length * 100 / 16) ** 0.5  # 4 deviations


def test_noise_acts_in_training_alone() -> None:
    model, tokens = tiny(), some_tokens(2, 10)
    quiet = model(tokens)
    model.noise = 5.0
    assert torch.equal(model(tokens), quiet)
    model.train()
    with torch.no_grad():
        assert torch.equal(model(tokens), quiet)
    torch.manual_seed(3)
    loud = model(tokens)
    assert not torch.allclose(loud, quiet)
    torch.manual_seed(3)
    assert torch.equal(model(tokens), loud)


def test_a_bf16_model_returns_bf16_logits_near_those_of_fp32() -> None:
    model, tokens = tiny(), some_tokens(2, 40)
    exact = model(tokens)
    rounded = model.bfloat16()(tokens)
    assert rounded.dtype == torch.bfloat16
    assert (
        rounded.float() - exact
    ).norm() / exact.norm() < 0.02  # bf16 keeps 8 bits: 0.4 % for each rounding


def test_positions_stay_exact_in_bf16() -> None:
    """bf16 cannot tell position 4096 from 4097; only their cosines may be rounded."""
    exact, rounded = (
        Rope.at(torch.tensor([4096, 4097]), 8, 10_000.0, dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    assert_close(rounded.cos.float(), exact.cos, rtol=2**-8, atol=0)
    assert not torch.equal(rounded.cos[0], rounded.cos[1])


def test_weights_follow_from_the_seed() -> None:
    torch.manual_seed(5)
    first = TINY.build(VOCAB)
    torch.manual_seed(5)
    second = TINY.build(VOCAB)
    assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)
    assert not torch.equal(first.embed.weight, TINY.build(VOCAB).embed.weight)


def test_fresh_weights_have_the_deviations_promised() -> None:
    torch.manual_seed(0)
    model = GPTConfig(**(dict(TINY) | {"dim": 128, "layers": 8, "hidden": 512})).build(1000)
    block = model.blocks[3]
    assert model.embed.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert block.mlp.gate.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert block.mlp.down.weight.std().item() == pytest.approx(0.005, rel=0.02)  # 0.02 / sqrt(2 * 8)
    assert block.attn.out.weight.std().item() == pytest.approx(0.005, rel=0.05)
    assert model.norm.weight.tolist() == [1.0] * 128


def test_the_tensor_plan_names_every_matrix_and_the_norms_of_heads() -> None:
    def pattern(name: str) -> str:
        return re.escape(name).replace(r"\*", "[0-9]+") + r"\.weight"

    names = [name for name, _ in tiny(tied=False).named_parameters()]
    planned = {name for name in names for key in GPT.tensor_plan if re.fullmatch(pattern(key), name)}
    assert set(names) - planned == {
        "norm.weight",
        *(f"blocks.{i}.{norm}_norm.weight" for i in range(2) for norm in ("attn", "mlp")),
    }  # fmt: skip


def test_half_the_heads_give_half_the_attention() -> None:
    """What tensor parallelism does: each rank has its heads' share of q, k, v and out; they add up."""
    attention = tiny().blocks[0].attn
    x = torch.randn(2, 10, 32)
    rope = Rope.at(torch.arange(10), 8, 10_000.0, torch.float32)
    whole = attention(x, rope)
    parts = []
    state = {name: value.clone() for name, value in attention.state_dict().items()}
    for rank in range(2):
        for name in ("q", "k", "v"):
            setattr(attention, name, share(state[f"{name}.weight"].chunk(2, 0)[rank]))
        attention.out = share(state["out.weight"].chunk(2, 1)[rank])
        parts.append(attention(x, rope))
    assert_close(parts[0] + parts[1], whole, rtol=0, atol=1e-5)


def share(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.clone())
    return linear


def test_key_heads_left_whole_beside_split_query_heads_are_refused() -> None:
    attention = tiny().blocks[0].attn
    attention.q = share(attention.q.weight.chunk(2, 0)[0])
    rope = Rope.at(torch.arange(3), 8, 10_000.0, torch.float32)
    with pytest.raises(AssertionError, match="2 query heads for 2 key heads"):
        attention(torch.randn(1, 3, 32), rope)


def test_a_sequence_longer_than_the_context_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="65 tokens is longer than the model's context=64; shorten it"):
        tiny()(some_tokens(1, 65))


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"kv_heads": 3}, "kv_heads=3 does not divide heads=4"), ({"head_dim": 7}, "head_dim=7 is odd")],
)
def test_impossible_shapes_are_refused(changed: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(**(dict(TINY) | changed))
