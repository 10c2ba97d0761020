"""A run folder with everything in it but quality: a tokenizer, shards, and models of few weights."""

import functools
from pathlib import Path

import torch
from torch import nn

from megachat.config import decode
from megachat.data.shards import ShardWriter
from megachat.files import sha256, write_json
from megachat.model.gpt import GPT
from megachat.model.heads import Scalar
from megachat.tokenizer.tokenizer import Tokenizer
from megachat.tokenizer.train import train
from tests import tiny_model
from tests.tiny_model import finish, shape

SHAPE = shape(dim=16, layers=1, heads=2, kv_heads=1, hidden=32, context=64)
TEXTS = ["What does math.gcd do? Greatest Common Divisor.", "Return the absolute path of a file. " * 3]


@functools.cache
def tokenizer() -> Tokenizer:
    """A tokenizer of 300 tokens."""
    return train(TEXTS * 20, vocab=300, character_coverage=1.0, threads=1)


def model(seed: int = 0) -> GPT:
    """A language model that has learnt nothing."""
    torch.manual_seed(seed)
    built: GPT = decode(SHAPE).build(tokenizer().vocab)
    return built.eval().requires_grad_(False)


def reward_model(seed: int = 0) -> Scalar:
    """A reward model that has learnt nothing."""
    return Scalar(model(seed)).eval().requires_grad_(False)


def constant(token: int) -> GPT:
    """A language model that always says `token`: its last state is all ones, its head zero but in one row."""
    config = decode(SHAPE | {"tied": False})
    built: GPT = config.build(tokenizer().vocab)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.zero_()
        built.embed.weight.fill_(1.0)
        built.norm.weight.fill_(1.0)
        assert built.head is not None
        built.head.weight[token] = 1.0
    return built.eval().requires_grad_(False)


def write_model(folder: Path, trained: nn.Module) -> None:
    """A finished training stage that ended with this model."""
    tiny_model.write_model(folder, trained, tokenizer())


def write_shard(folder: Path) -> None:
    """A finished `encode` stage with a validation shard of some windows."""
    folder.mkdir(parents=True)
    words = tokenizer()
    with ShardWriter(folder / "validation", words.vocab) as writer:
        for text in TEXTS * 10:
            writer.add([words.bos, *words.encode(text), words.eos])
    sums = {kind: sha256(folder / f"validation.{kind}") for kind in ("bin", "idx")}
    shards = {"validation": {"split": "validation", "source": "", "sha256": sums}}
    write_json(folder / "manifest.json", {"tokenizer": words.sha256, "shards": shards})
    finish(folder)
