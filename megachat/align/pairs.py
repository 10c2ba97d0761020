"""Preferences as batches: what the reward model and DPO train on.

A batch holds the chosen answers in its first half and the rejected ones in its second, so that both go
through the model in one forward. Only the answer and its stop token are trained on, never the conversation
that led to them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from megachat.align.rows import Rendered, Rows, drawn, padded, that_fit
from megachat.data.conversations import Preference
from megachat.data.loader import places
from megachat.tokenizer.chat_format import render_answer, render_prompt
from megachat.tokenizer.tokenizer import Tokenizer
from megachat.train.feed import Fed, fed
from megachat.train.loop import Batch, Running, Task, measured, micro_batches

T = TypeVar("T")


@dataclass(frozen=True)
class Pair(Generic[T]):
    """One thing for the preferred answer and one for the other."""

    chosen: T
    rejected: T


@dataclass(frozen=True)
class Ranked:
    """The answers to one prompt, rendered with it, the best first."""

    answers: tuple[Rendered, ...]
    reference: tuple[float, ...] = ()
    """The log-probability of each under a reference, where it is known beforehand."""

    @property
    def chosen(self) -> Rendered:
        """The best."""
        return self.answers[0]

    @property
    def rejected(self) -> Rendered:
        """The worst."""
        return self.answers[-1]


@dataclass(frozen=True)
class Pairs(Batch):
    """A micro-batch of preferences."""

    rows: Rows
    """The chosen answers, then as many rejected ones."""
    reference: Float[Tensor, " rows"] | None
    """The log-probability of each answer under the reference, where it is known beforehand."""


@dataclass
class Data:
    """What a stage that learns from preferences reads."""

    train: list[Ranked]
    held_out: list[Ranked]
    """Pairs that are only measured."""


def rendered(
    preferences: Sequence[Preference], tokenizer: Tokenizer, context: int, needed: bool = True
) -> list[Ranked]:
    """Prompt and answer as tokens, trained on from the first token of the answer to its stop token."""
    pairs = []
    for preference in preferences:
        prompt = render_prompt(preference.prompt, tokenizer)

        def with_answer(text: str, prompt: list[int] = prompt) -> Rendered:
            answer = render_answer(text, tokenizer)
            return prompt + answer, [0] * len(prompt) + [1] * len(answer)

        pairs.append(Ranked((with_answer(preference.chosen), with_answer(preference.rejected))))
    return that_fit(
        pairs, lambda pair: max(len(tokens) for tokens, _ in pair.answers), context, "preferences", needed
    )


def collate(pairs: Sequence[Ranked], run: Running) -> Pairs:
    """A micro-batch; a pair weighs 1 however long it is."""
    rows = padded([pair.chosen for pair in pairs] + [pair.rejected for pair in pairs], run.tokenizer.pad)
    known = list(zip(*(pair.reference for pair in pairs), strict=True))
    return Pairs(
        weight=float(len(pairs)),
        work=rows.work(),
        samples=len(pairs),
        rows=rows,
        reference=torch.tensor(known, dtype=torch.float64).flatten() if known else None,
    )


def training_batches(task: Fed, run: Running, pairs: Sequence[Ranked]) -> Iterator[list[Batch]]:
    """This data rank's share of each step, from the run's position in the data on."""
    mesh, most = run.mesh, math.ceil(task.batch / run.mesh.data)

    def make(start: int) -> list[Pairs]:
        own = places(start, task.batch, mesh.data_rank, mesh.data)
        chosen = [pairs[index] for index in drawn(len(pairs), task.seed, own)]
        return [*micro_batches(chosen, most, task.micro_batch, lambda part: collate(part, run))]

    return fed(task, run, make)


def held_out_pairs(task: Task, run: Running) -> Iterator[Pairs]:
    """This data rank's share of the pairs that are only measured."""
    return measured(run.data.held_out, task.micro_batch, run, lambda part: collate(part, run))
