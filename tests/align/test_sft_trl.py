"""A step of SFT beside the same step of TRL's trainer, with the same weights and conversations."""

from pathlib import Path
from typing import Any

import pytest

from megachat.align.rows import Rendered, shifted
from megachat.align.sft import SFT
from megachat.data.conversations import Conversation, Message
from megachat.model.cross_entropy import IGNORE
from megachat.tokenizer.chat_format import render
from megachat.tokenizer.tokenizer_json import tokenizer_json
from megachat.train.loop import train_step
from tests.align import tiny
from tests.model.test_gpt import in_transformers

SAID = [("ab?", "abab"), ("h", ""), ("cd?", "cdcd", "ef?", "efef"), ("a" * 12, "b"), ("gh?", "ghghghgh")]


def theirs(model: Any, rendered: list[Rendered], tokenizer: Any, folder: Path) -> dict[str, float]:
    """What TRL's trainer logs of one step over all conversations, two at a time, each in a padded row."""
    datasets, tokenizers, transformers, trl = map(
        pytest.importorskip, ("datasets", "tokenizers", "transformers", "trl")
    )
    rows = [{"input_ids": tokens, "labels": [IGNORE, *shifted(tokens, mask)]} for tokens, mask in rendered]
    settings = trl.SFTConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, per_device_train_batch_size=2, max_steps=1,
        gradient_accumulation_steps=len(rows) // 2, activation_checkpointing=False, optim="sgd", report_to=[],
        logging_steps=1, save_strategy="no", disable_tqdm=True, shuffle_dataset=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer_json(tokenizer)),
        pad_token="<pad>", eos_token="<|end|>",
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=model, args=settings, train_dataset=datasets.Dataset.from_list(rows), processing_class=words
    )
    trainer.train()
    logged: dict[str, float] = trainer.state.log_history[0]
    return logged


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # theirs, of each other
def test_a_step_costs_what_trl_says_and_has_its_gradient(inputs: Path, run: Path, tmp_path: Path):
    task = tiny.stage("sft", inputs, run, "context=32")
    assert isinstance(task, SFT)
    state = tiny.running(task)
    rendered = [
        render(
            Conversation(tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(said))),
            state.tokenizer,
        )
        for said in (*SAID, SAID[0])
    ]
    expected = theirs(in_transformers(state.engines["model"].module), rendered, state.tokenizer, tmp_path)
    # Packed otherwise than there, and in micro-batches of other sizes.
    rows = [[rendered[0], rendered[1]], [rendered[2]], [rendered[3]], [rendered[5], rendered[4]]]
    batches = [task._collate(rows[:3], state), task._collate(rows[3:], state)]
    sums = train_step(task, state, list(batches), rate=1e-3)
    assert sums["weight"] == sum(sum(mask) for _, mask in rendered)
    assert sums["loss"] / sums["weight"] == pytest.approx(expected["loss"], rel=1e-5)
    assert sums["gradient_norm"] / sums["weight"] == pytest.approx(expected["grad_norm"], rel=1e-4)
