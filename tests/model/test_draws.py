"""Draws: distributed as torch's, the same for the same numbers, and otherwise without any connection."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, tensor

from megachat.model.draws import draw, exponentials, keys, seed_of

PROBABILITIES = tensor([0.4, 0.3, 0.15, 0.1, 0.04, 0.009, 0.001, 0.0])


def counted(drawn: Tensor) -> list[int]:
    return torch.bincount(drawn, minlength=len(PROBABILITIES)).tolist()


def p_value(counts: list[int]) -> float:
    """How likely a chi-square as large is, of the probabilities above."""
    possible = len(PROBABILITIES) - 1
    assert counts[possible:] == [0]  # what has no probability is never drawn
    expected = PROBABILITIES[:possible].double().numpy()
    return float(stats.chisquare(counts[:possible], sum(counts) * expected / expected.sum()).pvalue)


@pytest.mark.parametrize("how", ["rows", "positions", "consecutive rows", "torch"])
def test_tokens_come_as_often_as_they_are_likely(how: str) -> None:
    rows = 20_000
    everywhere = PROBABILITIES.expand(rows, -1)
    if how == "torch":
        torch.manual_seed(0)
        drawn = torch.multinomial(everywhere, 1).squeeze(1)
    elif how == "positions":
        by = torch.cat([keys([5], position) for position in range(rows)])
        drawn = draw(everywhere, by)
    else:
        seeds = range(rows) if how == "consecutive rows" else [seed_of(0, 3, row) for row in range(rows)]
        drawn = draw(everywhere, keys(seeds, 3))
    assert p_value(counted(drawn)) > 1e-3


def test_a_wide_vocabulary_is_drawn_as_evenly_as_torch_draws_it() -> None:
    vocab, rows = 1000, 200
    probabilities = torch.rand(vocab, generator=torch.Generator().manual_seed(0)) ** 3
    probabilities /= probabilities.sum()
    drawn = torch.cat(
        [draw(probabilities.expand(rows, -1), keys(range(rows), position)) for position in range(200)]
    )
    enough = probabilities * len(drawn) >= 5
    expected = torch.cat([probabilities[enough], probabilities[~enough].sum()[None]]).double().numpy()
    counts = torch.bincount(drawn, minlength=vocab)
    found = torch.cat([counts[enough], counts[~enough].sum()[None]]).double().numpy()
    assert stats.chisquare(found, len(drawn) * expected / expected.sum()).pvalue > 1e-3


def test_times_are_exponential_and_of_different_rows_positions_and_tokens_unrelated() -> None:
    tokens = torch.arange(3000, dtype=torch.int32)
    here, next_row = exponentials(keys([1, 2], 0), tokens)
    later = exponentials(keys([1], 1), tokens)[0]
    assert stats.kstest(here.numpy(), "expon").pvalue > 1e-3
    for other in (next_row, later, here.roll(1), here.roll(2)):
        assert abs(np.corrcoef(here, other)[0, 1]) < 4 / 3000**0.5  # four deviations
    key = keys([1], 0)
    for near in (
        key.flip(1),
        key + tensor([1, 0], dtype=torch.int32),
        key ^ tensor([0, 2], dtype=torch.int32),
    ):
        assert abs(np.corrcoef(here, exponentials(near, tokens)[0])[0, 1]) < 4 / 3000**0.5


def test_the_smallest_and_the_largest_time_are_finite_and_positive() -> None:
    times = torch.cat(
        [exponentials(keys([row], 0), torch.arange(2**20, dtype=torch.int32)) for row in range(64)]
    )
    assert 0 < times.min() < 1e-6
    assert 15 < times.max() < 17


def test_a_row_draws_the_same_in_any_batch_and_block() -> None:
    vocab = 300  # 218 rows in a block
    probabilities = torch.rand(500, vocab, generator=torch.Generator().manual_seed(0))
    seeds = [seed_of("row", row) for row in range(500)]
    drawn = draw(probabilities, keys(seeds, 7))
    assert len(set(drawn.tolist())) > 100
    for some in ([0], [499, 3], [*range(217, 220)]):
        assert (
            draw(probabilities[some], keys([seeds[row] for row in some], 7)).tolist() == drawn[some].tolist()
        )
    assert draw(probabilities, keys(seeds, 8)).tolist() != drawn.tolist()


def test_the_keys_are_those_of_splitmix64() -> None:
    # The first outputs of Vigna's reference implementation for the state 1234567.
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    for position, output in enumerate(outputs, 1):
        low, high = keys([1234567], position)[0].tolist()
        assert (high % 2**32) * 2**32 + low % 2**32 == output


def test_rounding_moves_few_draws() -> None:
    logits = torch.randn(2000, 1000, generator=torch.Generator().manual_seed(0))
    noise = 1e-4 * torch.randn(2000, 1000, generator=torch.Generator().manual_seed(1))
    by = keys(range(2000), 0)
    moved = draw(logits.softmax(-1), by) != draw((logits + noise).softmax(-1), by)
    assert moved.sum() <= 3  # 0.2 are expected
