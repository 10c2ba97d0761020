"""SFT: what is trained on, that packing changes nothing, that nothing is cut short, and that it learns."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from megachat.align.rows import padded
from megachat.align.sft import SFT
from megachat.config import compose
from megachat.data.conversations import Conversation, Message
from megachat.model.size import Work
from megachat.run import Stage, perform
from megachat.tokenizer.chat_format import render
from megachat.tokenizer.tokenizer import Tokenizer
from megachat.train.loop import parts
from tests.align import tiny


def chat(*said: str) -> Conversation:
    """User and assistant by turns."""
    return Conversation(tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(said)))


def test_the_labels_are_exactly_what_the_assistant_says_and_its_stop_tokens(inputs: Path):
    tokenizer = Tokenizer.load(inputs / "tokenizer")
    rows = padded([render(chat("ab?", "abab", "no", "yes"), tokenizer)], tokenizer.pad)
    trained_on = rows.labels[rows.mask].tolist()
    assert trained_on == [*tokenizer.encode("abab"), tokenizer.end, *tokenizer.encode("yes"), tokenizer.end]


def test_a_packed_row_costs_what_its_conversations_cost_one_by_one(inputs: Path, run: Path):
    task = tiny.stage("sft", inputs, run, "context=32")
    assert isinstance(task, SFT)
    state = tiny.running(task)
    rendered = [render(chat(*said), state.tokenizer) for said in (("ab?", "abab"), ("h", "a"), ("de", "ed"))]
    together = task._collate([rendered], state)
    assert len(set(together.documents.flatten().tolist())) == 4  # three, and the padding
    alone = [task._collate([[one]], state) for one in rendered]
    assert together.weight == sum(batch.weight for batch in alone)
    assert together.work == Work(
        *(sum(getattr(one.work, name) for one in alone) for name in ("tokens", "pairs", "logits"))
    )
    cost = sum(task.loss(state, batch).losses["model"] for batch in alone)
    assert_close(task.loss(state, together).losses["model"], cost, rtol=1e-5, atol=0)


def test_a_conversation_longer_than_the_context_is_left_out_whole(
    inputs: Path, run: Path, capsys: pytest.CaptureFixture[str]
):
    lines = (inputs / "conversations.jsonl").read_text()
    run.mkdir(parents=True)
    long = '{"messages": [{"role": "user", "content": "ab?"}, {"role": "assistant", "content": "%s"}]}\n'
    (run / "mixed.jsonl").write_text(lines + long % ("abcdefgh" * 10))
    task = tiny.stage("sft", inputs, run, f"conversations.path={run}/mixed.jsonl", "validation=0")
    state = tiny.running(task)
    assert "1 of 65 conversations are longer than 24 tokens and are left out" in capsys.readouterr().err
    assert sum(len(row) for row in state.data.rows) == 64
    assert all(tokens[-1] == state.tokenizer.end for row in state.data.rows for tokens, _ in row)


def test_what_is_measured_is_not_trained_on(inputs: Path, run: Path):
    state = tiny.running(tiny.stage("sft", inputs, run, "validation=0.3"))
    train, held_out = (
        {tuple(tokens) for row in rows for tokens, _ in row}
        for rows in (state.data.rows, state.data.held_out)
    )
    assert len(train) + len(held_out) == 64
    assert 8 < len(held_out) < 32
    assert not train & held_out


def test_encoded_conversations_are_trained_on_like_those_rendered_at_the_start(inputs: Path, run: Path):
    where = [f"run={run}", f"inputs={inputs}", "log.wandb=disabled"]
    source = ["conversations=json", f"conversations.path={inputs}/conversations.jsonl", "validation=0.3"]
    perform(Stage.of(compose("encode_chat", [*where, *source])))
    encoded = Stage.of(compose("sft", [*where, "conversations=encoded", "question=ab?", *tiny.COMMON]))
    assert isinstance(encoded, SFT)
    one, other = tiny.running(tiny.stage("sft", inputs, run, "validation=0.3")), tiny.running(encoded)
    assert list(other.data.rows) == list(one.data.rows)
    assert list(other.data.held_out) == list(one.data.held_out) != []
    assert "encode_chat" in encoded.reads()


def test_micro_batches_of_one_add_up_to_the_batch(inputs: Path, run: Path):
    task = tiny.stage("sft", inputs, run, "batch=8", "micro_batch=8")
    assert isinstance(task, SFT)
    state = tiny.running(task)
    rows = state.data.rows[:8]
    whole, *_ = (task._collate(part, state) for part in parts(rows, 8))
    single = [task._collate(part, state) for part in parts(rows, 1)]
    assert whole.weight == sum(batch.weight for batch in single)
    added = sum(task.loss(state, batch).losses["model"] for batch in single)
    assert_close(task.loss(state, whole).losses["model"], added, rtol=1e-5, atol=0)


def test_a_step_reads_the_same_rows_on_two_ranks_as_on_one(inputs: Path, run: Path):
    task = tiny.stage("sft", inputs, run, "batch=4", "micro_batch=4")
    state = tiny.running(task)

    def read(data: int, data_rank: int) -> list[list[int]]:
        state.mesh = tiny.place(data, data_rank)
        return torch.cat([batch.inputs for batch in next(task.batches(state))]).tolist()

    assert read(1, 0) == read(2, 0) + read(2, 1)


def test_it_learns_to_answer_and_to_stop(inputs: Path, run: Path):
    task = tiny.stage("sft", inputs, run, "batch=8", "micro_batch=8", "epochs=30", "validation=0.1")
    task.execute()
    rows = tiny.rows(run, "sft")
    assert rows[0]["loss"] > 5 > 0.5 > rows[-1]["loss"]
    assert rows[-1]["validation/loss"] < 1.0  # about questions it has never seen; of eight letters, 2.1
    samples = (run / "sft" / "samples.jsonl").read_text()
    assert '"ab? abab"' in samples


def test_a_context_longer_than_the_models_is_refused(inputs: Path, run: Path):
    with pytest.raises(ValueError, match=r"context=64 is longer than the 32 tokens that `pretrain` reads"):
        tiny.running(tiny.stage("sft", inputs, run, "context=64"))
