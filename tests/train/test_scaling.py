"""The rules that derive a run from its size, against sums done by hand and models that were published."""

import math

import pytest
import yaml

from megachat.config import ConfigError, compose, decode
from megachat.model.gpt import GPTConfig
from megachat.stages import CONF
from megachat.train.pretrain import Pretrain
from megachat.train.scaling import (
    compute,
    dim,
    heads,
    hidden,
    learning_rate,
    optimal_batch,
    optimal_tokens,
    weight_decay,
)


def shape(**sizes: int) -> GPTConfig:
    fixed = {
        "context": 4096,
        "rope_base": 1e4,
        "qk_norm": True,
        "tied": True,
        "norm_eps": 1e-6,
        "dropout": 0.0,
        "moe": None,
    }
    return GPTConfig(**(fixed | sizes))


def run(*overrides: str) -> Pretrain:
    decoded = decode(compose("pretrain", ["experiment=depth", *overrides]))
    assert isinstance(decoded, Pretrain)
    return decoded


def test_width_is_64_for_every_block_in_whole_heads() -> None:
    assert [dim(layers, 128) for layers in (1, 2, 12, 13, 24)] == [128, 128, 768, 896, 1536]
    assert (heads(896, 128), heads(100, 128)) == (7, 1)


def test_an_mlp_is_8_thirds_as_wide_in_multiples_of_256() -> None:
    assert [hidden(width) for width in (96, 768, 4096)] == [256, 2048, 11008]  # 11008: Llama 7B's


def test_compute_is_72_squares_and_attention_for_every_token() -> None:
    # 12 squares of weights a block, 6 FLOPs each; here 4 of them in attention, 8 in the MLP.
    model = shape(dim=96, layers=3, heads=2, kv_heads=2, head_dim=48, hidden=256)
    norms = 3 * (2 * 96 + 2 * 48) + 96
    expected = 72 * 3 * 96**2 + 12 * 3 * 96 * 500 + 6 * norms
    assert compute(model, 7, 500) == 7 * expected


@pytest.mark.parametrize(
    ("sizes", "batch", "rate"),
    [
        (
            {"dim": 4096, "layers": 30, "heads": 32, "kv_heads": 32, "head_dim": 128, "hidden": 11008},
            2304,
            4.2e-4,
        ),
        (
            {"dim": 8192, "layers": 95, "heads": 64, "kv_heads": 8, "head_dim": 128, "hidden": 22016},
            4608,
            3.2e-4,
        ),
    ],
    ids=["7B", "67B"],
)
def test_deepseek_s_own_models_have_the_batch_and_rate_of_their_rule(
    sizes: dict[str, int], batch: int, rate: float
) -> None:
    # Table 2 of DeepSeek LLM; both saw 2e12 tokens in rows of 4,096. Ours is the nearest power of 2.
    model = shape(**sizes)
    found = optimal_batch(model, 2 * 10**12, 4096)
    assert math.log2(found).is_integer()
    assert found / math.sqrt(2) < batch < found * math.sqrt(2)
    assert learning_rate(model, 2 * 10**12, 4096, found) == pytest.approx(rate, rel=0.03)


SMALL = shape(dim=256, layers=4, heads=2, kv_heads=2, head_dim=128, hidden=768)


def test_a_batch_a_quarter_as_large_halves_the_rate_and_a_larger_one_leaves_it() -> None:
    tokens = 10**9
    best = optimal_batch(SMALL, tokens, 512)
    rate = learning_rate(SMALL, tokens, 512, best)
    assert learning_rate(SMALL, tokens, 512, best // 4) == pytest.approx(rate / 2, rel=0.005)
    assert learning_rate(SMALL, tokens, 512, best * 4) == rate


def test_weight_decay_is_a_tenth_at_20_tokens_a_parameter_and_follows_batch_and_rate() -> None:
    tokens = optimal_tokens(SMALL, 1000)
    batch = optimal_batch(SMALL, tokens, 512)
    rate = learning_rate(SMALL, tokens, 512, batch)
    assert weight_decay(SMALL, 1000, tokens, 512, batch, rate) == 0.1
    assert weight_decay(SMALL, 1000, tokens, 512, batch * 2, rate) == pytest.approx(0.2)
    assert weight_decay(SMALL, 1000, tokens, 512, batch, rate * 2) == pytest.approx(0.05)
    # Ten times the tokens: a tenth, for it averages over as many steps, times 10^0.527.
    assert weight_decay(SMALL, 1000, tokens * 10, 512, batch, rate) == pytest.approx(0.0337, rel=0.005)


def test_depth_12_is_what_one_can_work_out() -> None:
    made = run("model.layers=12")
    # A block: 4 x 768^2 of attention, 3 x 768 x 2048 of MLP, norms of 2 x 768 + 2 x 128.
    parameters = 12 * (4 * 768**2 + 3 * 768 * 2048 + 2 * 768 + 2 * 128) + 768 + 32768 * 768
    assert (made.model.dim, made.model.heads, made.model.kv_heads, made.model.hidden) == (768, 6, 6, 2048)
    assert made.tokens == 20 * parameters == 2_202_455_040
    # C = (6 x 84.96 M + 12 x 12 x 768 x 2048) x 2.2e9 = 1.62e18; 0.292 C^0.3271 = 265 k tokens, 129 rows
    assert made.batch == 128
    assert made.optimizer.lr == 1.65e-3
    assert made.optimizer.weight_decay == 0.1


def test_what_is_given_wins_and_what_follows_from_it_follows() -> None:
    plain, wide = run("model.layers=4"), run("model.layers=4", "model.dim=512")
    assert (wide.model.dim, wide.model.heads, wide.model.hidden) == (512, 4, 1536)
    assert wide.tokens is not None
    assert plain.tokens is not None
    assert wide.tokens > plain.tokens
    given = run("model.layers=4", "tokens=1e9", "batch=64", "optimizer.lr=1e-3", "optimizer.weight_decay=0.3")
    assert (given.tokens, given.batch) == (10**9, 64)
    assert (given.optimizer.lr, given.optimizer.weight_decay) == (1e-3, 0.3)


def test_another_shape_can_be_dialled_for() -> None:
    assert run("model=gpt_1b").model == decode(compose("pretrain", ["model=gpt_1b"])).model
    assert run("model=gpt_1b").batch == 256


def test_all_that_is_recorded_is_plain_numbers() -> None:
    tree = compose("pretrain", ["experiment=depth"])
    assert "${" not in yaml.safe_dump(tree)
    assert isinstance(tree["batch"], int)


def test_the_dial_and_its_tokenizer_have_one_vocabulary() -> None:
    vocab = compose("tokenizer", ["experiment=depth"])["vocab"]
    written = (CONF / "experiment" / "depth" / "pretrain.yaml").read_text(encoding="utf-8")
    assert written.count(f",{vocab}") == written.count("${model},3") == 2


def test_a_wrong_dial_is_told_once_and_a_missing_budget_for_all_that_follows() -> None:
    with pytest.raises(ConfigError) as wrong:
        run("model.layers=deep")
    assert str(wrong.value).splitlines()[1:] == [
        "  model.layers: input should be a valid integer, unable to parse string as an integer, got 'deep'"
    ]
    with pytest.raises(ConfigError) as missing:
        run("tokens=null", "epochs=1")
    does_not_do = "which does not do; give it a value"
    assert str(missing.value).splitlines()[1:] == [
        f"  optimizer.lr: it follows from tokens=None and batch, {does_not_do}",
        f"  optimizer.weight_decay: it follows from tokens=None and batch and lr, {does_not_do}",
        f"  batch: it follows from tokens=None, {does_not_do}",
    ]
