"""Answers sampled from the policy being trained, with what each judge makes of them.

The module that trains is the one that samples: there is no second copy of the weights to fall behind. It
samples from its whole distribution, since a token that top-k or top-p can never draw would still have a
probability in the loss. The probabilities an answer was sampled with are computed again, by the forward pass
and in the micro-batches that the loss uses: at the first step every ratio is then exactly 1, where those of
the cached sampler would be off by rounding.

The data ranks share the work, and then everybody has all answers with all figures: which answers form a
batch, what their advantages are whitened by, and what is logged does not depend on how many ranks there were.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from megachat.align.advantages import gae, whiten
from megachat.align.rows import Rendered, Rows
from megachat.data.loader import places
from megachat.model.generate import Request, Sampling, write
from megachat.parallel.mesh import Mesh
from megachat.train.loop import Running


@dataclass(frozen=True)
class Rollout:
    """All ranks' answers and what PPO's losses need of them, each figure at the position of its label."""

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

    def figures(self) -> dict[str, float]:
        """Means for the log; those per answer are not weighted by its length."""
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
        means = {name: value.double().item() for name, value in sums.items()}
        answers, tokens = means.pop("answers"), means.pop("tokens")
        means = {name: value / (tokens if name == "entropy" else answers) for name, value in means.items()}
        variance = means.pop("reward/square") - means["reward/mean"] ** 2
        return means | {"reward/deviation": max(0.0, variance) ** 0.5, "answer/length": tokens / answers}


def shared(count: int, mesh: Mesh) -> list[int]:
    """Which of `count` rows this data rank works on: equally many on each, under ZeRO-3 all must go along.

    Its own `places`, and the first row once more where it has one fewer than others.
    """
    own = places(0, count, mesh.data_rank, mesh.data)
    return [*own] + [0] * (math.ceil(count / mesh.data) - len(own))


def joined(figures: Tensor, count: int, mesh: Mesh) -> Tensor:
    """What all ranks have worked out of the rows that are `shared`, in their order."""
    own = places(0, count, mesh.data_rank, mesh.data)
    return mesh.join(figures[: len(own)], own, count)


def sample(
    run: Running,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    sampling: Sampling,
    at_once: int,
) -> list[Rendered]:
    """Each prompt with an answer of the policy's that follows from its seed, as tokens and mask.

    All ranks call it with all prompts and get all answers. Raises Stopped when asked to stop meanwhile.
    """
    return [
        ([*prompt, *answer.tokens], [0] * len(prompt) + [1] * len(answer.tokens))
        for prompt, answer in zip(prompts, answered(run, prompts, seeds, sampling, at_once), strict=True)
    ]


@dataclass(frozen=True)
class Answer:
    """What the policy said."""

    tokens: list[int]
    logps: list[float]
    """The sampler's log-probability of each token. Where the loss is computed with newer weights or by other
    kernels, the ratio to its own says by how much."""


def answered(
    run: Running,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    sampling: Sampling,
    at_once: int,
) -> list[Answer]:
    """An answer to each prompt, of which each rank writes its share, `at_once` side by side.

    All ranks call it with all prompts and get all answers. Raises Stopped when asked to stop meanwhile.
    """
    assert sampling.top_k == 0, "the loss knows the whole distribution only"
    assert sampling.top_p == 1, "the loss knows the whole distribution only"
    mesh = run.mesh
    requests = [
        Request(prompts[row], sampling, {run.tokenizer.end}, seeds[row]) for row in shared(len(prompts), mesh)
    ]
    answers = [Answer([], []) for _ in requests]
    looks = _Looks(run)
    looks.look()
    ended = 0
    with run.engines["model"].inference() as model:
        synced = looks.synced if run.synced else None
        for written in write(model, requests, at_once, run.tokenizer.pad, synced):
            answers[written.request].tokens.append(written.token)
            answers[written.request].logps.append(written.logp)
            ended += written.last
            # All ranks have equally many answers to write, though not at the same time.
            if written.last and not run.synced and ended % at_once == 0:
                looks.look()
    own = places(0, len(prompts), mesh.data_rank, mesh.data)
    everybodys = mesh.gather(answers[: len(own)])[:: mesh.tensor]  # of one of those that share a model
    return [*chain(*everybodys)]


class _Looks:
    """Whether to stop, which ranks have to ask together: where they take each forward pass together, after
    some of them; otherwise after some answers.
    """

    EVERY = 8
    """Forward passes between two looks."""

    def __init__(self, run: Running) -> None:
        self.run, self.passes = run, 0

    def look(self) -> None:
        """Says that the run is alive. Raises Stopped when it is to stop."""
        self.run.watch.at("rollout")
        self.run.pause()

    def synced(self, finished: bool) -> bool:
        """Whether all ranks have finished."""
        self.passes += 1
        if self.passes % self.EVERY == 0:
            self.look()
        return self.run.mesh.all(finished)


def in_parts(rows: Rows, size: int, measure: Callable[[Rows], Tensor]) -> Tensor:
    """A figure for every row, measured in micro-batches of `size`."""
    count = len(rows.tokens)
    return torch.cat([measure(rows.part(first, first + size)) for first in range(0, count, size)])


def estimated(
    rollout: Rollout, rewards: Float[Tensor, "batch seq"], gamma: float, lam: float
) -> tuple[Float[Tensor, "batch seq"], Float[Tensor, "batch seq"]]:
    """Advantages, whitened over all answers, and returns, which are not."""
    advantages, returns = gae(rewards, rollout.values, rollout.rows.mask, gamma, lam)
    return whiten(advantages, rollout.rows.mask), returns
