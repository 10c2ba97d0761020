"""What a program that aligns a model is given, and how it tells what a step took; `rl.py` compares them.

A runner in `runners/` reads a lesson, takes its steps, and writes how long each took. It runs in the
environment of what it runs, so only Python's own library may be imported here.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tools.bench.clock import peak
from tools.bench.on_file import OnFile


@dataclass(frozen=True, kw_only=True)
class Lesson(OnFile):
    """The same for all of a table."""

    run: str
    """A run folder of megachat's with a tokenizer and a `pretrain` stage, from which training starts."""
    weights: str
    """The same model as a safetensors file, by megachat's names."""
    model: dict[str, Any]
    """The shape, by the names of `megachat.model.gpt.GPTConfig`."""
    vocab: int
    pad: int
    end: int
    """The tokens that fill and that end an answer."""
    precision: str
    """`float32` or `bfloat16`."""
    texts: str
    """JSON lines for megachat: prompts, or preferences."""
    prompts: list[list[int]]
    """The same as tokens, up to where the answer begins."""
    chosen: list[list[int]]
    rejected: list[list[int]]
    """For DPO: answers without their end."""
    steps: int
    """Optimizer steps that count, after one that does not."""
    batch: int
    """Answers of a step, or preferences."""
    micro_batch: int
    """Answers, or preferences, that pass through the model at once."""
    group: int
    """For GRPO: answers to a prompt."""
    new: int
    """For GRPO: tokens of an answer, at most."""
    beta: float
    lr: float

    def taken(self, ends: Sequence[float], losses: Sequence[float], result: str | Path) -> None:
        """Writes what each step took: `ends` are the moments at which the steps were done, in seconds."""
        seconds = [after - before for before, after in pairwise(ends)]
        told = {"seconds": seconds, "losses": [*losses], "peak": peak()}
        Path(result).write_text(json.dumps(told), encoding="utf-8")
