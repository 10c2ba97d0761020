"""Preferences as batches: what the reward model and DPO train on.

A batch holds the chosen answers in its first half and the rejected ones in its second, so that both go
through the model in one forward; of rankings first all best answers, then all second ones, and so on. Only
the answer and its stop token are trained on, never the conversation that led to them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Generic, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from megachat.align.rows import Rendered, Rows, drawn, padded, that_fit
from megachat.data.conversations import Preference, Ranking
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
    margin: float = 0.0
    """By how much each is better than the next, where that is known."""
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
    """The best answer to every prompt, then the second to every prompt, and so on: of pairs first the chosen
    ones, then as many rejected."""
    better: Int[Tensor, " pairs"]
    """Which rows are preferred, one for each two answers of a prompt."""
    worse: Int[Tensor, " pairs"]
    """Which rows they are preferred to."""
    share: Float[Tensor, " pairs"]
    """What each pair counts, so that a prompt counts 1 however many answers it has."""
    margin: Float[Tensor, " pairs"]
    """By how much the better is better, where that is known."""
    reference: Float[Tensor, " rows"] | None
    """The log-probability of each answer under the reference, where it is known beforehand."""


@dataclass
class Data:
    """What a stage that learns from preferences reads."""

    train: list[Ranked]
    held_out: list[Ranked]
    """Pairs that are only measured."""


def rendered(
    preferences: Sequence[Preference | Ranking], tokenizer: Tokenizer, context: int, needed: bool = True
) -> list[Ranked]:
    """Prompt and answer as tokens, trained on from the first token of the answer to its stop token."""
    ranked = []
    for one in preferences:
        prompt = render_prompt(one.prompt, tokenizer)
        texts = one.answers if isinstance(one, Ranking) else (one.chosen, one.rejected)
        answers = [render_answer(text, tokenizer) for text in texts]
        both = tuple((prompt + answer, [0] * len(prompt) + [1] * len(answer)) for answer in answers)
        ranked.append(Ranked(both, one.margin))
    return that_fit(
        ranked, lambda one: max(len(tokens) for tokens, _ in one.answers), context, "preferences", needed
    )


def collate(ranked: Sequence[Ranked], run: Running) -> Pairs:
    """A micro-batch; a prompt weighs 1 however long its answers are, and however many."""
    most = max(len(one.answers) for one in ranked)
    places = [(item, place) for place in range(most) for item, one in enumerate(ranked)]
    places = [(item, place) for item, place in places if place < len(ranked[item].answers)]
    row = {place: number for number, place in enumerate(places)}
    rows = padded([ranked[item].answers[place] for item, place in places], run.tokenizer.pad)
    pairs = [
        (row[item, better], row[item, worse], 1 / math.comb(len(one.answers), 2), one.margin)
        for item, one in enumerate(ranked)
        for better, worse in combinations(range(len(one.answers)), 2)
    ]
    better, worse, share, margin = (torch.tensor(column) for column in zip(*pairs, strict=True))
    known = [ranked[item].reference[place] for item, place in places if ranked[item].reference]
    return Pairs(
        weight=float(len(ranked)),
        work=rows.work(),
        samples=len(ranked),
        rows=rows,
        better=better,
        worse=worse,
        share=share,
        margin=margin,
        reference=torch.tensor(known, dtype=torch.float64) if known else None,
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
