"""Bits per byte."""

import math

import numpy as np
import pytest
import torch

from megachat.data.loader import Window
from megachat.evals.bits import bits_per_byte, spread
from tests.evals import tiny


def window(tokens: list[int]) -> Window:
    return Window(np.array(tokens), [0, len(tokens)])


def test_a_uniform_model_needs_log2_of_the_vocabulary_per_token():
    model = tiny.model()
    torch.nn.init.zeros_(model.embed.weight)  # all logits are 0
    lengths = np.full(300, 2)
    score = bits_per_byte(model, [window([5, 6, 7, 8, 9]), window([1, 2, 3, 4, 5])], lengths, batch=1)
    assert score.value == pytest.approx(math.log2(300) / 2, rel=1e-6)
    assert score.n == 2


def test_tokens_without_bytes_are_neither_text_nor_cost():
    model = tiny.model()
    lengths = np.full(300, 3)
    plain = bits_per_byte(model, [window([5, 6, 7])], lengths, batch=4)
    lengths[8] = 0
    with_control = bits_per_byte(model, [window([5, 6, 7, 8])], lengths, batch=4)
    assert with_control.value == pytest.approx(plain.value, rel=1e-6)


def test_a_document_is_charged_the_same_whatever_stands_before_it():
    lengths = np.full(300, 2)
    lengths[1] = 0  # opens each document, and is not text
    both = Window(np.array([1, 5, 6, 1, 8, 9]), [0, 3, 6])
    together = bits_per_byte(tiny.model(), [both], lengths, batch=1)
    apart = bits_per_byte(tiny.model(), [window([1, 5, 6]), window([1, 8, 9])], lengths, batch=2)
    assert together.value == pytest.approx(apart.value, rel=1e-6)


def test_the_batch_does_not_change_the_value():
    generator = np.random.default_rng(0)
    windows = [window(list(generator.integers(0, 300, 20))) for _ in range(5)]
    one, four = (bits_per_byte(tiny.model(), windows, np.full(300, 2), batch=batch) for batch in (1, 4))
    assert one.value == pytest.approx(four.value, rel=1e-6)


def test_windows_are_spread_over_the_whole_shard():
    assert spread(10, 4) == [0, 2, 5, 7]
    assert spread(3, 100) == [0, 1, 2]
