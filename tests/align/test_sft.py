"""SFT: what is trained on, that packing changes nothing, that nothing is cut short, and that it learns."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from megachat.align.rows import padded
from megachat.align.sft import SFT
from megachat.config import compose
from megachat.data.conversations import Conversation, Message
from megachat.model.size import Work
from megachat.parallel.checkpoint import latest
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


@pytest.mark.parametrize("prompt_weight", [0, 0.25])
def test_a_packed_row_costs_what_its_conversations_cost_one_by_one(
    inputs: Path, run: Path, prompt_weight: float
):
    task = tiny.stage("sft", inputs, run, "context=32", f"prompt_weight={prompt_weight}")
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


def test_packed_conversations_have_the_logits_and_gradients_that_they_have_alone(inputs: Path, run: Path):
    task = tiny.stage("sft", inputs, run, "context=32")
    assert isinstance(task, SFT)
    state = tiny.running(task)
    model = state.engines["model"].module
    rendered = [render(chat(*said), state.tokenizer) for said in (("ab?", "abab"), ("h", "a"), ("de", "ed"))]
    together = task._collate([rendered], state)
    packed = model(together.inputs, together.documents)
    for document, (tokens, _) in enumerate(rendered):
        alone = model(torch.tensor([tokens]))
        assert_close(packed[together.documents == document], alone[0], rtol=0, atol=1e-6)
    gradients = []
    for batches in ([together], [task._collate([[one]], state) for one in rendered]):
        cost = sum(task._cost(model, batch) for batch in batches)
        gradients.append(torch.autograd.grad(cost, list(model.parameters())))
    assert_close(*gradients, rtol=1e-4, atol=1e-5)


def mixed(inputs: Path, run: Path, *said: tuple[str, ...]) -> str:
    """The path of the 64 conversations and more."""
    run.mkdir(parents=True)
    lines = (inputs / "conversations.jsonl").read_text()
    for one in said:
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(one)]
        lines += json.dumps({"messages": messages}) + "\n"
    (run / "mixed.jsonl").write_text(lines)
    return str(run / "mixed.jsonl")


@pytest.mark.parametrize("source", ["json", "encoded"])
def test_an_answer_that_is_cut_off_teaches_its_beginning_and_no_stop(
    inputs: Path, run: Path, capsys: pytest.CaptureFixture[str], source: str
):
    long, late = ("ab?", "abcdefgh" * 10), ("ab?" * 20, "ab")
    turns = ("ab?", "abab", "cd?", "cdcd", "ef?", "efef")  # the last answer does not fit
    path = mixed(inputs, run, long, late, turns)
    settings = ["conversations=json", f"conversations.path={path}", "validation=0"]
    if source == "encoded":
        where = [f"run={run}", f"inputs={inputs}", "log.wandb=disabled"]
        perform(Stage.of(compose("encode_chat", [*where, *settings])))
        settings = ["conversations=encoded"]
        stage = Stage.of(
            compose("sft", [*where, *settings, "too_long=truncate", "question=ab?", *tiny.COMMON])
        )
    else:
        stage = tiny.stage("sft", inputs, run, *settings, "too_long=truncate")
    assert isinstance(stage, SFT)
    state = tiny.running(stage)
    said = capsys.readouterr().err
    assert "3 of 67 conversations are cut off after 24 tokens" in said
    assert "1 of them have nothing to train on before that, and are left out" in said
    end = state.tokenizer.end
    kept = [one for row in state.data.rows for one in row]
    assert len(kept) == 66
    for said in (long, turns):
        tokens, mask = render(chat(*said), state.tokenizer)
        assert (tokens[:24], mask[:24]) in kept
        assert tokens[24] != end != tokens[23]  # it is cut in the middle of an answer
    assert max(len(tokens) for tokens, _ in kept) == 24
    trained = {tuple(token for token, one in zip(*rendered, strict=True) if one) for rendered in kept}
    beginning = state.tokenizer.encode("abcdefgh" * 10)
    (cut,) = [labels for labels in trained if end not in labels]
    assert list(cut) == beginning[: len(cut)]
    assert len(cut) > 10


def test_the_prompts_tokens_count_as_much_as_is_said(inputs: Path, run: Path):
    task = tiny.stage("sft", inputs, run, "prompt_weight=0.25")
    assert isinstance(task, SFT)
    state = tiny.running(task)
    model = state.engines["model"].module
    tokens, mask = rendered = render(chat("ab?", "abab", "h", "a"), state.tokenizer)
    batch = task._collate([[rendered]], state)
    answers = sum(mask)
    prompts = len(tokens) - 1 - answers  # nothing asks for the first token
    assert batch.weight == answers + 0.25 * prompts
    assert batch.work.logits == answers + prompts
    logps = model(torch.tensor([tokens])).log_softmax(-1)[0, :-1]
    nats = -logps.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]
    trained = torch.tensor(mask[1:]).bool()
    expected = nats[trained].sum() + 0.25 * nats[~trained].sum()
    assert_close(task.loss(state, batch).losses["model"], expected, rtol=1e-5, atol=0)
    measured = task.measure(state)  # what is measured is the assistant's side alone, to compare runs by
    plain = tiny.stage("sft", inputs, run)
    assert measured == plain.measure(tiny.running(plain))


def test_noise_is_in_what_is_trained_on_and_not_in_what_is_measured(inputs: Path, run: Path):
    found = []
    for alpha in (0, 5):
        task = tiny.stage("sft", inputs, run, f"neftune={alpha}")
        assert isinstance(task, SFT)
        state = tiny.running(task)
        batch = task._collate(state.data.rows[:2], state)
        found.append((task.loss(state, batch).losses["model"].item(), task.measure(state)))
    (quiet, measured), (loud, measured_too) = found
    assert abs(loud / quiet - 1) > 1e-4
    assert measured == measured_too


def test_a_run_with_noise_goes_on_to_the_last_bit_as_if_it_had_not_stopped(inputs: Path, tmp_path: Path):
    settings = ["neftune=5", "prompt_weight=0.1", "batch=8", "micro_batch=4", "epochs=9", "resume=any"]

    def trained(name: str, *steps: int) -> list[dict[str, float]]:
        for step in steps:
            tiny.stage("sft", inputs, tmp_path / name, *settings, f"max_steps={step}").execute()
        keys = ("loss", "gradient_norm", "tokens")
        return [{key: row[key] for key in keys} for row in tiny.rows(tmp_path / name, "sft")]

    whole, stopped = trained("whole", 4), trained("stopped", 2, 4)
    assert len(whole) == 4
    assert stopped == whole
    one, other = (
        load_file(latest(tmp_path / name / "sft").path / "tensors-00000-00000.safetensors")
        for name in ("whole", "stopped")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


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
