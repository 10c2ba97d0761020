"""STAGE kto: learning from single answers that are good or bad (Ethayarajh et al., 2024,
https://arxiv.org/abs/2402.01306).

No answer needs another to be compared with. What it is compared with is the baseline: how much likelier the
policy finds any answer than the reference does, their KL divergence. It is estimated on prompts with the
answers to other prompts, over all of a step's batch, before the step: so the loss is the same whatever the
micro-batches and the number of ranks. No gradient flows through it, and it is never below 0.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Bool, Float
from pydantic import NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor

from megachat.align.logprobs import answer_logps, token_logps
from megachat.align.preference import kto_loss
from megachat.align.rows import Rows, drawn, padded, that_fit
from megachat.align.start import Adapting, anchored, language_model, without_dropout
from megachat.data.conversations import Split, UnpairedPreferences
from megachat.data.loader import places
from megachat.model.blueprint import Blueprint
from megachat.tokenizer.chat_format import render_answer, render_prompt
from megachat.train.feed import Fed, fed
from megachat.train.loop import Batch, Losses, Running, measured, micro_batches


@dataclass(frozen=True)
class Item:
    """An answer to a prompt, as tokens."""

    prompt: list[int]
    answer: list[int]
    """With the stop token."""
    good: bool


@dataclass(frozen=True)
class Judged(Batch):
    """A micro-batch of answers that are good or bad."""

    rows: Rows
    """The answers, each after its prompt."""
    others: Rows
    """The same prompts, each before the answer to another one."""
    good: Bool[Tensor, " batch"]
    baseline: Float[Tensor, ""] = field(default_factory=lambda: torch.zeros(()))


@dataclass
class Data:
    """What KTO reads."""

    train: list[Item]
    held_out: list[Item]
    """Answers that are only measured."""


class KTO(Fed, Adapting):
    """Learn from answers that are good or bad, each by itself."""

    name: ClassVar[str] = "kto"

    start: str
    """The stage whose model is trained on, and whose frozen copy is the reference."""
    unpaired: UnpairedPreferences
    """Answers, and whether they are good."""
    epochs: PositiveFloat
    """Passes over the answers."""
    beta: PositiveFloat
    """How hard the policy is held to the reference; the paper uses 0.1."""
    desirable: NonNegativeFloat
    """What a good answer weighs."""
    undesirable: NonNegativeFloat
    """What a bad answer weighs. The paper wants (desirable * good ones) / (undesirable * bad ones) to be
    between 1 and 4/3."""

    @model_validator(mode="after")
    def _others(self) -> "KTO":
        if self.batch < 2:
            raise ValueError("batch=1 has no other answer to compare with; use batch=2 or more")
        return self

    def along(self) -> int:
        """The reference reads the answers; it and the policy read those of others."""
        return 3

    def reads(self) -> list[str]:
        """The tokenizer and the fine-tuned model."""
        return ["tokenizer", self.start]

    def models(self, run: Running) -> dict[str, Blueprint[Any]]:
        """The fine-tuned model."""
        start = language_model(self, self.start, run)
        without_dropout(start.model)
        return {"model": self.trainee(start)}

    def prepare(self, run: Running) -> int:
        """Loads the reference and renders the answers; `held_out` ones are only measured."""
        run.data = Data(self._rendered("train", run), self._rendered("held_out", run))
        run.frozen["reference"] = anchored(self, self.start, run)
        return max(1, round(self.epochs * len(run.data.train) / self.batch))

    def _rendered(self, split: Split, run: Running) -> list[Item]:
        items = [
            Item(render_prompt(one.prompt, run.tokenizer), render_answer(one.answer, run.tokenizer), one.good)
            for one in self.unpaired.unpaired(split)
        ]
        return that_fit(
            items, lambda item: len(item.prompt) + len(item.answer), self.context, "answers", split == "train"
        )

    def batches(self, run: Running) -> Iterator[list[Batch]]:
        """This data rank's share of the answers of each step, with the baseline of all of them."""
        mesh, most, items = run.mesh, math.ceil(self.batch / run.mesh.data), run.data.train

        def make(start: int) -> list[Judged]:
            # Of the whole step, whichever rank reads which: whose answer stands in for whose.
            order = drawn(len(items), self.seed, range(start, start + self.batch))
            beside = [*zip(order, [*order[1:], order[0]], strict=True)]
            own = places(0, self.batch, mesh.data_rank, mesh.data)
            pairs = [(items[one], items[other]) for one, other in beside[own.start : own.stop]]
            return [*micro_batches(pairs, most, self.micro_batch, lambda part: self._collate(part, run))]

        for step in fed(self, run, make):
            baseline = self._baseline(step, run)
            yield [replace(cast(Judged, batch), baseline=baseline) for batch in step]

    def _collate(self, pairs: Sequence[tuple[Item, Item]], run: Running) -> Judged:
        def with_answer(prompt: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
            answer = answer[: self.context - len(prompt)]  # another's may be too long; it is not trained on
            return prompt + answer, [0] * len(prompt) + [1] * len(answer)

        rows = padded([with_answer(item.prompt, item.answer) for item, _ in pairs], run.tokenizer.pad)
        others = padded([with_answer(item.prompt, other.answer) for item, other in pairs], run.tokenizer.pad)
        return Judged(
            weight=float(len(pairs)),
            work=rows.work(),
            samples=len(pairs),
            rows=rows,
            others=others,
            good=torch.tensor([item.good for item, _ in pairs]),
        )

    def _baseline(self, step: Sequence[Any], run: Running) -> Float[Tensor, ""]:
        """The KL divergence from the reference, as far as all ranks' answers of a step tell."""
        total = 0.0
        with run.engines["model"].inference() as model:
            for batch in step:
                run.watch.at("baseline")
                leads = _leads(model, run.frozen["reference"], batch.others)
                total += leads.double().sum().item() if batch.samples else 0.0
        return torch.tensor(max(0.0, run.mesh.sum(total) / self.batch), device=run.mesh.device)

    def loss(self, run: Running, batch: Judged) -> Losses:
        """What the answers cost, summed."""
        engine = run.engines["model"]
        policy = _logps(engine, batch.rows)
        with engine.inference():  # the same precision as the policy's
            reference = _logps(run.frozen["reference"], batch.rows)
        leads, good = policy - reference, batch.good
        loss = kto_loss(leads, good, batch.baseline, self.beta, self.desirable, self.undesirable)
        return Losses(
            {"model": loss.sum()},
            {
                "accuracy": ((leads > batch.baseline) == good).float().sum(),
                "margin": self.beta * torch.where(good, leads, -leads).sum(),
                "kl": batch.baseline * len(leads),
                "logps": policy.sum(),
            },
        )

    def measure(self, run: Running) -> dict[str, float]:
        """The loss, and the rewards of good and of bad answers, on those that are held out."""
        items = run.data.held_out
        pairs = [*zip(items, [*items[1:], *items[:1]], strict=True)]
        reference, found = run.frozen["reference"], []
        total = 0.0
        with run.engines["model"].inference() as model:
            for batch in measured(pairs, self.micro_batch, run, lambda part: self._collate(part, run)):
                leads = _leads(model, reference, batch.rows)
                others = _leads(model, reference, batch.others)
                if batch.samples:
                    found.append((leads.double(), batch.good))
                    total += others.double().sum().item()
        if not items:
            return {}
        baseline = torch.tensor(max(0.0, run.mesh.sum(total) / len(items)), dtype=torch.float64)
        sums = torch.zeros(5, dtype=torch.float64)
        for leads, good in found:
            leads, good = leads.cpu(), good.cpu()
            loss = kto_loss(leads, good, baseline, self.beta, self.desirable, self.undesirable)
            right = (leads > baseline) == good
            rewards = self.beta * leads
            sums += torch.stack(
                [
                    loss.sum(),
                    right.double().sum(),
                    good.double().sum(),
                    rewards[good].sum(),
                    rewards[~good].sum(),
                ]
            )
        loss_sum, right_sum, goods, of_good, of_bad = run.mesh.sum_tensor(sums).tolist()
        figures = {"loss": loss_sum / len(items), "accuracy": right_sum / len(items), "kl": baseline.item()}
        if goods:
            figures["rewards/good"] = of_good / goods
        if goods < len(items):
            figures["rewards/bad"] = of_bad / (len(items) - goods)
        return figures


def _logps(model: Callable[..., Tensor], rows: Rows) -> Float[Tensor, " batch"]:
    """The log-probability of each answer."""
    return answer_logps(token_logps(model(rows.tokens, where=rows.mask), rows.labels), rows.mask)


def _leads(
    policy: Callable[..., Tensor], reference: Callable[..., Tensor], rows: Rows
) -> Float[Tensor, " batch"]:
    """How much likelier the policy finds each answer than the reference does, in nats."""
    return _logps(policy, rows) - _logps(reference, rows)
