"""Answers sampled from the policy being trained, with what each judge makes of them.

The module that trains is the one that samples: there is no second copy of the weights to fall behind. It
samples from its whole distribution, since a token that top-k or top-p can never draw would still have a
probability in the loss. The probabilities an answer was sampled with are computed again, by the forward pass
and in the micro-batches that the loss uses: at the first step every ratio is then exactly 1, where those of
the cached sampler would be off by rounding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from megachat.align.advantages import gae, whiten
from megachat.align.rows import Rendered, Rows
from megachat.model.generate import Sampling, generate
from megachat.train.loop import Running, parts


@dataclass(frozen=True)
class Rollout:
    """Sampled answers, and what PPO's losses need of them, each figure at the position of its label."""

    rows: Rows
    stopped: Bool[Tensor, " batch"]
    """Which answers ended by themselves, not at the length limit."""
    scores: Float[Tensor, " batch"]
    """The reward model's, penalties not included."""
    logps: Float[Tensor, "batch seq"]
    """Of the policy that sampled."""
    reference: Float[Tensor, "batch seq"]
    """Log-probabilities under the frozen reference."""
    values: Float[Tensor, "batch seq"]
    """What the critic expected before each token."""
    entropies: Float[Tensor, "batch seq"]
    """How undecided the policy was, in nats."""

    def figures(self, run: Running) -> dict[str, float]:
        """Means over all ranks, for the log; those per answer are not weighted by its length."""
        mask = self.rows.mask
        drift = torch.where(mask, self.logps - self.reference, 0.0)
        sums = {
            "answers": torch.ones_like(self.scores).sum(),
            "tokens": mask.sum(),
            "reward/mean": self.scores.sum(),
            "reward/square": (self.scores**2).sum(),
            "kl": drift.sum(),
            "kl/k3": torch.where(mask, torch.expm1(-drift) + drift, 0.0).sum(),
            "entropy": torch.where(mask, self.entropies, 0.0).sum(),
            "answer/stopped": self.stopped.sum(),
        }
        total = run.mesh.sum_tensor(torch.stack([value.double().cpu() for value in sums.values()]))
        means = dict(zip(sums, total.tolist(), strict=True))
        answers, tokens = means.pop("answers"), means.pop("tokens")
        means = {name: value / (tokens if name == "entropy" else answers) for name, value in means.items()}
        variance = means.pop("reward/square") - means["reward/mean"] ** 2
        return means | {"reward/deviation": max(0.0, variance) ** 0.5, "answer/length": tokens / answers}


def sample(
    run: Running, prompts: Sequence[Sequence[int]], sampling: Sampling, at_once: int
) -> list[Rendered]:
    """Each prompt with an answer of the policy's, as tokens and mask. Random by torch's own generator.

    All ranks call it with equally many prompts.
    """
    assert sampling.top_k == 0, "the loss knows the whole distribution only"
    assert sampling.top_p == 1, "the loss knows the whole distribution only"
    answered: list[Rendered] = []
    with run.engines["model"].inference() as model:
        for some in parts(prompts, at_once):
            run.watch.at("rollout")
            answers = generate(
                model, some, sampling, {run.tokenizer.end}, None, run.tokenizer.pad, synced=run.synced
            )
            for prompt, answer in zip(some, answers, strict=True):
                answered.append(([*prompt, *answer], [0] * len(prompt) + [1] * len(answer)))
    return answered


def in_parts(rows: Rows, size: int, measure: Callable[[Rows], Tensor]) -> Tensor:
    """A figure for every row, measured in micro-batches of `size`."""
    count = len(rows.tokens)
    return torch.cat([measure(rows.part(first, first + size)) for first in range(0, count, size)])


def estimated(
    rollout: Rollout, rewards: Float[Tensor, "batch seq"], gamma: float, lam: float, run: Running
) -> tuple[Float[Tensor, "batch seq"], Float[Tensor, "batch seq"]]:
    """Advantages, whitened over the answers of all ranks, and returns, which are not."""
    advantages, returns = gae(rewards, rollout.values, rollout.rows.mask, gamma, lam)
    return whiten(advantages, rollout.rows.mask, run.mesh.sum_tensor), returns
