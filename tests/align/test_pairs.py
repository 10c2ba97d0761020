"""How preferences become batches, and who gets which."""

from pathlib import Path

import pytest
import torch

from megachat.align.pairs import collate, own, rendered
from megachat.data.conversations import Message, Preference
from megachat.tokenizer.tokenizer import Tokenizer
from megachat.train.loop import parts
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
    assert (batch.weight, batch.samples, batch.tokens) == (3.0, 3, int(batch.rows.real.sum()))


def test_two_ranks_train_on_what_one_would(inputs: Path, run: Path):
    task = tiny.stage("rm", inputs, run, "batch=8", "micro_batch=3")
    state = tiny.running(task)

    def read(data: int, data_rank: int) -> list[list[int]]:
        state.mesh = tiny.place(data, data_rank)
        batches = next(task.batches(state))
        assert max(batch.samples for batch in batches) <= 3
        rows = [half for batch in batches for half in batch.rows.tokens[: batch.samples]]
        return [row[row != state.tokenizer.pad].tolist() for row in rows]

    assert read(1, 0) == read(2, 0) + read(2, 1)
    assert len(read(1, 0)) == 8


@pytest.mark.parametrize("data", [1, 2, 3])
def test_what_is_measured_is_dealt_evenly_and_once(data: int):
    shares = [own(list(range(8)), tiny.place(data, rank)) for rank in range(data)]
    dealt = [item for share in shares for item in share]
    assert len({len(share) for share in shares}) == 1
    assert dealt == list(range(8 // data * data))


def test_parts_are_at_most_so_large():
    assert [list(part) for part in parts([1, 2, 3, 4, 5], 2)] == [[1, 2], [3, 4], [5]]
    assert torch.equal(
        torch.cat([torch.tensor(part) for part in parts([1, 2, 3], 5)]), torch.tensor([1, 2, 3])
    )
