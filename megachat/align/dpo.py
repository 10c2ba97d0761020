"""STAGE dpo: direct preference optimisation (Rafailov et al., 2023, https://arxiv.org/abs/2305.18290).

The policy learns to prefer `chosen` to `rejected` by more than a frozen copy of itself does.
Log-probabilities are summed over the answer's tokens, not averaged: averaging favours long answers.
"""

from collections.abc import Callable, Iterator
from typing import Annotated, Any, ClassVar

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from megachat.align.logprobs import answer_logps, token_logps
from megachat.align.pairs import Data, Pair, Pairs, held_out_pairs, rendered, training_batches
from megachat.align.rows import Rows
from megachat.align.start import frozen, language_model, without_dropout
from megachat.data.conversations import Preferences
from megachat.model.blueprint import Blueprint
from megachat.train.feed import Fed
from megachat.train.loop import Batch, Losses, Running


def preference(
    policy: Pair[Float[Tensor, " batch"]], reference: Pair[Float[Tensor, " batch"]]
) -> Float[Tensor, " batch"]:
    """How much more, in nats, the policy prefers `chosen` to `rejected` than the reference does."""
    return (policy.chosen - policy.rejected) - (reference.chosen - reference.rejected)


def dpo_loss(
    policy: Pair[Float[Tensor, " batch"]],
    reference: Pair[Float[Tensor, " batch"]],
    beta: float,
    smoothing: float = 0.0,
) -> Float[Tensor, " batch"]:
    """-log sigmoid(beta * preference), where a share `smoothing` of the labels is believed to be wrong."""
    margin = beta * preference(policy, reference)
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


class DPO(Fed):
    """Learn from preferences without a reward model."""

    name: ClassVar[str] = "dpo"
    passes: ClassVar[int] = 4

    start: str
    """The stage whose model is trained on, and whose frozen copy is the reference."""
    preferences: Preferences
    """Which of two answers is better."""
    epochs: PositiveFloat
    """Passes over the preferences."""
    beta: PositiveFloat
    """How hard the policy is held to the reference; the paper uses 0.1 to 0.5."""
    smoothing: Annotated[float, Field(ge=0, lt=0.5)]
    """The share of preference labels believed to be wrong."""
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
        return {"model": start}

    def prepare(self, run: Running) -> int:
        """Loads the reference and renders the preferences; `held_out` ones are only measured."""
        run.frozen["reference"] = frozen(language_model(self, self.start, run), run)
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
        """The DPO loss, summed over pairs."""
        policy = of_pair(run.engines["model"], batch.rows)
        with run.engines["model"].inference():  # the same precision as the policy's
            reference = of_pair(run.frozen["reference"], batch.rows)
        more = preference(policy, reference)
        loss = dpo_loss(policy, reference, self.beta, self.smoothing)
        if self.imitation:
            loss = loss - self.imitation * policy.chosen / batch.rows.mask.chunk(2)[0].sum(-1)
        return Losses(
            {"model": loss.sum()},
            {
                "accuracy": (more > 0).float().sum(),
                "margin": self.beta * more.sum(),
                "logps/chosen": policy.chosen.sum(),
                "logps/rejected": policy.rejected.sum(),
            },
        )

    def measure(self, run: Running) -> dict[str, float]:
        """The loss and the accuracy on held-out preferences."""
        loss = right = pairs = 0.0
        with run.engines["model"].inference() as model:
            for batch in held_out_pairs(self, run):
                policy = of_pair(model, batch.rows)
                reference = of_pair(run.frozen["reference"], batch.rows)
                if batch.samples:
                    loss += dpo_loss(policy, reference, self.beta, self.smoothing).sum().item()
                    right += (preference(policy, reference) > 0).sum().item()
                    pairs += batch.samples
        loss, right, pairs = (run.mesh.sum(value) for value in (loss, right, pairs))
        return {"loss": loss / pairs, "accuracy": right / pairs} if pairs else {}


def of_pair(model: Callable[..., Tensor], rows: Rows) -> Pair[Tensor]:
    """The log-probability of each answer under a model, in a batch that holds the chosen ones first."""
    logps = token_logps(model(rows.tokens, where=rows.mask), rows.labels)
    chosen, rejected = answer_logps(logps, rows.mask).chunk(2)
    return Pair(chosen, rejected)
