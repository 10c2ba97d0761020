"""STAGE evaluate: how good each of a run's models is -> `evaluate/scores.json`, `evaluate/samples.json`.

It measures whatever has finished and says what it leaves out, in one process, one model after the other:
  pretrain   bits per byte of the validation shard
  sft        the same again; recall of true sentences, in phrasings it was trained on and in new ones
  rm         how often it prefers the better of two answers, about functions it was not trained on
  ppo, dpo, kto, grpo   against SFT: win rate, gain in reward, KL; all answer the same questions, sampled
             alike
Recall and the samples are greedy. For the comparison answers are sampled, since the distribution is what
alignment trains: at `temperature: 1` the KL is that between the two models.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import NonNegativeInt, PositiveInt

from megachat.data.conversations import Preference, Preferences, Prompt, Prompts
from megachat.data.loader import TokenWindows
from megachat.data.shards import Shards, read_split
from megachat.evals.answers import Answer, answer, best_device, context_of, divergences, rewards
from megachat.evals.bits import bits_per_byte, spread
from megachat.evals.recall import recall
from megachat.evals.score import Score, mean
from megachat.evals.wins import outcome, win_rate, win_rate_by_reward
from megachat.files import write_json
from megachat.log import say
from megachat.model.generate import Sampling
from megachat.parallel.checkpoint import Loaded, load_model
from megachat.run import Stage, finished
from megachat.tokenizer.chat_format import render_answer, render_prompt


class Evaluate(Stage):
    """Scores a run's models."""

    name: ClassVar[str] = "evaluate"
    neutral: ClassVar[tuple[str, ...]] = ("device",)

    prompts: Prompts
    """The questions; for recall they need true answers."""
    preferences: Preferences
    """Whose held-out part the reward model is tried on."""
    policies: list[Literal["ppo", "dpo", "kto", "grpo"]]
    """The aligned models that are compared with SFT."""
    questions: PositiveInt
    """Questions for each recall and each win rate, where there are that many."""
    pairs: PositiveInt
    """Preferences the reward model is tried on, at most."""
    windows: PositiveInt
    """Pieces of the validation shard that bits per byte are measured on, at most."""
    context: PositiveInt | None
    """Tokens in each: as many as in training, or it measures the untrained. null: the model's context."""
    samples: NonNegativeInt
    """Questions in each model's sample dialogue."""
    opening: str
    """Text that the base model continues in its sample."""
    sampling: Sampling
    """How answers for win rates, rewards and KL are sampled."""
    batch: PositiveInt
    """Questions answered, or texts read, at a time; lower it if memory does not suffice."""
    device: Literal["auto", "cpu", "cuda"]
    """Where the models run; `auto` takes a GPU when there is one."""

    def reads(self) -> list[str]:
        """Whatever has finished of what it can score: one stage more, and there is something to do again."""
        stages = ("encode", "pretrain", "sft", "rm", *self.policies)
        return [stage for stage in stages if finished(self.source(stage))]

    def execute(self) -> None:
        """Scores what has finished."""
        results = Results()
        self.base(results)
        asked = self.assistant(results)
        self.judge(results, asked)
        for policy in self.policies:
            self.aligned(results, asked, policy)
        if not results.scores:
            raise ValueError(
                f"no model in {self.inputs} has finished training, so there is nothing to evaluate; "
                f"run `megachat pipeline run={self.inputs}` first, or name another run with run=..."
            )
        write_json(self.folder / "samples.json", results.samples)
        write_json(
            self.folder / "scores.json", {name: score.as_dict() for name, score in results.scores.items()}
        )
        for name, score in results.scores.items():
            say(f"{name:32} {score.value:8.4f}   [{score.low:.4f}, {score.high:.4f}]   n={score.n}")

    def base(self, results: "Results") -> None:
        """Bits per byte of the base model, and what it writes."""
        loaded = self.load("pretrain", "bits_per_byte")
        if loaded is None:
            return
        results.scores |= self.bits(loaded, "bits_per_byte")
        tokenizer = loaded.tokenizer
        opening = [tokenizer.bos, *tokenizer.encode(self.opening)]
        [written] = answer(loaded.model, tokenizer, [opening], self.greedy, 1, tokenizer.eos)
        results.samples.append({
            "stage": "pretrain",
            "turns": [{"role": "text", "text": self.opening}, {"role": "assistant", "text": written.text}],
        })  # fmt: skip

    def assistant(self, results: "Results") -> "Asked | None":
        """What fine-tuning cost in bits per byte, recall, and the answers that others are compared with."""
        loaded = self.load("sft", "recall")
        if loaded is None:
            return None
        results.scores |= self.bits(loaded, "bits_per_byte_sft")
        asked = Asked(loaded, fitting(self.prompts.unseen(self.questions), loaded, self.sampling))
        for name, prompts in (
            ("recall_seen", fitting(self.prompts.seen(self.questions), loaded, self.sampling)),
            ("recall_unseen", asked.prompts),
        ):
            known = [prompt for prompt in prompts if prompt.answer]
            if not known:
                say(f"evaluate: {name} is left out, the prompts have no true answers of that kind")
                continue
            answers = self.answers(loaded, known, self.greedy, name)
            truths = [prompt.answer for prompt in known]
            results.scores[name] = recall([one.text for one in answers], truths, self.seed)
        asked.answers = self.answers(loaded, asked.prompts, self.sampling, "sft answers")
        self.sample(results, "sft", loaded, asked)
        return asked

    def judge(self, results: "Results", asked: "Asked | None") -> None:
        """The reward model's accuracy on held-out preferences; and it rates SFT's answers."""
        loaded = self.load("rm", "rm_accuracy")
        if loaded is None:
            return
        pairs = self.preferences.preferences("held_out")[: self.pairs]
        if not pairs:
            say("evaluate: rm_accuracy is left out, no preferences are held out")
        else:
            results.scores |= self.accuracy(loaded, pairs)
        if asked is not None:
            asked.judge = loaded
            asked.rewards = self.rate(asked, asked.answers)

    def aligned(self, results: "Results", asked: "Asked | None", policy: str) -> None:
        """One aligned model against SFT, on the same questions."""
        if asked is None:
            say(f"evaluate: {policy} is left out, there is no SFT model to compare it with")
            return
        loaded = self.load(policy, f"{policy}_win_rate")
        if loaded is None:
            return
        if not asked.prompts:
            say(f"evaluate: {policy} is left out, there is no question to compare it with SFT on")
            return
        answers = self.answers(loaded, asked.prompts, self.sampling, f"{policy} answers")
        known = [row for row, prompt in enumerate(asked.prompts) if prompt.answer]
        if known:
            ours, theirs = ([those[row].text for row in known] for those in (answers, asked.answers))
            truths = [asked.prompts[row].answer for row in known]
            results.scores[f"{policy}_win_rate"] = win_rate(ours, theirs, truths, self.seed)
        if asked.judge is not None:
            gained = self.rate(asked, answers)
            gain = [after - before for after, before in zip(gained, asked.rewards, strict=True)]
            results.scores[f"{policy}_reward_gain"] = mean(gain, self.seed)
            by_reward = win_rate_by_reward(gained, asked.rewards, self.seed)
            results.scores[f"{policy}_win_rate_by_reward_model"] = by_reward
        rendered = [render_prompt(prompt.messages, asked.sft.tokenizer) for prompt in asked.prompts]
        kl = divergences(loaded.model, asked.sft.model, rendered, answers, self.batch)
        results.scores[f"{policy}_kl"] = mean(kl, self.seed)
        self.sample(results, policy, loaded, asked)

    @property
    def greedy(self) -> Sampling:
        """The likeliest token every time, with the same longest answer."""
        return self.sampling.model_copy(update={"temperature": 0.0})

    def load(self, stage: str, missing: str) -> Loaded | None:
        """A stage's model; None, and a line that says so, if it has not finished."""
        if not finished(self.source(stage)):
            say(f"evaluate: {missing} is left out, `{stage}` has not finished in {self.inputs}")
            return None
        return load_model(self.source(stage), device=best_device(self.device))

    def bits(self, loaded: Loaded, name: str) -> dict[str, Score]:
        """Bits per byte of windows spread evenly over the validation shard."""
        folder = self.source("encode")
        if not finished(folder):
            say(f"evaluate: {name} is left out, `encode` has not finished in {self.inputs}")
            return {}
        length = self.context or context_of(loaded.model)
        shards = read_split(folder, "validation", loaded.tokenizer.sha256)
        source = TokenWindows(Shards(list(shards.values())), length)
        windows = [source[index] for index in spread(len(source), self.windows)]
        lengths = loaded.tokenizer.token_bytes
        return {name: bits_per_byte(loaded.model, windows, lengths, self.batch, self.seed, name)}

    def answers(
        self, loaded: Loaded, prompts: Sequence[Prompt], sampling: Sampling, what: str
    ) -> list[Answer]:
        """A model's answers."""
        tokenizer = loaded.tokenizer
        rendered = [render_prompt(prompt.messages, tokenizer) for prompt in prompts]
        return answer(loaded.model, tokenizer, rendered, sampling, self.batch, tokenizer.end, self.seed, what)

    def sample(self, results: "Results", stage: str, loaded: Loaded, asked: "Asked") -> None:
        """A dialogue for the report."""
        prompts = asked.prompts[: self.samples]
        if not prompts:
            return
        turns: list[dict[str, str]] = []
        for prompt, said in zip(
            prompts, self.answers(loaded, prompts, self.greedy, f"{stage} sample"), strict=True
        ):
            turns += [{"role": message.role, "text": message.content} for message in prompt.messages]
            turns.append({"role": "assistant", "text": said.text, "truth": prompt.answer})
        results.samples.append({"stage": stage, "turns": turns})

    def accuracy(self, loaded: Loaded, pairs: Sequence[Preference]) -> dict[str, Score]:
        """How often the better answer has the higher reward, a tie counting half: overall, and per kind of
        mistake."""
        tokenizer = loaded.tokenizer
        prompts = [render_prompt(pair.prompt, tokenizer) for pair in pairs]
        chosen = [
            [*prompt, *render_answer(pair.chosen, tokenizer)]
            for prompt, pair in zip(prompts, pairs, strict=True)
        ]
        rejected = [
            [*prompt, *render_answer(pair.rejected, tokenizer)]
            for prompt, pair in zip(prompts, pairs, strict=True)
        ]
        longest = context_of(loaded.model)
        by_kind: dict[str, list[float]] = defaultdict(list)
        fit = [row for row in range(len(pairs)) if max(len(chosen[row]), len(rejected[row])) <= longest]
        better = rewards(loaded.model, [chosen[row] for row in fit], self.batch)
        worse = rewards(loaded.model, [rejected[row] for row in fit], self.batch)
        for row, ours, theirs in zip(fit, better, worse, strict=True):
            by_kind[""].append(outcome(ours, theirs))
            if pairs[row].kind:
                by_kind[f"_{pairs[row].kind}"].append(outcome(ours, theirs))
        return {f"rm_accuracy{kind}": mean(right, self.seed) for kind, right in sorted(by_kind.items())}

    def rate(self, asked: "Asked", answers: Sequence[Answer]) -> list[float]:
        """The reward model's scores of the answers."""
        assert asked.judge is not None
        tokenizer = asked.judge.tokenizer
        prompts = [render_prompt(prompt.messages, tokenizer) for prompt in asked.prompts]
        conversations = [[*prompt, *one.tokens] for prompt, one in zip(prompts, answers, strict=True)]
        return list(map(float, rewards(asked.judge.model, conversations, self.batch)))


@dataclass(slots=True)
class Results:
    """What has been measured so far."""

    scores: dict[str, Score] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)


@dataclass(slots=True)
class Asked:
    """What the SFT model was asked and what it answered: each aligned model is compared with this."""

    sft: Loaded
    prompts: list[Prompt]
    answers: list[Answer] = field(default_factory=list)
    judge: Loaded | None = None
    """The reward model, if it has finished."""
    rewards: list[float] = field(default_factory=list)
    """Its scores of the answers."""


def fitting(prompts: Sequence[Prompt], loaded: Loaded, sampling: Sampling) -> list[Prompt]:
    """The prompts that leave room in the model's context for the longest answer; says how many do not."""
    room = context_of(loaded.model) - sampling.max_new_tokens
    fit = [prompt for prompt in prompts if len(render_prompt(prompt.messages, loaded.tokenizer)) <= room]
    if len(fit) < len(prompts):
        missing = len(prompts) - len(fit)
        say(f"evaluate: {missing} of {len(prompts)} questions are longer than {room} tokens, left out")
    return fit
