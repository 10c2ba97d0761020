"""STAGE grpo: learning from groups of answers to one prompt, without a critic (Shao et al., 2024,
https://arxiv.org/abs/2402.03300), and its relatives: `variant` chooses among them.

What is expected of an answer is told by the others to the same prompt. A group whose answers are all as good
teaches nothing: it is counted, and left out of the losses (unless a distance to the reference is to be paid
there, too). The denominators are those of the whole step over all ranks, of what is in the loss.
The distance to the reference is in the reward as k1, like PPO's: there its gradient is exact.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from megachat.align.advantages import whiten
from megachat.align.answers import Answer as Written
from megachat.align.answers import Question, in_words, rendered
from megachat.align.policy import (
    Baseline,
    Clip,
    Estimator,
    Level,
    Mean,
    above,
    cispo_loss,
    clipped_policy_loss,
    divergence,
    held_back,
    log_ratio,
    mixed,
    overlong,
    shares,
    to_go,
    total_of,
)
from megachat.align.rewards import Answer, Model, Reward, by_programs, check_truths, correct, passes
from megachat.align.rm import last_score
from megachat.align.rollout import Rolling, Rollout, as_rows, repetition
from megachat.align.rows import Rendered, Rows, drawn, padded
from megachat.align.start import anchored, frozen, language_model, scorer, without_dropout
from megachat.config import Config
from megachat.data.loader import share
from megachat.model.blueprint import Blueprint
from megachat.model.draws import seed_of
from megachat.train.loop import Batch, Losses, Running, load_of, micro_batches, parts


class Variant(Config):
    """Which of the family: what an answer is compared with, and how its gradient is held back."""

    baseline: Baseline
    """What is expected of an answer: nothing (`none`), the mean of its `group`, or of the `others` in it."""
    scale: Literal["none", "group", "batch"]
    """Advantages are divided by the standard deviation of the scores of their `group`, or shifted and divided
    so that over all tokens of the rollout (`batch`) their mean is 0 and their variance 1."""
    loss: Literal["clip", "cispo"]
    """`clip`: no gradient beyond the clip; `cispo`: the ratio is clipped, each token keeps its gradient."""
    ratio: Level
    """Whose probability is compared: each `token`'s, or the `answer`'s, by the mean over its tokens."""
    clip_low: Annotated[float, Field(gt=0, le=1)]
    """How far below 1 a ratio may fall for gain in one rollout."""
    clip_high: PositiveFloat
    """How far above 1 a ratio may rise for gain in one rollout."""
    dual_clip: Annotated[float, Field(gt=1)] | None
    """The largest ratio that counts of a bad answer; null: any."""
    mean: Mean
    """What the loss is the mean over: every `token`; every `answer`, as the mean over its tokens; or every
    answer, as the sum over its tokens divided by a `constant`, max_new_tokens."""
    kl: NonNegativeFloat
    """What a nat of distance from the reference costs, in the reward's units."""
    kl_in: Literal["reward", "loss"]
    """In the `reward` it is k1, whose gradient is exact; in the `loss` it is `estimator`."""
    estimator: Estimator
    """Of the distance, in the loss: `exact`, `k2`, or `k3`, whose gradient is wrong, for comparisons."""
    refills: NonNegativeInt
    """How often at most more prompts are asked in place of those whose answers are all as good; 0: never."""
    overlong: NonNegativeInt
    """Over so many tokens before the length limit a penalty grows from 0 to 1; 0: none."""
    unfinished: Literal["keep", "drop"]
    """Whether answers that are cut off at the length limit are in the loss."""

    @model_validator(mode="after")
    def _goes_together(self) -> "Variant":
        if self.baseline != "group" and self.scale == "group":
            raise ValueError(
                f"scale=group divides by the deviation from the group's mean, which is not what "
                f"baseline={self.baseline} subtracts; use baseline=group, or scale=none or batch"
            )
        if self.kl and self.kl_in == "loss" and self.estimator == "k1":
            raise ValueError(
                "estimator=k1 in the loss has a gradient of 0, so kl would do nothing; "
                "use kl_in=reward, or estimator=exact"
            )
        if self.refills and self.baseline == "none":
            raise ValueError(
                "refills look for groups with spread, and baseline=none has no groups; use refills=0"
            )
        return self

    @property
    def clip(self) -> Clip:
        """The bounds of the ratio."""
        return Clip(self.clip_low, self.clip_high, self.dual_clip)

    @property
    def flat_count(self) -> bool:
        """Whether a group whose answers are all as good has something to teach."""
        return self.kl > 0 or self.baseline == "none"

    def cost(
        self,
        new: Float[Tensor, "batch seq"],
        old: Float[Tensor, "batch seq"],
        reference: Float[Tensor, "batch seq"],
        advantages: Float[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch seq"],
    ) -> Float[Tensor, "batch seq"]:
        """Per action."""
        loss = cispo_loss if self.loss == "cispo" else clipped_policy_loss
        cost = loss(new, old, advantages, mask, self.clip, self.ratio)
        if self.kl and self.kl_in == "loss":
            cost = cost + self.kl * divergence(new, old, reference, mask, self.estimator)
        return cost

    def advantages(
        self,
        scores: Float[Tensor, " batch"],
        drift: Float[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch seq"],
        size: int,
    ) -> Float[Tensor, "batch seq"]:
        """Of each action: how much better its answer is than expected, and nearer to the reference.

        Groups of `size` stand one after the other. Scores are scaled and the distance is not: it costs the
        same in a group whose scores hardly differ. Rows outside the mask are of no weight.
        """
        better = above(scores.view(-1, size), self.baseline, self.scale == "group").flatten()
        paid = torch.zeros_like(drift)
        if self.kl_in == "reward":
            paid = torch.where(mask, -self.kl * drift, 0.0)
        if self.baseline == "none":
            paid = to_go(paid)
        else:
            paid = above(paid.sum(-1).view(-1, size), self.baseline).flatten()[:, None]
        advantages = torch.where(mask, better[:, None] + paid, 0.0)
        return whiten(advantages, mask) if self.scale == "batch" else advantages


@dataclass(frozen=True)
class Chosen(Batch):
    """A micro-batch of sampled answers."""

    rows: Rows
    logps: Float[Tensor, "batch seq"]
    reference: Float[Tensor, "batch seq"]
    advantages: Float[Tensor, "batch seq"]
    weights: Float[Tensor, "batch seq"] | None = None
    """What the loss of each token counts; None: 1."""


@dataclass(frozen=True)
class Scored:
    """Answers, groups of one prompt one after the other, and what each reward says of them."""

    answers: list[Rendered]
    said: list[list[int]]
    """The policy's own tokens of each answer."""
    whole: list[Answer]
    """The same as rewards read them."""
    logps: list[list[float]]
    """What the sampler says of each of them."""
    by_reward: Float[Tensor, "rewards batch"]
    total: Float[Tensor, " batch"]
    """The weighted sum."""
    mixed: list[bool]
    """Of each group: whether its answers differ in those rewards that do not only shape."""

    def group(self, number: int, size: int) -> "Scored":
        """One of them."""
        one = slice(number * size, (number + 1) * size)
        return Scored(
            self.answers[one],
            self.said[one],
            self.whole[one],
            self.logps[one],
            self.by_reward[:, one],
            self.total[one],
            self.mixed[number : number + 1],
        )

    @staticmethod
    def all(several: Sequence["Scored"]) -> "Scored":
        """Several in one."""
        return Scored(
            [*chain(*(one.answers for one in several))],
            [*chain(*(one.said for one in several))],
            [*chain(*(one.whole for one in several))],
            [*chain(*(one.logps for one in several))],
            torch.cat([one.by_reward for one in several], 1),
            torch.cat([one.total for one in several]),
            [*chain(*(one.mixed for one in several))],
        )


class GRPO(Rolling):
    """Learn from rewards that programs or models give, by comparing several answers to a prompt."""

    name: ClassVar[str] = "grpo"

    group: PositiveInt
    """Answers to one prompt; `rollout` is a multiple of it."""
    rewards: dict[str, Reward]
    """What an answer is worth: the weighted sum of these."""
    variant: Variant
    """Which of the family."""
    validation_samples: PositiveInt
    """Answers to each held-out prompt at a validation. From two on pass@k is told: how often one of k is
    right to all rewards that compare with the true answer."""

    neutral: ClassVar[tuple[str, ...]] = (*Rolling.neutral, "validation_samples")

    @model_validator(mode="after")
    def _whole_groups(self) -> "GRPO":
        if self.rollout % self.group:
            raise ValueError(f"rollout={self.rollout} is not a multiple of group={self.group}")
        if self.group == 1 and self.variant.baseline != "none":
            raise ValueError(
                f"group=1 has nothing to compare an answer with, which "
                f"baseline={self.variant.baseline} does; use group=8, or variant=reinforce_pp"
            )
        if self.variant.overlong > self.max_new_tokens:
            raise ValueError(
                f"variant.overlong={self.variant.overlong} is more than max_new_tokens={self.max_new_tokens}"
            )
        return self

    def reads(self) -> list[str]:
        """The tokenizer, the model to start from, and reward models."""
        judges = [reward.stage for reward in self.rewards.values() if isinstance(reward, Model)]
        return ["tokenizer", self.start, *judges]

    def models(self, run: Running) -> dict[str, Blueprint[Any]]:
        """The model to start from."""
        start = language_model(self, self.start, run)
        without_dropout(start.model)
        return {"model": self.trainee(start)}

    def prepare(self, run: Running) -> int:
        """Loads the judges and renders the prompts."""
        run.frozen["reference"] = anchored(self, self.start, run)
        for name, reward in self.rewards.items():
            if isinstance(reward, Model):
                run.frozen[f"rewards.{name}"] = frozen(scorer(self, reward.stage, run), run)
        run.data = self.asked(run)
        prompts = (question.prompt for question in [*run.data.train, *run.data.held_out])
        check_truths(self.rewards, prompts, "rewards")
        return self.rollouts * self.steps

    def batches(self, run: Running) -> Iterator[list[Batch]]:
        """Samples a rollout, then goes over it `epochs` times in batches, each time in another order."""
        first = True
        while True:
            number = self.number(run)
            begun = time.monotonic()
            scored, asked = self._sample(run, number)
            run.watch.at("score")
            rollout = self._judge(scored, run)
            useful = self._useful(scored, rollout)
            advantages = self._advantages(scored, rollout, useful)
            run.progress.state["prompts"] = asked
            run.notes |= self.watched(rollout, rollout.figures() | self._figures(scored), run)
            run.notes |= {"rollout/seconds": time.monotonic() - begun}
            self.shown(scored.whole, self._worth(scored), "rollout", run)
            self.ahead(partial(self._asks, asked, self.rollout // self.group, (number + 1, 0), run), run)
            steps = self._passes(number, rollout, advantages, useful, run)
            if first:
                steps = self.checked(steps, rollout, run)
            first = False
            yield from steps

    def _sample(self, run: Running, number: int) -> tuple[Scored, int]:
        """The answers of a rollout, and how many prompts have been asked since the start of the run."""
        wanted, asked = self.rollout // self.group, run.progress.state.get("prompts", 0)
        kept: list[Scored] = []
        flat: list[Scored] = []
        for refill in range(self.variant.refills + 1):
            missing = wanted - len(kept)
            questions, seeds = self._asks(asked, missing, (number, refill), run)
            asked += missing
            found = self._scored(questions, self.written(questions, seeds, run), self.group, run)
            for one in (found.group(i, self.group) for i in range(missing)):
                (kept if one.mixed[0] or not self.variant.refills else flat).append(one)
            if len(kept) == wanted:
                break
        return Scored.all([*kept, *flat[: wanted - len(kept)]]), asked

    def _asks(
        self, asked: int, count: int, place: tuple[int, ...], run: Running
    ) -> tuple[list[Question], list[int]]:
        """The prompts that come after so many, each of them `group` times, and a seed for every answer."""
        questions = [
            run.data.train[i] for i in drawn(len(run.data.train), self.seed, range(asked, asked + count))
        ]
        repeated = [question for question in questions for _ in range(self.group)]
        return repeated, [seed_of(self.seed, self.name, *place, row) for row in range(len(repeated))]

    def _scored(
        self, questions: Sequence[Question], written: Sequence[Written], size: int, run: Running
    ) -> Scored:
        """The data ranks share the answers; of those that share a model one is believed."""
        answers = [rendered(one.tokens, answer) for one, answer in zip(questions, written, strict=True)]
        said = [answer.own for answer in written]
        whole = in_words(questions, written, run.tokenizer)
        run.watch.at("reward")
        told = by_programs(self.rewards, whole, run.mesh)
        rows = padded(answers, run.tokenizer.pad).to(run.mesh.device)
        every = []
        for name, reward in self.rewards.items():
            if isinstance(reward, Model):
                every.append(self._judged_by(run.frozen[f"rewards.{name}"], rows, run))
            else:
                every.append(told[name])
        by_reward, weights = torch.stack(every), self._weights(lambda _: True)
        right = self._weights(lambda reward: not reward.shapes)
        right = right if right.any() else weights
        spread = mixed((right @ by_reward).view(-1, size))
        logps = [answer.logps for answer in written]
        return Scored(answers, said, whole, logps, by_reward, weights @ by_reward, spread.tolist())

    def _judged_by(self, model: Callable[..., Tensor], rows: Rows, run: Running) -> Tensor:
        with run.engines["model"].inference():  # the same precision
            scores = self.judged(rows, lambda part: last_score(model(part.tokens), part.real), run)
        return scores.double().cpu()

    def _weights(self, counts: Callable[[Reward], bool]) -> Float[Tensor, " rewards"]:
        return torch.tensor(
            [reward.weight * counts(reward) for reward in self.rewards.values()], dtype=torch.float64
        )

    def _judge(self, scored: Scored, run: Running) -> Rollout:
        """What the policy and the reference make of the answers."""
        rows = padded(scored.answers, run.tokenizer.pad).to(run.mesh.device)
        policy, reference = run.engines["model"], run.frozen["reference"]
        with policy.inference():
            both = self.judged(rows, lambda part: self.logps_and_entropies(policy, part), run)
            stopped = [answer.stopped for answer in scored.whole]
            return Rollout(
                rows=rows,
                stopped=torch.tensor(stopped).to(both.device),
                scores=scored.total.to(both),
                logps=both[:, 0],
                reference=self.judged(rows, lambda part: self.logps(reference, part), run),
                values=torch.zeros_like(both[:, 0]),
                entropies=both[:, 1],
                sampled=as_rows(scored.logps, rows),
                whole=scored.whole,
            )

    def _useful(self, scored: Scored, rollout: Rollout) -> Bool[Tensor, " batch"]:
        """Which answers are in the loss."""
        spread = torch.tensor(scored.mixed).repeat_interleave(self.group).to(rollout.scores.device)
        useful = spread | self.variant.flat_count
        return useful & rollout.stopped if self.variant.unfinished == "drop" else useful

    def _advantages(
        self, scored: Scored, rollout: Rollout, useful: Bool[Tensor, " batch"]
    ) -> Float[Tensor, "batch seq"]:
        mask = rollout.rows.mask
        late = overlong(mask.sum(-1), self.max_new_tokens, self.variant.overlong)
        drift = torch.where(mask, rollout.logps - rollout.reference, 0.0)
        return self.variant.advantages(rollout.scores + late, drift, mask & useful[:, None], self.group)

    def _figures(self, scored: Scored) -> dict[str, float]:
        """What each reward says, how many groups had no spread, how much the answers repeat themselves."""
        groups = scored.total.view(-1, self.group)
        figures = {
            "group/flat": 1 - sum(scored.mixed) / len(scored.mixed),
            "group/best": groups.amax(-1).mean().item(),
            "group/deviation": groups.std(-1).mean().item() if self.group > 1 else 0.0,
            "answer/repetition": repetition(scored.said),
        }
        for name, scores in zip(self.rewards, scored.by_reward, strict=True):
            figures |= {
                f"reward/{name}": scores.mean().item(),
                f"reward/{name}/deviation": scores.std(correction=0).item(),
            }
        return figures

    def _worth(self, scored: Scored) -> dict[str, Tensor]:
        """The sum, and each reward."""
        return {"reward": scored.total} | {
            f"reward/{name}": scores for name, scores in zip(self.rewards, scored.by_reward, strict=True)
        }

    def _passes(
        self,
        number: int,
        rollout: Rollout,
        advantages: Float[Tensor, "all seq"],
        useful: Bool[Tensor, " all"],
        run: Running,
    ) -> Iterator[list[Batch]]:
        count, mesh, keep = len(rollout.rows.tokens), run.mesh, useful.tolist()
        weights = rollout.weights(self.importance_cap)

        def taken(chosen: Sequence[int]) -> Chosen:
            at = torch.tensor(chosen)
            rows = rollout.rows.at(at)
            return Chosen(
                weight=total_of(rows.mask, self.variant.mean),
                work=rows.work(),
                samples=len(chosen),
                rows=rows,
                logps=rollout.logps[at],
                reference=rollout.reference[at],
                advantages=advantages[at],
                weights=weights[at],
            )

        for epoch in range(self.epochs):
            order = drawn(count, self.seed + number, range(epoch * count, (epoch + 1) * count))
            for chosen in parts(order, self.batch):
                # Of a batch that teaches nothing one answer stays, whose advantage is 0.
                some = [row for row in chosen if keep[row]] or chosen[:1]
                own, most = (
                    share(some, 0, len(some), mesh.data_rank, mesh.data),
                    math.ceil(len(some) / mesh.data),
                )
                yield [*micro_batches(own, most, self.micro_batch, taken, spare=some)]

    def may_stop(self, run: Running) -> bool:
        """Between rollouts: the answers are not in the checkpoint."""
        return run.progress.step % self.steps == 0

    def loss(self, run: Running, batch: Chosen) -> Losses:
        """The variant's loss, summed over what `mean` says."""
        variant, mask, old, engine = self.variant, batch.rows.mask, batch.logps, run.engines["model"]
        new = self.logps(engine, batch.rows)
        cost = variant.cost(new, old, batch.reference, batch.advantages, mask)
        if batch.weights is not None:
            cost = batch.weights * cost
        moved = log_ratio(new.detach(), old, mask, variant.ratio)
        held = held_back(new.detach(), old, batch.advantages, mask, variant.clip, variant.ratio)
        each = shares(mask, "token" if variant.mean == "token" else "answer")
        return Losses(
            {"model": (shares(mask, variant.mean, self.max_new_tokens) * cost).sum()},
            {
                "clip_fraction": (each * held).sum(),
                "clip_fraction/low": (each * (held & (batch.advantages < 0))).sum(),
                "clip_fraction/high": (each * (held & (batch.advantages > 0))).sum(),
                # k3 of how far the policy has moved since it sampled
                "moved": (each * (torch.expm1(moved) - moved)).sum(),
                "ratio/variance": (each * torch.expm1(moved) ** 2).sum(),
            }
            | load_of(engine.module, batch),
        )

    def measure(self, run: Running) -> dict[str, float]:
        """The mean reward of answers to held-out prompts, and how often one of k is right."""
        samples = self.validation_samples
        asked = run.data.held_out[: self.validation_prompts]
        questions = [question for question in asked for _ in range(samples)]
        if not questions:
            return {}
        seeds = [seed_of(self.seed, "validation", run.progress.step, row) for row in range(len(questions))]
        scored = self._scored(questions, self.answers(questions, seeds, run), samples, run)
        worth = self._worth(scored)
        one_each = {name: scores[::samples] for name, scores in worth.items()}
        self.shown(scored.whole[::samples], one_each, "held out", run)
        figures = {name: scores.mean().item() for name, scores in worth.items()}
        if samples > 1 and any(reward.needs_truth for reward in self.rewards.values()):
            figures |= passes(correct(self.rewards, scored.by_reward).view(-1, samples))
        return figures
