"""A run folder in which alignment can start: a tokenizer and models of few weights, which know nothing yet.

The task: a question of two letters, `ab?`, and the answer `abab`. It is learnt in seconds, and judged to the
letter.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megachat.config import compose, decode
from megachat.data.shards import ShardWriter
from megachat.files import sha256, write_json
from megachat.model.heads import Scalar
from megachat.parallel.mesh import Mesh, start
from megachat.run import Stage
from megachat.tokenizer.tokenizer import FILE, Tokenizer
from megachat.tokenizer.train import train
from megachat.train.loop import Progress, Running, Task, engines
from tests.tiny_model import finish, shape, write_model

LETTERS = "abcdefgh"
SHAPE = shape(dim=48, layers=2, heads=4, kv_heads=2, hidden=128, context=32)
COMMON = ["context=24", "parallel=zero0", "parallel.precision=fp32", "log.interval=1", "log.wandb=disabled"]
COMMON += [
    "checkpoint_interval=0",
    "validation_interval=0",
    "optimizer.lr=3e-3",
    "schedule=constant",
    "schedule.warmup=0",
]


PAIRS = ["batch=16", "micro_batch=16"]
GROUPS = ["group=4", "rewards.exact.after=''"]
ROLLOUTS = ["batch=16", "micro_batch=8", "rollout=32", "epochs=2", "at_once=32", "max_new_tokens=8"]


def answer(question: str) -> str:
    """The true answer.

    Example: answer("ab?") -> "abab"
    """
    return question[:2] * 2


def wrong(question: str) -> str:
    """A wrong one, of the same length."""
    first, second = question[:2]
    return first + second + LETTERS[(LETTERS.index(second) + 3) % 8] + first


def make(run: Path) -> Path:
    """The folder, with data of every kind in it."""
    questions = [f"{a}{b}?" for a in LETTERS for b in LETTERS]
    run.mkdir(parents=True)
    write(
        run / "conversations.jsonl",
        [{"messages": [*_said(q), _message("assistant", answer(q))]} for q in questions],
    )
    write(
        run / "preferences.jsonl",
        [
            {"prompt": q, "chosen": answer(q), "rejected": spoilt}
            for q in questions
            for spoilt in (wrong(q), q[:2])
        ],
    )
    write(run / "prompts.jsonl", [{"prompt": q, "answer": answer(q)} for q in questions])
    texts = [f"{q} {answer(q)} {' '.join(answer(q))}" for q in questions]
    tokenizer = train(texts, vocab=280, character_coverage=1.0, threads=1)
    (run / "tokenizer").mkdir()
    tokenizer.save(run / "tokenizer" / FILE)
    finish(run / "tokenizer")
    _encode(run / "encode", [text for text in texts for _ in range(4)], tokenizer)
    torch.manual_seed(0)
    model = decode(SHAPE).build(tokenizer.vocab)
    for stage in ("pretrain", "sft"):
        write_model(run / stage, model, tokenizer)
    write_model(run / "rm", Scalar(decode(SHAPE).build(tokenizer.vocab)), tokenizer)
    return run


def settings(name: str, inputs: Path) -> list[str]:
    """Of a stage that starts from the folder `inputs`."""
    block = {
        "sft": "conversations",
        "rm": "preferences",
        "dpo": "preferences",
        "kto": "unpaired",
        "ppo": "prompts",
        "grpo": "prompts",
    }[name]
    file = "preferences" if block == "unpaired" else block
    source = [f"{block}=json", f"{block}.path={inputs}/{file}.jsonl"]
    source += ["question=ab?"] if name == "sft" else [f"{block}.held_out=0.1"]
    return [f"inputs={inputs}", *source, *COMMON]


def stage(name: str, inputs: Path, run: Path, *overrides: str) -> Task:
    """A stage that starts from the folder `inputs` and writes to `run`."""
    made = Stage.of(compose(name, [f"run={run}", *settings(name, inputs), *overrides]))
    assert isinstance(made, Task)
    return made


def running(task: Task) -> Running:
    """What the loop gives a stage before the first step."""
    mesh = start(task.parallel.tensor)
    torch.manual_seed(task.seed)
    run = Running(mesh, Tokenizer.load(task.input("tokenizer")), Progress())
    run.engines = engines(task, task.models(run), mesh)
    run.total = task.prepare(run)
    return run


def rows(run: Path, name: str) -> list[dict[str, float]]:
    """What a stage logged."""
    return [json.loads(line) for line in (run / name / "metrics.jsonl").read_text().splitlines()]


def place(data: int, data_rank: int) -> Mesh:
    """A rank among others that are not there: enough to choose one's share of the data."""
    return Mesh(data_rank, data, 1, torch.device("cpu"), None, None)


def _encode(folder: Path, texts: list[str], tokenizer: Tokenizer) -> None:
    """Token shards, as `encode` leaves them."""
    with ShardWriter(folder / "train" / "text", tokenizer.vocab) as writer:
        for text in texts:
            writer.add([*tokenizer.encode(text), tokenizer.eos])
    sums = {kind: sha256(folder / "train" / f"text.{kind}") for kind in ("bin", "idx")}
    shard = {"split": "train", "source": "text", "sha256": sums}
    about = {"tokenizer": tokenizer.sha256, "vocab": tokenizer.vocab, "shards": {"train/text": shard}}
    write_json(folder / "manifest.json", about)
    finish(folder)


def _said(question: str) -> list[dict[str, str]]:
    return [_message("user", question)]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def write(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
