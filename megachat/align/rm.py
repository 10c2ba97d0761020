"""STAGE rm: a reward model, one number for a conversation, higher for the answer that people preferred.

Bradley and Terry, 1952: the odds that one answer beats another are exp(the difference of their rewards). Only
differences are trained, so the scale is arbitrary and so is the zero, unless `centring` holds it.
The reward is read at the last real token, which is the end of the answer, however much padding follows.
Of K answers to a prompt, the best first, all pairs are compared (Ouyang et al., 2022,
https://arxiv.org/abs/2203.02155). With the model goes what its scores are like on what it was trained on.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from megachat.align.pairs import Data, Pairs, collate, held_out_pairs, rendered, training_batches
from megachat.align.start import Adapting, language_model
from megachat.data.conversations import Preference, Preferences, Ranking, Rankings, Split
from megachat.log import say
from megachat.model.blueprint import Blueprint
from megachat.model.heads import Scalar, scored
from megachat.train.feed import Fed
from megachat.train.loop import Batch, Losses, Running, measured


def bradley_terry(
    chosen: Float[Tensor, " batch"],
    rejected: Float[Tensor, " batch"],
    margin: Float[Tensor, " batch"] | float = 0.0,
    smoothing: float = 0.0,
) -> Float[Tensor, " batch"]:
    """-log of the probability that `chosen` is preferred.

    It is to lead by `margin` before it counts as better at all (Touvron et al., 2023,
    https://arxiv.org/abs/2307.09288, section 3.2.2); a share `smoothing` of labels is believed to be wrong.
    """
    lead = chosen.float() - rejected.float() - margin
    return -(1 - smoothing) * F.logsigmoid(lead) - smoothing * F.logsigmoid(-lead)


def last_score(
    scores: Float[Tensor, "batch seq"], real: Bool[Tensor, "batch seq"]
) -> Float[Tensor, " batch"]:
    """The score at the last real position of each row; padding is told by `real`, never by a token id."""
    positions = torch.arange(real.shape[1], device=real.device)
    last = torch.where(real, positions, 0).amax(-1, keepdim=True)
    return scores.gather(1, last).squeeze(1)


class RM(Fed, Adapting):
    """Learn to score answers as people prefer them."""

    name: ClassVar[str] = "rm"
    exact: ClassVar[bool] = False

    start: str
    """The stage whose model is the trunk."""
    preferences: Preferences
    """Which of two answers is better."""
    epochs: PositiveFloat
    """Passes over the preferences."""
    smoothing: Annotated[float, Field(ge=0, lt=0.5)]
    """The share of preference labels believed to be wrong."""
    centring: NonNegativeFloat
    """Weight of (chosen + rejected)^2, which holds the zero of the scores between the two
    (Eisenstein et al., 2023, https://arxiv.org/abs/2312.09244)."""

    def reads(self) -> list[str]:
        """The tokenizer and the fine-tuned model."""
        return ["tokenizer", self.start]

    def models(self, run: Running) -> dict[str, Blueprint[Any]]:
        """The fine-tuned model with a fresh score in place of its output layer."""
        return {"model": self.trainee(scored(language_model(self, self.start, run)))}

    def prepare(self, run: Running) -> int:
        """Renders the preferences; `held_out` ones are only measured."""
        train, held_out = self._read("train"), self._read("held_out")
        run.data = Data(
            rendered(train, run.tokenizer, self.context),
            rendered(held_out, run.tokenizer, self.context, needed=False),
        )
        return max(1, round(self.epochs * len(run.data.train) / self.batch))

    def _read(self, split: Split) -> Sequence[Preference | Ranking]:
        """All answers to a prompt stay together: they are no independent samples, and taken apart they
        overfit in one epoch (Ouyang et al., 2022, https://arxiv.org/abs/2203.02155, section 3.5)."""
        if isinstance(self.preferences, Rankings):
            return self.preferences.rankings(split)
        return self.preferences.preferences(split)

    def batches(self, run: Running) -> Iterator[list[Batch]]:
        """This data rank's share of the preferences of each step."""
        return training_batches(self, run, run.data.train)

    def loss(self, run: Running, batch: Pairs) -> Losses:
        """Bradley-Terry over all two answers to a prompt, averaged per prompt and summed over prompts."""
        scores = last_score(run.engines["model"](batch.rows.tokens), batch.rows.real)
        chosen, rejected, share = scores[batch.better], scores[batch.worse], batch.share
        loss = bradley_terry(chosen, rejected, batch.margin, self.smoothing)
        loss = loss + self.centring * (chosen + rejected) ** 2
        return Losses(
            {"model": (share * loss).sum()},
            {
                "accuracy": won(chosen, rejected, share),
                "margin": (share * (chosen - rejected)).sum(),
                "rewards/chosen": (share * chosen).sum(),
                "rewards/rejected": (share * rejected).sum(),
            },
        )

    def measure(self, run: Running) -> dict[str, float]:
        """How often the better of two held-out answers is told and by how much, and how far scores reach."""
        right = margin = prompts = 0.0
        least, most = math.inf, -math.inf
        with run.engines["model"].inference() as model:
            for batch in held_out_pairs(self, run):
                scores = last_score(model(batch.rows.tokens), batch.rows.real)
                chosen, rejected = scores[batch.better], scores[batch.worse]
                if batch.samples:
                    right += won(chosen, rejected, batch.share).item()
                    margin += (batch.share * (chosen - rejected)).sum().item()
                    prompts += batch.samples
                    least, most = min(least, scores.min().item()), max(most, scores.max().item())
        right, margin, prompts = (run.mesh.sum(value) for value in (right, margin, prompts))
        if not prompts:
            return {}
        return {
            "accuracy": right / prompts,
            "margin": margin / prompts,
            "reward/min": min(run.mesh.gather(least)),
            "reward/max": max(run.mesh.gather(most)),
        }

    def conclude(self, run: Running) -> None:
        """The mean and the deviation of the scores of all answers trained on become the model's own."""
        sums = torch.zeros(3, dtype=torch.float64)
        train = run.data.train
        with run.engines["model"].inference() as model:
            for batch in measured(train, self.micro_batch, run, lambda part: collate(part, run)):
                scores = last_score(model(batch.rows.tokens), batch.rows.real).double()
                if batch.samples:
                    sums += torch.stack([torch.ones_like(scores), scores, scores**2]).sum(-1).cpu()
        count, total, squares = run.mesh.sum_tensor(sums).tolist()
        module = cast(Scalar, run.engines["model"].module)
        module.mean = total / count
        module.deviation = max(0.0, squares / count - module.mean**2) ** 0.5
        say(f"rm: scores of {module.mean:.3f} on average, deviation {module.deviation:.3f}")


def won(
    chosen: Float[Tensor, " batch"],
    rejected: Float[Tensor, " batch"],
    share: Float[Tensor, " batch"] | float = 1.0,
) -> Float[Tensor, ""]:
    """How many pairs are ranked right, each counting its share; a tie is half a pair."""
    return (share * ((chosen > rejected).float() + 0.5 * (chosen == rejected).float())).sum()
