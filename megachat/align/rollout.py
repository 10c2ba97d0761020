"""Answers sampled from the policy being trained, with what each judge makes of them.

Unless `engine` says otherwise, the module that trains is the one that samples: there is no second copy of
the weights to fall behind. It samples from its whole distribution, since a token that top-k or top-p can
never draw would still have a probability in the loss. The probabilities an answer was sampled with are
computed again, by the forward pass and in the micro-batches that the loss uses: at the first step every
ratio is then exactly 1, where those of the cached sampler would be off by rounding.

The data ranks share the work, and then everybody has all answers with all figures: which answers form a
batch, what their advantages are whitened by, and what is logged does not depend on how many ranks there were.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from megachat.align.advantages import gae, whiten
from megachat.align.alarms import Alarms
from megachat.align.answers import Answer, Question, Room, in_turns, rendered
from megachat.align.environments import Environment
from megachat.align.logprobs import entropy, token_logps
from megachat.align.policy import truncated_weights
from megachat.align.rewards import Answer as Judged
from megachat.align.rewards import by_programs, check_truths
from megachat.align.rows import Rows, padded, that_fit
from megachat.align.start import Adapting
from megachat.align.vllm import VLLM, Server, asking
from megachat.data import formats
from megachat.data.conversations import Message, Prompts, Split, messages_of
from megachat.data.loader import Mixed, places
from megachat.model.cross_entropy import IGNORE
from megachat.model.draws import seed_of
from megachat.model.generate import Request, Sampling, write
from megachat.parallel.mesh import Mesh
from megachat.tokenizer.chat_format import render_prompt, role
from megachat.train.loop import Batch, Running

PROBES = 8
"""Answers, at most, by which it is told whether an engine that writes ahead has the policy's weights."""

PROBED = 64
"""Tokens of each, at most."""


@dataclass
class Asked:
    """What the policy answers."""

    train: list[Question]
    held_out: list[Question]
    """Only to measure."""
    server: Server | None = None
    """vLLM's, where it writes the answers."""
    text: Mixed | None = None
    """Rows to train on beside the answers."""


class Rolling(Adapting):
    """A stage that learns from answers it samples: a rollout of them, then some steps, and so on."""

    passes: ClassVar[int] = 0

    start: str
    """The stage whose model is trained on, and whose frozen copy is the reference."""
    prompts: Prompts
    """What the policy answers."""
    environment: Environment | None
    """What it may call while it answers; null: an answer is one message."""
    engine: VLLM | None
    """What writes the answers; null: the module that trains."""
    rollouts: PositiveInt
    """How often answers are sampled anew."""
    rollout: PositiveInt
    """Answers sampled at a time over all ranks; a multiple of `batch`. Which they are follows from the seed,
    which rollout it is, and which prompt."""
    epochs: PositiveInt
    """Passes over the answers of a rollout."""
    at_once: PositiveInt
    """Answers that one rank writes side by side; vLLM sees for itself."""
    temperature: PositiveFloat
    """What logits are divided by, when sampling and in the loss."""
    max_new_tokens: PositiveInt
    """The longest answer, in tokens, with all that is said in between."""
    importance_cap: Annotated[float, Field(ge=1)] | None
    """A token's loss counts as much as it is likelier to the loss's forward pass than it was to the sampler,
    at most this much: for a sampler that rounds otherwise. null: every token counts 1."""
    alarms: Alarms
    """When a reward that rises is not to be believed."""
    validation_prompts: NonNegativeInt
    """Held-out prompts that are answered at each validation, at most."""
    answers_shown: NonNegativeInt
    """Answers of each rollout, and of each validation, that `answers.jsonl`, W&B and the report show."""

    neutral: ClassVar[tuple[str, ...]] = (*Adapting.neutral, "alarms", "answers_shown", "engine")

    @model_validator(mode="after")
    def _whole_batches(self) -> "Rolling":
        if self.rollout % self.batch:
            raise ValueError(f"rollout={self.rollout} is not a multiple of batch={self.batch}")
        if self.max_new_tokens >= self.context:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} leaves no room for a prompt in context={self.context}"
            )
        if self.environment is not None and self.max_new_tokens < 8:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} leaves no room for a call, what comes back, and an "
                "answer; raise it, or set environment=none"
            )
        if self.engine is not None and self.engine.ahead:
            if self.importance_cap is None:
                raise ValueError(
                    "engine.ahead=true has answers written by weights that are one rollout old, which "
                    "importance_cap=null does not correct; set importance_cap=2"
                )
            if self.environment is not None:
                raise ValueError(
                    "engine.ahead=true cannot know beforehand what an environment will say; set "
                    "engine.ahead=false, or environment=none"
                )
        return self

    @property
    def steps(self) -> int:
        """Optimizer steps between two rollouts."""
        return self.epochs * self.rollout // self.batch

    @property
    def sampling(self) -> Sampling:
        """From the whole distribution."""
        return Sampling(temperature=self.temperature, top_k=0, top_p=1.0, max_new_tokens=self.max_new_tokens)

    def number(self, run: Running) -> int:
        """Which rollout comes next, which is asked between two of them."""
        if run.progress.step % self.steps:
            raise ValueError(
                f"step {run.progress.step} is in the middle of a rollout of {self.steps} steps; "
                "keep rollout, batch and epochs as they were when the checkpoint was written"
            )
        return run.progress.step // self.steps

    def asked(self, run: Running) -> Asked:
        """The prompts that fit, as tokens."""
        if self.environment is not None:
            role(Message("tool", ""), run.tokenizer)  # told before anything is sampled that there is none
        asked = Asked(self._rendered("train", run), self._rendered("held_out", run))
        if self.engine is not None:
            asked.server = Server(self.engine, self.lora, self.folder / "vllm.log")
        check_truths(self.alarms.judge, (one.prompt for one in asked.train), "alarms.judge")
        return asked

    def answers(self, questions: Sequence[Question], seeds: Sequence[int], run: Running) -> list[Answer]:
        """The policy's answer to each question, with what the environment says in between."""

        def write(prompts: Sequence[Sequence[int]], seeds: Sequence[int], most: int) -> list[Answer]:
            sampling = self.sampling.model_copy(update={"max_new_tokens": most})
            if self.engine is not None:
                return self.engine.written(run, run.data.server, asking(run, prompts, seeds, sampling))
            return answered(run, prompts, seeds, sampling, self.at_once)

        room = Room(self.max_new_tokens, self.context)
        if self.environment is None:
            return write([question.tokens for question in questions], seeds, room.answer)
        return in_turns(self.environment, questions, seeds, room, write, run.tokenizer, run.mesh)

    def written(self, questions: Sequence[Question], seeds: Sequence[int], run: Running) -> list[Answer]:
        """The answers of a rollout; how long they took is noted, that of tools included."""
        begun = time.monotonic()
        answers = self.answers(questions, seeds, run)
        seconds = run.notes.get("rollout/generation_seconds", 0.0) + time.monotonic() - begun
        tokens = run.notes.get("rollout/tokens", 0.0) + sum(len(answer.logps) for answer in answers)
        run.notes |= {
            "rollout/generation_seconds": seconds,
            "rollout/tokens": tokens,
            "rollout/tokens_per_second": tokens / seconds,
        }
        return answers

    def ahead(self, asks: Callable[[], tuple[list[Question], list[int]]], run: Running) -> None:
        """Has the next rollout begun while the policy learns from this one, if the engine writes ahead.

        A few answers tell first whether it has the policy's weights: later the policy has moved on.
        """
        engine, server = self.engine, run.data.server
        if engine is None or not engine.ahead or run.progress.step + self.steps >= run.total:
            return
        questions, seeds = asks()
        prompts = [question.tokens for question in questions]
        step = math.ceil(len(questions) / PROBES)
        short = self.sampling.model_copy(update={"max_new_tokens": min(PROBED, self.max_new_tokens)})
        answers = engine.written(run, server, asking(run, prompts[::step], seeds[::step], short))
        rows, policy = self.rows(questions[::step], answers, run), run.engines["model"]
        with policy.inference():
            logps = self.judged(rows, lambda part: self.logps(policy, part), run)
        sampled = as_rows((answer.logps for answer in answers), rows)
        error = disagreement(logps, sampled, rows.mask)["sampler/error"]
        run.notes |= {"sampler/probe": error}
        engine.check(error, run)
        engine.begin(run, server, asking(run, prompts, seeds, self.sampling))

    def show(self, run: Running) -> str:
        """A prompt and how the policy answers it."""
        question = (run.data.held_out or run.data.train)[0]
        (answer,) = self.answers([question], [seed_of(self.seed, "sample", run.progress.step)], run)
        return f"{run.tokenizer.decode(question.tokens)} {run.tokenizer.decode(answer.tokens)}"

    def rows(self, questions: Sequence[Question], answers: Sequence[Answer], run: Running) -> Rows:
        """Each question with its answer, for the models."""
        whole = [rendered(one.tokens, answer) for one, answer in zip(questions, answers, strict=True)]
        return padded(whole, run.tokenizer.pad).to(run.mesh.device)

    def shown(self, answers: Sequence[Judged], worth: Mapping[str, Tensor], of: str, run: Running) -> None:
        """Has the first answers recorded, with what each was worth."""
        for row, answer in enumerate(answers[: self.answers_shown]):
            run.answers.append(
                {
                    "of": of,
                    "prompt": answer.prompt.messages[-1].content,
                    "answer": answer.text,
                    "truth": answer.prompt.answer,
                    "tokens": answer.tokens,
                    "stopped": answer.stopped,
                }
                | ({} if self.environment is None else {"calls": "\n".join(map(str, answer.calls))})
                | {name: scores[row].item() for name, scores in worth.items()}
            )

    def watched(self, rollout: "Rollout", figures: dict[str, float], run: Running) -> dict[str, float]:
        """The same figures of a rollout, those of calls, and what a judge says; all ranks raise the alarm
        together.
        """
        if self.environment is not None:
            calls = [call for answer in rollout.whole for call in answer.calls]
            figures = figures | {
                "environment/calls": len(calls) / len(rollout.whole),
                "environment/errors": sum(call.wrong for call in calls) / max(1, len(calls)),
            }
        if self.engine is not None and not self.engine.ahead:
            self.engine.check(figures["sampler/error"], run)
        judges = self.alarms.judge
        if judges:
            said = by_programs(judges, rollout.whole, run.mesh)
            total = sum(judge.weight * said[name].mean().item() for name, judge in judges.items())
            figures = figures | {"judge": total}
        return figures | self.alarms.watch(self.name, figures, run.progress.state)

    def _rendered(self, split: Split, run: Running) -> list[Question]:
        tools = self.environment.tools() if self.environment is not None else []

        def told(messages: Sequence[Message]) -> Sequence[Message]:
            turns = [(message.role, message.content) for message in messages]
            return messages_of(formats.told(turns, tools)) if tools else messages

        found = [
            Question(prompt, render_prompt(told(prompt.messages), run.tokenizer))
            for prompt in self.prompts.prompts(split)
        ]
        room = self.context - self.max_new_tokens
        return that_fit(found, lambda one: len(one.tokens), room, "prompts", needed=split == "train")

    def judged(self, rows: Rows, judge: Callable[[Rows], Tensor], run: Running) -> Tensor:
        """A figure for every row; the data ranks share the rows."""
        count = len(rows.tokens)
        own = rows.at(torch.tensor(shared(count, run.mesh)))
        return joined(in_parts(own, self.micro_batch, judge), count, run.mesh)

    def logps(self, model: Callable[..., Tensor], rows: Rows) -> Float[Tensor, "batch seq"]:
        """Of the answers' tokens, at the temperature they are sampled at."""
        return token_logps(model(rows.tokens, where=rows.mask), rows.labels, self.temperature)

    def logps_and_entropies(self, model: Callable[..., Tensor], rows: Rows) -> Float[Tensor, "batch 2 seq"]:
        """Both of one forward pass."""
        logits = model(rows.tokens, where=rows.mask)
        logps = token_logps(logits, rows.labels, self.temperature)
        return torch.stack([logps, entropy(logits, rows.mask, self.temperature)], dim=1)

    def checked(
        self, steps: Iterator[list[Batch]], rollout: "Rollout", run: Running
    ) -> Iterator[list[Batch]]:
        """The same steps, after a look at whether the loss computes what the answers were scored with."""
        batches: list[Any] = next(steps)
        part = batches[0]
        with torch.no_grad():
            new = self.logps(run.engines["model"], part.rows)
        must_be_on_policy(new, part.logps, part.rows.mask, run, "the ratio of new to old probabilities")
        if run.progress.step == 0:
            mask = rollout.rows.mask
            must_be_on_policy(rollout.logps, rollout.reference, mask, run, "the KL to the reference")
        yield batches
        yield from steps


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
    sampled: Float[Tensor, "batch seq"] | None = None
    """The sampler's own log-probabilities, which `logps` computes again; None: not known."""
    whole: Sequence[Judged] = ()
    """The answers as rewards read them."""

    @property
    def said(self) -> list[list[int]]:
        """The tokens of each answer alone."""
        return [row[row != IGNORE].tolist() for row in self.rows.labels.cpu()]

    def weights(self, cap: float | None) -> Float[Tensor, "batch seq"]:
        """What the loss of each token counts: more where it is likelier than it was to the sampler."""
        mask = self.rows.mask
        if cap is None or self.sampled is None:
            return mask.float()
        return truncated_weights(self.logps, self.sampled, mask, cap)

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
            "kl/k2": (drift**2).sum() / 2,
            "kl/k3": torch.where(mask, torch.expm1(-drift) + drift, 0.0).sum(),
            "entropy": torch.where(mask, self.entropies, 0.0).sum(),
            "answer/stopped": self.stopped.sum(),
        }
        means = {name: value.double().item() for name, value in sums.items()}
        answers, tokens = means.pop("answers"), means.pop("tokens")
        means = {name: value / (tokens if name == "entropy" else answers) for name, value in means.items()}
        variance = means.pop("reward/square") - means["reward/mean"] ** 2
        lengths = mask.sum(-1)
        means |= {
            "reward/deviation": max(0.0, variance) ** 0.5,
            "reward/least": self.scores.min().item(),
            "reward/most": self.scores.max().item(),
            "answer/length": tokens / answers,
            "answer/shortest": float(lengths.min()),
            "answer/longest": float(lengths.max()),
        }
        return means if self.sampled is None else means | disagreement(self.logps, self.sampled, mask)


def disagreement(
    logps: Float[Tensor, "batch seq"], sampled: Float[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]
) -> dict[str, float]:
    """How far the sampler's probabilities are from the loss's, per token: by what factor (1 is not at all),
    and KL(sampler, loss) as k3.

    Example: of two tokens one is as likely to both, one is twice as likely to the loss
    -> error (1 + 2) / 2, kl (2 - 1 - ln 2) / 2
    """
    apart = torch.where(mask, logps - sampled, 0.0).double()
    tokens = max(1, int(mask.sum()))
    factors = torch.where(mask, apart.abs().exp(), 0.0).sum().item()
    return {
        "sampler/error": factors / tokens,
        "sampler/kl": (torch.expm1(apart) - apart).sum().item() / tokens,
    }


def as_rows(logps: Iterable[Sequence[float]], rows: Rows) -> Float[Tensor, "batch seq"]:
    """A number for each token of each answer, at the position of its label."""
    numbers = torch.tensor([*chain(*logps)], dtype=torch.float32, device=rows.tokens.device)
    return torch.zeros(rows.tokens.shape, device=rows.tokens.device).masked_scatter(rows.mask, numbers)


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


def repetition(answers: Sequence[Sequence[int]], length: int = 4) -> float:
    """The share of four tokens in a row that the same answer has said before. Example: abababab -> 3/5."""
    seen = said = 0
    for answer in answers:
        runs = [tuple(answer[first : first + length]) for first in range(len(answer) - length + 1)]
        seen, said = seen + len(runs) - len(set(runs)), said + len(runs)
    return seen / said if said else 0.0


def must_be_on_policy(
    new: Float[Tensor, "batch seq"],
    old: Float[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    run: Running,
    of: str,
) -> None:
    """Before anything has moved the two are the same, or hours are burned on gradients of something else.

    All ranks call it. What rounding makes of the same forward pass twice is let pass.
    """
    apart = torch.where(mask, (new - old).abs(), 0.0).sum().double()
    sums = run.mesh.sum_tensor(torch.stack([apart, mask.sum().double()])).tolist()
    most = 1e-3 if next(run.engines["model"].module.parameters()).dtype == torch.float32 else 0.1
    if run.mesh.any(not sums[0] / max(sums[1], 1) < most):
        raise ValueError(
            f"before its first step {of} is off by {sums[0] / max(sums[1], 1):.3g} nats per token, where it "
            "must be 0: the loss does not compute the probabilities that the answers were scored with. Is "
            "there dropout left, or a kernel whose result depends on the batch? Set micro_batch=1, or "
            "parallel.precision=fp32, to see which"
        )
