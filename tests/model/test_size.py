"""Formulas against the models they describe."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megachat.config import decode, plain
from megachat.model.gpt import GPT, GPTConfig
from megachat.model.size import Flops, Work, flops_per_token, forward_flops, parameters
from megachat.stages import CONF
from tests.model.test_gpt import TINY, VOCAB, some_tokens

MODELS = sorted((CONF / "model").glob("*.yaml"))


def read(path: Path) -> GPTConfig:
    config = decode(plain(OmegaConf.load(path)))
    assert isinstance(config, GPTConfig)
    return config


def count(config: GPTConfig, vocab: int) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GPT(config, vocab).parameters())


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_parameters_are_counted_as_built(path: Path) -> None:
    assert parameters(read(path), 4096) == count(read(path), 4096)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_parameters_are_counted_whatever_is_tied_or_normalised(qk_norm: bool, tied: bool) -> None:
    config = TINY.model_copy(update={"qk_norm": qk_norm, "tied": tied})
    assert parameters(config, VOCAB) == count(config, VOCAB)


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_the_first_line_of_a_models_file_gives_its_size(path: Path) -> None:
    vocab = 4096 if path.stem in ("gpt_3m", "gpt_6m", "gpt_moe_8m") else 65536
    millions = parameters(read(path), vocab) / 1e6
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first == f"# {millions:,.1f} M parameters with a vocabulary of {vocab:,}"


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_every_model_splits_over_two_ranks_and_the_large_ones_over_eight(path: Path) -> None:
    config = read(path)
    ranks = 8 if parameters(config, 65536) > 5e9 else 2
    assert config.kv_heads % ranks == 0
    assert config.hidden % ranks == 0


@pytest.mark.parametrize("recomputed", ["none", "attention", "blocks"])
@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_those_that_torch_counts(tied: bool, recomputed: str) -> None:
    batch, seq = 2, 16
    config = TINY.model_copy(update={"tied": tied})
    model = config.build(VOCAB)
    for block in model.blocks:
        block.checkpointing = {"none": "none", "attention": "selective", "blocks": "full"}[recomputed]
    # Among the kernels of attention torch counts only the plain one, which computes the whole square.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(some_tokens(batch, seq)).sum().backward()
    counted = counter.get_flop_counts()["Global"]
    work = Work(tokens=batch * seq, pairs=batch * seq**2, logits=batch * seq)
    flops = Flops(config, VOCAB, 3, recomputed)
    assert flops.of_hardware(work) == counted[torch.ops.aten.mm] + counted[torch.ops.aten.bmm]
    assert flops.of_model(work) == Flops(config, VOCAB, 3, "none").of_hardware(work)


def test_weights_that_stay_as_they_are_save_a_third_of_their_flops() -> None:
    model = TINY.build(VOCAB).requires_grad_(False)
    model.embed.register_forward_hook(lambda _, __, states: states.requires_grad_())
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(some_tokens(2, 16)).sum().backward()
    work = Work(tokens=2 * 16, pairs=2 * 16**2, logits=2 * 16)
    frozen = Flops(TINY, VOCAB, 3, "none", frozen=True)
    assert frozen.of_model(work) == counter.get_total_flops()


def test_a_token_sees_itself_and_those_before_it_in_its_document() -> None:
    assert Work.of([3, 2], logits=4) == Work(tokens=5, pairs=(1 + 2 + 3) + (1 + 2), logits=4)


def test_a_forward_pass_of_one_token_is_two_flops_a_weight() -> None:
    weights = parameters(TINY, VOCAB)
    unused = 5 * TINY.dim + 2 * 2 * TINY.head_dim  # norms; the embedding is the output layer, too
    attention = TINY.layers * 2 * 2 * TINY.heads * TINY.head_dim  # a score, and a value times it
    assert forward_flops(TINY, VOCAB, Work(1, 1, 1)) == 2 * (weights - unused) + attention


def test_flops_of_attention_are_the_causal_half() -> None:
    # Scores: 2 x 8 flops for each of 4 heads and 8 mean keys; the sum as many; backward twice that.
    per_layer = 3 * 2 * (2 * 8 * 4 * 8)
    assert flops_per_token(TINY, VOCAB, 16) - flops_per_token(TINY, VOCAB, 0) == 2 * per_layer
