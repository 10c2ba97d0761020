"""STAGE rm: a reward model, one number for a conversation, higher for the answer that people preferred.

Bradley and Terry, 1952: the odds that one answer beats another are exp(the difference of their rewards). Only
differences are trained, so the scale is arbitrary and so is the zero, unless `centring` holds it.
The reward is read at the last real token, which is the end of the answer, however much padding follows.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from megachat.align.pairs import Data, Pairs, held_out_pairs, rendered, training_batches
from megachat.align.start import language_model
from megachat.data.conversations import Preferences
from megachat.model.blueprint import Blueprint
from megachat.model.heads import scored
from megachat.train.feed import Fed
from megachat.train.loop import Batch, Losses, Running


def bradley_terry(
    chosen: Float[Tensor, " batch"], rejected: Float[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """-log of the probability that `chosen` is preferred."""
    return -F.logsigmoid(chosen.float() - rejected.float())


def last_score(
    scores: Float[Tensor, "batch seq"], real: Bool[Tensor, "batch seq"]
) -> Float[Tensor, " batch"]:
    """The score at the last real position of each row; padding is told by `real`, never by a token id."""
    positions = torch.arange(real.shape[1], device=real.device)
    last = torch.where(real, positions, 0).amax(-1, keepdim=True)
    return scores.gather(1, last).squeeze(1)


class RM(Fed):
    """Learn to score answers as people prefer them."""

    name: ClassVar[str] = "rm"

    start: str
    """The stage whose model is the trunk."""
    preferences: Preferences
    """Which of two answers is better."""
    epochs: PositiveFloat
    """Passes over the preferences."""
    centring: NonNegativeFloat
    """Weight of (chosen + rejected)^2, which holds the zero of the scores between the two
    (Eisenstein et al., 2023, https://arxiv.org/abs/2312.09244)."""

    def reads(self) -> list[str]:
        """The tokenizer and the fine-tuned model."""
        return ["tokenizer", self.start]

    def models(self, run: Running) -> dict[str, Blueprint[Any]]:
        """The fine-tuned model with a fresh score in place of its output layer."""
        return {"model": scored(language_model(self, self.start, run))}

    def prepare(self, run: Running) -> int:
        """Renders the preferences; `held_out` ones are only measured."""
        train, held_out = self.preferences.preferences("train"), self.preferences.preferences("held_out")
        run.data = Data(
            rendered(train, run.tokenizer, self.context),
            rendered(held_out, run.tokenizer, self.context, needed=False),
        )
        return max(1, round(self.epochs * len(run.data.train) / self.batch))

    def batches(self, run: Running) -> Iterator[list[Batch]]:
        """This data rank's share of the preferences of each step."""
        return training_batches(self, run, run.data.train)

    def loss(self, run: Running, batch: Pairs) -> Losses:
        """Bradley-Terry, summed over pairs."""
        scores = run.engines["model"](batch.rows.tokens)
        chosen, rejected = last_score(scores, batch.rows.real).chunk(2)
        loss = bradley_terry(chosen, rejected) + self.centring * (chosen + rejected) ** 2
        return Losses(
            {"model": loss.sum()},
            {"accuracy": won(chosen, rejected), "margin": (chosen - rejected).sum()},
        )

    def measure(self, run: Running) -> dict[str, float]:
        """How often the better of two held-out answers is told, and by how much."""
        right = margin = pairs = 0.0
        with run.engines["model"].inference() as model:
            for batch in held_out_pairs(self, run):
                chosen, rejected = last_score(model(batch.rows.tokens), batch.rows.real).chunk(2)
                if batch.samples:
                    right += won(chosen, rejected).item()
                    margin += (chosen - rejected).sum().item()
                    pairs += batch.samples
        right, margin, pairs = (run.mesh.sum(value) for value in (right, margin, pairs))
        return {"accuracy": right / pairs, "margin": margin / pairs} if pairs else {}


def won(chosen: Float[Tensor, " batch"], rejected: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    """How many pairs are ranked right; a tie is half a pair."""
    return (chosen > rejected).float().sum() + 0.5 * (chosen == rejected).float().sum()
