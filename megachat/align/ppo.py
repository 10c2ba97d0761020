"""STAGE ppo: proximal policy optimisation (Schulman et al., 2017, https://arxiv.org/abs/1707.06347).

A policy answers, a reward model scores, a critic foresees the score. The distance to a frozen reference is in
the reward, as k1 = log p - log p_reference of the sampled token. There its gradient is exactly that of the
KL-regularised objective; in the loss k1 has a gradient of 0 and k3 a wrong one. The stop token is an action
like any other, and the reward model's score is paid on it.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from megachat.align.answers import Question, in_words
from megachat.align.policy import (
    Clip,
    clipped_policy_loss,
    explained_variance,
    held_back,
    kl_rewards,
    log_ratio,
)
from megachat.align.rm import last_score
from megachat.align.rollout import Rolling, Rollout, as_rows, estimated, repetition
from megachat.align.rows import Rows, drawn
from megachat.align.start import anchored, frozen, language_model, scorer, without_dropout
from megachat.align.text import Text, beside, opened, text_loss
from megachat.data.loader import share
from megachat.data.mixture import Mixture
from megachat.model.blueprint import Blueprint
from megachat.model.draws import seed_of
from megachat.train.loop import Batch, Losses, Running, micro_batches, parts


def adapted(coefficient: float, kl: float, target: float, answers: int, horizon: int) -> float:
    """The coefficient after a rollout of so many answers, whose distance was `kl` (Ziegler et al., 2019,
    https://arxiv.org/abs/1909.08593): up by at most a fifth for each `horizon` of answers, or down.

    Example: adapted(0.1, kl=12, target=6, answers=100, horizon=1000) -> 0.1 * (1 + 0.2 * 0.1) = 0.102
    """
    error = min(0.2, max(-0.2, kl / target - 1))
    return coefficient * (1 + error * answers / horizon)


def counted(state: dict[str, Any], scores: Float[Tensor, " batch"]) -> dict[str, float]:
    """Number, mean and sum of squared deviations of all scores so far, these included (Chan et al., 1979)."""
    new = scores.double()
    count, mean, squares = (float(state.get(f"reward/{name}", 0.0)) for name in ("count", "mean", "squares"))
    more, centre = float(len(new)), new.mean().item()
    total, apart = count + more, centre - mean
    return {
        "reward/count": total,
        "reward/mean": mean + apart * more / total,
        "reward/squares": squares + ((new - centre) ** 2).sum().item() + apart**2 * count * more / total,
    }


def clipped_value_loss(
    new: Float[Tensor, "batch seq"],
    old: Float[Tensor, "batch seq"],
    returns: Float[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    clip: float,
) -> Float[Tensor, "batch seq"]:
    """Half the squared error of the value, or of it held within `clip` of the old: the worse of the two."""
    new, old, returns = (torch.where(mask, x, 0.0) for x in (new, old, returns))
    held = old + (new - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((new - returns) ** 2, (held - returns) ** 2)


@dataclass(frozen=True)
class Sampled(Batch):
    """A micro-batch of sampled answers."""

    rows: Rows
    logps: Float[Tensor, "batch seq"]
    values: Float[Tensor, "batch seq"]
    advantages: Float[Tensor, "batch seq"]
    returns: Float[Tensor, "batch seq"]
    weights: Float[Tensor, "batch seq"] | None = None
    """What the policy's loss of each token counts; None: 1."""


class PPO(Rolling):
    """Learn from a reward model, by sampling answers and making the better ones likelier."""

    name: ClassVar[str] = "ppo"

    reward: str
    """The stage whose model scores the answers; the critic starts from it, too."""
    kl: NonNegativeFloat
    """What a nat of distance from the reference costs, in the reward model's units."""
    kl_target: PositiveFloat | None
    """Nats per answer that the policy is to keep from the reference: what one costs, at first `kl`, rises
    while it is farther and falls while it is nearer. null: the cost stays."""
    kl_horizon: PositiveInt
    """Answers over which the cost may change by a fifth."""
    reward_scale: Literal["none", "model", "running"]
    """Scores count as deviations from a mean, in standard deviations: of the answers that the reward `model`
    was trained on, or of all that have been sampled so far (`running`)."""
    reward_clip: PositiveFloat | None
    """A score counts at most this much, up or down, after `reward_scale`; null: in full."""
    unfinished: NonNegativeFloat
    """What an answer that does not stop by itself costs, in the reward model's units."""
    clip_ratio: PositiveFloat
    """How far from 1 a token's probability ratio may move for gain in one rollout; the paper uses 0.2."""
    clip_value: PositiveFloat
    """How far a value may move towards its return in one rollout, in the reward model's units."""
    gamma: Annotated[float, Field(gt=0, le=1)]
    """What a reward is worth one token earlier."""
    lam: Annotated[float, Field(ge=0, le=1)]
    """How far advantages look ahead: 1 is to the end of the answer, 0 one token."""
    critic_first: NonNegativeInt
    """Rollouts in which the critic learns alone."""
    critic_rate: PositiveFloat
    """The critic's learning rate as a multiple of the policy's, which is `optimizer.lr`."""
    pretraining_mix: NonNegativeFloat
    """PPO-ptx: what a nat of the mean loss of text, token by token, counts beside the policy's loss; 0 reads
    none."""
    pretraining_rows: PositiveInt
    """Rows of `context` tokens of text in each step, over all ranks."""
    mixture: Mixture
    """How often each source of that text is read."""

    def reads(self) -> list[str]:
        """The tokenizer, the fine-tuned model, the reward model, and the text that is mixed in."""
        return ["tokenizer", self.start, self.reward, *(["encode"] if self.pretraining_mix else [])]

    def models(self, run: Running) -> dict[str, Blueprint[Any]]:
        """The fine-tuned model, and a critic that starts as the reward model."""
        models: dict[str, Blueprint[Any]] = {
            "model": language_model(self, self.start, run),
            "critic": scorer(self, self.reward, run),
        }
        for start in models.values():
            without_dropout(start.model)
        return {role: self.trainee(start) for role, start in models.items()}

    def prepare(self, run: Running) -> int:
        """Loads the two judges and renders the prompts."""
        run.frozen = {
            "reference": anchored(self, self.start, run),
            "reward": frozen(scorer(self, self.reward, run), run),
        }
        run.data = self.asked(run)
        if self.pretraining_mix:
            run.data.text = opened(self.input("encode"), self.mixture, self.context, self.seed, run)
        return self.rollouts * self.steps

    def batches(self, run: Running) -> Iterator[list[Batch]]:
        """Samples a rollout, then goes over it `epochs` times in batches, each time in another order."""
        first, state = True, run.progress.state
        while True:
            number = self.number(run)
            begun = time.monotonic()
            rollout = self._sample(run, number)
            state |= {"prompts": (number + 1) * self.rollout} | counted(state, rollout.scores)
            rewards = self._rewards(rollout, state, run.frozen["reward"])
            advantages, returns = estimated(rollout, rewards, self.gamma, self.lam)
            figures = rollout.figures() | {"answer/repetition": repetition(rollout.said)}
            run.notes |= self.watched(rollout, figures, run) | {
                "kl/coefficient": state.get("kl", self.kl),
                "critic/explained_variance": explained_variance(rollout.values, returns, rollout.rows.mask),
                "rollout/seconds": time.monotonic() - begun,
            }
            self.shown(rollout.whole, {"reward": rollout.scores}, "rollout", run)
            self.ahead(partial(self._asks, number + 1, run), run)
            if self.kl_target is not None:
                cost = state.get("kl", self.kl)
                state["kl"] = adapted(cost, figures["kl"], self.kl_target, self.rollout, self.kl_horizon)
            steps = self._passes(number, rollout, advantages, returns, run)
            if first:
                steps = self.checked(steps, rollout, run)
            if self.pretraining_mix:
                steps = beside(steps, run.data.text, self.pretraining_rows, self.micro_batch, run)
            first = False
            yield from steps

    def _passes(
        self,
        number: int,
        rollout: Rollout,
        advantages: Float[Tensor, "all seq"],
        returns: Float[Tensor, "all seq"],
        run: Running,
    ) -> Iterator[list[Batch]]:
        count, most = len(rollout.rows.tokens), math.ceil(self.batch / run.mesh.data)

        weights = rollout.weights(self.importance_cap)

        def taken(chosen: Sequence[int]) -> Sampled:
            return _taken(rollout, advantages, returns, weights, torch.tensor(chosen))

        for epoch in range(self.epochs):
            order = drawn(count, self.seed + number, range(epoch * count, (epoch + 1) * count))
            for chosen in parts(order, self.batch):
                own = share(chosen, 0, self.batch, run.mesh.data_rank, run.mesh.data)
                yield [*micro_batches(own, most, self.micro_batch, taken)]

    def _sample(self, run: Running, number: int) -> Rollout:
        questions, seeds = self._asks(number, run)
        answers = self.written(questions, seeds, run)
        run.watch.at("score")
        whole = in_words(questions, answers, run.tokenizer)
        rows = self.rows(questions, answers, run)
        policy, critic = run.engines["model"], run.engines["critic"]
        reference, reward = run.frozen["reference"], run.frozen["reward"]

        def judged(judge: Callable[[Rows], Tensor]) -> Tensor:
            return self.judged(rows, judge, run)

        with policy.inference(), critic.inference():
            both = judged(lambda part: self.logps_and_entropies(policy, part))
            return Rollout(
                rows=rows,
                stopped=torch.tensor([answer.stopped for answer in whole]).to(both.device),
                scores=judged(lambda part: last_score(reward(part.tokens), part.real)),
                logps=both[:, 0],
                reference=judged(lambda part: self.logps(reference, part)),
                values=judged(lambda part: critic(part.tokens)),
                entropies=both[:, 1],
                sampled=as_rows((one.logps for one in answers), rows),
                whole=whole,
            )

    def _asks(self, number: int, run: Running) -> tuple[list[Question], list[int]]:
        """The prompts of a rollout, and a seed for every answer."""
        places = range(number * self.rollout, (number + 1) * self.rollout)
        questions = [run.data.train[i] for i in drawn(len(run.data.train), self.seed, places)]
        return questions, [seed_of(self.seed, number, row) for row in range(self.rollout)]

    def _rewards(
        self, rollout: Rollout, state: dict[str, Any] | None = None, model: Any = None
    ) -> Float[Tensor, "batch seq"]:
        """`state`: what the run carries along, this rollout's scores counted; `model`: what gave them."""
        state, scores = state or {}, rollout.scores
        if self.reward_scale == "model":
            scores = model.normalised(scores)
        if self.reward_scale == "running":
            deviation = math.sqrt(state["reward/squares"] / state["reward/count"])
            scores = (scores - state["reward/mean"]) / (deviation + 1e-6)
        if self.reward_clip is not None:
            scores = scores.clamp(-self.reward_clip, self.reward_clip)
        scores = scores - self.unfinished * (~rollout.stopped).float()
        cost = state.get("kl", self.kl)
        return kl_rewards(scores, rollout.logps, rollout.reference, rollout.rows.mask, cost)

    def rate_of(self, role: str) -> float:
        """The critic learns faster: what it does not foresee is noise in the policy's gradient."""
        return self.critic_rate if role == "critic" else 1.0

    def may_stop(self, run: Running) -> bool:
        """Between rollouts: the answers are not in the checkpoint."""
        return run.progress.step % self.steps == 0

    def loss(self, run: Running, batch: Sampled | Text) -> Losses:
        """The clipped losses of the policy and of the critic, summed over tokens; or that of text."""
        warm = float(run.progress.step >= self.critic_first * self.steps)
        if isinstance(batch, Text):
            return text_loss(run, batch, warm * self.pretraining_mix)
        new = self.logps(run.engines["model"], batch.rows)
        clip = Clip(self.clip_ratio, self.clip_ratio)
        policy = clipped_policy_loss(new, batch.logps, batch.advantages, batch.rows.mask, clip)
        if batch.weights is not None:
            policy = batch.weights * policy
        values = run.engines["critic"](batch.rows.tokens)
        critic = clipped_value_loss(values, batch.values, batch.returns, batch.rows.mask, self.clip_value)
        moved = log_ratio(new.detach(), batch.logps, batch.rows.mask)
        held = held_back(new.detach(), batch.logps, batch.advantages, batch.rows.mask, clip)
        return Losses(
            {"model": warm * policy.sum(), "critic": critic.sum()},
            # k3 of how far the policy has moved since it sampled
            {
                "clip_fraction": held.float().sum(),
                "clip_fraction/low": (held & (batch.advantages < 0)).float().sum(),
                "clip_fraction/high": (held & (batch.advantages > 0)).float().sum(),
                "moved": (torch.expm1(moved) - moved).sum(),
                "ratio/variance": (torch.expm1(moved) ** 2).sum(),
            },
        )

    def measure(self, run: Running) -> dict[str, float]:
        """The mean score of answers to held-out prompts."""
        questions = run.data.held_out[: self.validation_prompts]
        if not questions:
            return {}
        seeds = [seed_of(self.seed, "validation", run.progress.step, row) for row in range(len(questions))]
        answers = self.answers(questions, seeds, run)
        rows = self.rows(questions, answers, run)
        reward = run.frozen["reward"]
        with run.engines["model"].inference():
            scores = self.judged(rows, lambda part: last_score(reward(part.tokens), part.real), run)
        self.shown(in_words(questions, answers, run.tokenizer), {"reward": scores}, "held out", run)
        return {"reward": scores.double().mean().item()}


def _taken(
    rollout: Rollout,
    advantages: Float[Tensor, "all seq"],
    returns: Float[Tensor, "all seq"],
    weights: Float[Tensor, "all seq"],
    chosen: Int[Tensor, " batch"],
) -> Sampled:
    """Some answers of a rollout as a micro-batch; a token of an answer weighs 1."""
    some = rollout.rows.at(chosen)
    work = some.work()
    return Sampled(
        weight=float(work.logits),
        work=work,
        samples=len(chosen),
        rows=some,
        logps=rollout.logps[chosen],
        values=rollout.values[chosen],
        advantages=advantages[chosen],
        returns=returns[chosen],
        weights=weights[chosen],
    )
