"""A tokenizer that has read a little Python and a little Chinese."""

import inspect
import json.decoder
import textwrap

import pytest

from megachat.tokenizer.tokenizer import Tokenizer
from megachat.tokenizer.train import train

CHINESE = "这个函数是做什么的？请解释一下。"


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """What the tokenizer learns from: source code with indentation, and Chinese."""
    return [inspect.getsource(json.decoder), inspect.getsource(textwrap), CHINESE * 20]


@pytest.fixture(scope="session")
def tokenizer(texts: list[str]) -> Tokenizer:
    """A tokenizer of 800 tokens."""
    return train(texts, vocab=800, character_coverage=0.9995, threads=1)
