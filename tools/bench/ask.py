"""What a program that writes is given, and how it tells what it took; `rl.py` compares them.

A runner in `runners/` reads an ask, answers its prompts again and again, and writes how long each
round took. It runs in the environment of what it runs, so only Python's own library may be imported here.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.bench.clock import peak
from tools.bench.on_file import OnFile


@dataclass(frozen=True, kw_only=True)
class Ask(OnFile):
    """The same for all of a table."""

    weights: str
    """A safetensors file, by megachat's names."""
    model: dict[str, Any]
    """The shape, by the names of `megachat.model.gpt.GPTConfig`."""
    vocab: int
    precision: str
    """`float32` or `bfloat16`."""
    prompts: list[list[int]]
    new: int
    """Tokens of an answer, at most."""
    temperature: float
    """0 takes the likeliest token every time."""
    stop: list[int]
    """The tokens that end an answer."""
    rounds: int

    def answered(self, answer: Callable[[int], list[list[int]]], result: str | Path) -> None:
        """Has the prompts answered, with round 0 as warm-up; writes what each round took, and what 0 said.

        `answer` gets the number of the round, which is to change what is drawn.
        """
        first = answer(0)
        seconds, tokens = [], []
        for number in range(1, self.rounds + 1):
            begun = time.perf_counter()
            answers = answer(number)
            seconds.append(time.perf_counter() - begun)
            tokens.append(sum(map(len, answers)))
        told = {"seconds": seconds, "tokens": tokens, "peak": peak(), "answers": first}
        Path(result).write_text(json.dumps(told), encoding="utf-8")


def until(tokens: list[int], stop: list[int]) -> list[int]:
    """Up to and with the first that is in `stop`: what others pad, cut."""
    ends = [place for place, token in enumerate(tokens) if token in stop]
    return tokens[: ends[0] + 1] if ends else tokens
