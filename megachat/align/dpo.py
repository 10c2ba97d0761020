"""STAGE dpo: learning from preferences directly (Rafailov et al., 2023, https://arxiv.org/abs/2305.18290).

The policy learns to prefer `chosen` to `rejected` by more than a frozen copy of itself does. `loss=ipo` and
the others of `preference.py` are other ideas of how much more, and two of them do without the copy.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from megachat.align.logprobs import answer_logps, token_logps
from megachat.align.pairs import (
    Data,
    Pair,
    Pairs,
    Ranked,
    collate,
    held_out_pairs,
    rendered,
    training_batches,
)
from megachat.align.preference import Answers, Objective
from megachat.align.rows import Rows, drawn
from megachat.align.start import Adapting, anchored, language_model, without_dropout
from megachat.data.conversations import Preferences
from megachat.data.loader import places
from megachat.model.blueprint import Blueprint
from megachat.train.feed import Fed
from megachat.train.loop import Batch, Losses, Running, moved, parts


class DPO(Fed, Adapting):
    """Learn from preferences without a reward model."""

    name: ClassVar[str] = "dpo"

    start: str
    """The stage whose model is trained on, and whose frozen copy is the reference."""
    preferences: Preferences
    """Which of two answers is better."""
    epochs: PositiveFloat
    """Passes over the preferences."""
    objective: Annotated[Objective, Field(alias="loss")]
    """What a preference costs."""
    reference: Literal["live", "precomputed"]
    """`live`: the reference stays in memory and reads each batch; `precomputed`: it reads all preferences
    at the start and goes, which saves its memory, and in every epoch after the first its time."""
    imitation: NonNegativeFloat
    """Weight of -log p per token of `chosen` in the loss; 0 is plain DPO, which may lower both answers as
    long as the rejected one falls further (RPO; Pang et al., 2024, https://arxiv.org/abs/2404.19733)."""

    def reads(self) -> list[str]:
        """The tokenizer and the fine-tuned model."""
        return ["tokenizer", self.start]

    def models(self, run: Running) -> dict[str, Blueprint[Any]]:
        """The fine-tuned model."""
        start = language_model(self, self.start, run)
        without_dropout(start.model)
        return {"model": self.trainee(start)}

    def along(self) -> int:
        """The reference reads each batch, too, where there is one and it stays."""
        return int(self.objective.compares and self.reference == "live")

    def prepare(self, run: Running) -> int:
        """Loads the reference and renders the preferences; `held_out` ones are only measured."""
        train, held_out = self.preferences.preferences("train"), self.preferences.preferences("held_out")
        run.data = Data(
            rendered(train, run.tokenizer, self.context),
            rendered(held_out, run.tokenizer, self.context, needed=False),
        )
        if self.objective.compares:
            run.frozen["reference"] = anchored(self, self.start, run)
            if self.reference == "precomputed":
                run.data = precomputed(self, run)
        return max(1, round(self.epochs * len(run.data.train) / self.batch))

    def batches(self, run: Running) -> Iterator[list[Batch]]:
        """This data rank's share of the preferences of each step."""
        return training_batches(self, run, run.data.train)

    def loss(self, run: Running, batch: Pairs) -> Losses:
        """What the preferences cost, summed over pairs."""
        policy = _answers(of_pair(run.engines["model"], batch.rows), batch.rows)
        with run.engines["model"].inference():  # the same precision as the policy's
            reference = self._reference(run, batch, policy)
        loss = self.objective.cost(policy, reference)
        if self.imitation:
            loss = loss - self.imitation * policy.chosen.logps / policy.chosen.tokens
        rewards = self._rewards(policy, reference)
        return Losses(
            {"model": loss.sum()},
            {
                "accuracy": (rewards.chosen > rewards.rejected).float().sum(),
                "margin": (rewards.chosen - rewards.rejected).sum(),
                "rewards/chosen": rewards.chosen.sum(),
                "rewards/rejected": rewards.rejected.sum(),
                "logps/chosen": policy.chosen.logps.sum(),
                "logps/rejected": policy.rejected.logps.sum(),
            },
        )

    def _reference(self, run: Running, batch: Pairs, policy: Pair[Answers]) -> Pair[Answers]:
        logps = policy.chosen.logps
        if not self.objective.compares:
            nothing = torch.zeros_like(logps)
            return _answers(Pair(nothing, nothing), batch.rows)
        if batch.reference is not None:
            return _answers(Pair(*batch.reference.to(logps.dtype).chunk(2)), batch.rows)
        return _answers(of_pair(run.frozen["reference"], batch.rows), batch.rows)

    def _rewards(self, policy: Pair[Answers], reference: Pair[Answers]) -> Pair[Float[Tensor, " batch"]]:
        chosen = self.objective.reward(policy.chosen, reference.chosen)
        return Pair(chosen, self.objective.reward(policy.rejected, reference.rejected))

    def measure(self, run: Running) -> dict[str, float]:
        """The loss, the accuracy and the margin on held-out preferences."""
        loss = right = margin = pairs = 0.0
        with run.engines["model"].inference() as model:
            for batch in held_out_pairs(self, run):
                policy = _answers(of_pair(model, batch.rows), batch.rows)
                reference = self._reference(run, batch, policy)
                if batch.samples:
                    rewards = self._rewards(policy, reference)
                    loss += self.objective.cost(policy, reference).sum().item()
                    right += (rewards.chosen > rewards.rejected).sum().item()
                    margin += (rewards.chosen - rewards.rejected).sum().item()
                    pairs += batch.samples
        loss, right, margin, pairs = (run.mesh.sum(value) for value in (loss, right, margin, pairs))
        return {"loss": loss / pairs, "accuracy": right / pairs, "margin": margin / pairs} if pairs else {}


def of_pair(model: Callable[..., Tensor], rows: Rows) -> Pair[Tensor]:
    """The log-probability of each answer under a model, in a batch that holds the chosen ones first."""
    logps = token_logps(model(rows.tokens, where=rows.mask), rows.labels)
    chosen, rejected = answer_logps(logps, rows.mask).chunk(2)
    return Pair(chosen, rejected)


def _answers(logps: Pair[Tensor], rows: Rows) -> Pair[Answers]:
    chosen, rejected = rows.mask.sum(-1).chunk(2)
    return Pair(Answers(logps.chosen, chosen), Answers(logps.rejected, rejected))


def precomputed(task: DPO, run: Running) -> Data:
    """The preferences with what the reference makes of their answers; then the reference goes.

    It reads the rows that the first epoch trains on, in the same company, and those of a validation: beside
    other rows the last digit of a sum may be another, and the first loss would not be log 2 exactly.
    """
    data, reference, mesh = run.data, run.frozen.pop("reference"), run.mesh

    def known(pairs: list[Ranked], companies: Iterable[tuple[list[int], int]]) -> list[Ranked]:
        logps = torch.zeros(len(pairs), 2, dtype=torch.float64)
        for numbers, fresh in companies:
            run.watch.at("reference")
            batch = moved(collate([pairs[number] for number in numbers], run), mesh.device)
            found = of_pair(reference, batch.rows)
            logps[numbers[:fresh]] = torch.stack([found.chosen, found.rejected], 1)[:fresh].double().cpu()
        everybodys = mesh.sum_tensor(logps).tolist()
        return [replace(pair, reference=tuple(two)) for pair, two in zip(pairs, everybodys, strict=True)]

    def trained_on() -> Iterator[tuple[list[int], int]]:
        count = len(data.train)
        for start in range(0, count, task.batch):
            own = places(start, task.batch, mesh.data_rank, mesh.data)
            for part in parts(own, task.micro_batch):
                # The last batch of an epoch holds the first of the next, which are known by then.
                yield drawn(count, task.seed, part), sum(place < count for place in part)

    def only_measured() -> Iterator[tuple[list[int], int]]:
        own = places(0, len(data.held_out), mesh.data_rank, mesh.data)
        for part in parts(own, task.micro_batch):
            yield [*part], len(part)

    with run.engines["model"].inference():
        return Data(known(data.train, trained_on()), known(data.held_out, only_measured()))
