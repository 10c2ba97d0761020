"""A run folder with a tokenizer and token shards of a small made-up text, for tests that train."""

import json
import os
import random
from pathlib import Path

from megachat.config import compose
from megachat.run import Stage, perform

TINY = [
    "model.dim=32", "model.layers=2", "model.heads=4", "model.kv_heads=2", "model.head_dim=8",
    "model.hidden=64", "model.context=64", "context=32", "batch=8", "micro_batch=2", "tokens=3072",
    "parallel.precision=fp32", "optimizer.lr=1e-2", "log.interval=1", "log.wandb=disabled",
    "validation_windows=4", "checkpoint_interval=0", "validation_interval=0", "prompt=one",
]  # fmt: skip
"""Overrides of `pretrain`: 12 steps of 8 samples of 32 tokens through a model of two small blocks."""


def make(run: Path, *stages: str) -> Path:
    """Runs `clean`, `tokenizer` and `encode` on 120 documents of random number words."""
    words = "zero one two three four five six seven eight nine ten eleven twelve".split()
    draw = random.Random(0)
    source = run.parent / "numbers.jsonl"
    source.parent.mkdir(parents=True, exist_ok=True)
    with source.open("w", encoding="utf-8") as file:
        for _ in range(120):
            text = " ".join(draw.choice(words) for _ in range(draw.randint(20, 60))) + "."
            file.write(json.dumps({"text": text}) + "\n")
    common = [f"run={run}", "log.wandb=disabled"]
    settings = {
        "clean": [
            "corpus=[json_lines]",
            f"corpus.json_lines.paths=[{source}]",
            "filters=none",
            "dedup=exact",
        ],
        "tokenizer": ["vocab=300", "threads=1"],
        "encode": ["validation=0.1", "executor.processes=1"],
    }
    for stage in ("clean", "tokenizer", "encode"):
        perform(Stage.of(compose(stage, [*common, *settings[stage]])))
    return run


def pretrain(run: Path, *overrides: str) -> Stage:
    """The `pretrain` stage on a tiny run."""
    return Stage.of(compose("pretrain", [f"run={run}", "model=gpt_3m", *TINY, *overrides]))


def environment() -> dict[str, str]:
    """For a process of its own: without what makes it a rank, left behind by tests that train in this one."""
    apart = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in apart}


def rows(run: Path, stage: str = "pretrain") -> list[dict[str, float]]:
    """What `metrics.jsonl` holds."""
    return [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
