"""How preferences become batches, and who gets which."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
import torch

from megachat.align.pairs import collate, rendered
from megachat.data.conversations import Message, Preference
from megachat.model.size import NOTHING, Work
from megachat.tokenizer.tokenizer import Tokenizer
from megachat.train.loop import Batch, Progress, Running, measured, micro_batches, parts
from tests.align import tiny


def test_only_the_last_answer_is_trained_on_not_those_before_it(inputs: Path):
    tokenizer = Tokenizer.load(inputs / "tokenizer")
    prompt = (Message("user", "ab?"), Message("assistant", "abab"), Message("user", "cd?"))
    (pair,) = rendered([Preference(prompt, "cdcd", "cd", "")], tokenizer, 64)
    for (tokens, mask), text in ((pair.chosen, "cdcd"), (pair.rejected, "cd")):
        trained_on = [token for token, trained in zip(tokens, mask, strict=True) if trained]
        assert trained_on == [*tokenizer.encode(text), tokenizer.end]
        assert tokens[-len(trained_on) :] == trained_on


def test_a_batch_holds_the_chosen_answers_first(inputs: Path, run: Path):
    task = tiny.stage("rm", inputs, run)
    state = tiny.running(task)
    batch = collate(state.data.train[:3], state)
    for row, (pair, side) in enumerate(
        [(pair, side) for side in ("chosen", "rejected") for pair in range(3)]
    ):
        tokens, _ = getattr(state.data.train[pair], side)
        assert batch.rows.tokens[row][batch.rows.real[row]].tolist() == tokens
    assert (batch.weight, batch.samples, batch.work.tokens) == (3.0, 3, int(batch.rows.real.sum()))


def test_any_number_of_ranks_trains_on_what_one_would(inputs: Path, run: Path):
    task = tiny.stage("rm", inputs, run, "batch=8", "micro_batch=3")
    state = tiny.running(task)

    def read(data: int, data_rank: int) -> list[list[int]]:
        state.mesh = tiny.place(data, data_rank)
        batches = next(task.batches(state))
        assert max(batch.samples for batch in batches) <= 3
        assert len(batches) == math.ceil(math.ceil(8 / data) / 3)  # on every rank
        rows = [half for batch in batches for half in batch.rows.tokens[: batch.samples]]
        return [row[row != state.tokenizer.pad].tolist() for row in rows]

    assert read(1, 0) == read(2, 0) + read(2, 1) == read(3, 0) + read(3, 1) + read(3, 2)
    assert read(1, 0) == [row for rank in range(7) for row in read(7, rank)]
    assert len(read(1, 0)) == 8


@pytest.mark.parametrize("name", ["sft", "rm", "dpo"])
def test_batches_made_ahead_are_those_made_when_they_are_needed(name: str, inputs: Path, run: Path):
    read = []
    for prefetch in (0, 2):
        state = tiny.running(task := tiny.stage(name, inputs, run, "batch=8", f"prefetch={prefetch}"))
        state.progress.samples = 8
        steps = islice(task.batches(state), 3)
        rows = [one.inputs if name == "sft" else one.rows.tokens for step in steps for one in step]
        read.append([tokens.tolist() for tokens in rows])
    assert read[0] == read[1] != []
    assert len({str(tokens) for tokens in read[0]}) == len(read[0])  # no step reads what another has read


@dataclass(frozen=True)
class Some(Batch):
    """A micro-batch that remembers what is in it."""

    items: list[int]


def some(items: Sequence[int]) -> Some:
    return Some(
        weight=10.0 * len(items), work=Work.of([len(items)], 0), samples=len(items), items=list(items)
    )


class Apart(Running):
    """On a rank whose others are not there."""

    def pause(self) -> None:
        """They cannot be asked whether to stop."""


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("data", [1, 2, 3, 5, 11])
def test_what_is_measured_is_measured_once_in_equally_many_micro_batches(data: int, size: int, inputs: Path):
    tokenizer = Tokenizer.load(inputs / "tokenizer")
    runs = [Apart(tiny.place(data, rank), tokenizer, Progress()) for rank in range(data)]
    dealt = [list(measured(range(8), size, run, some)) for run in runs]
    assert len({len(batches) for batches in dealt}) == 1
    found = [batch for batches in dealt for batch in batches if batch.samples]
    assert [item for batch in found for item in batch.items] == list(range(8))
    assert max(batch.samples for batch in found) <= size


def test_a_rank_with_fewer_samples_goes_along_with_one_that_counts_nothing():
    assert [*micro_batches([4, 5, 6], 3, 2, some)] == [some([4, 5]), some([6])]
    full, idle = micro_batches([7, 8], 3, 2, some)
    assert full == some([7, 8])
    assert idle == Some(weight=0.0, work=NOTHING, samples=0, items=[7])
    assert [*micro_batches([7, 8], 3, 3, some)] == [full]


def test_parts_are_at_most_so_large():
    assert [list(part) for part in parts([1, 2, 3, 4, 5], 2)] == [[1, 2], [3, 4], [5]]
    assert torch.equal(
        torch.cat([torch.tensor(part) for part in parts([1, 2, 3], 5)]), torch.tensor([1, 2, 3])
    )
