"""What an answer is worth, told by a program: the true result, a pattern, its length, unit tests, a judge.

`rewards` is a set of them by name, `rewards=[exact,length]`, each with a weight; an answer's reward is their
weighted sum. Those that only `shape` say how to answer, not whether it is right: they are left out where it
is asked whether a group of answers has any spread (a length would always have some).
"""

import json
import math
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import PositiveFloat, PositiveInt, field_validator, model_validator
from torch import Tensor

from megachat.align.environments import Call
from megachat.align.sandbox import Limits, side_by_side
from megachat.align.sharing import by_ranks
from megachat.config import Config
from megachat.data.conversations import Prompt
from megachat.parallel.mesh import Mesh

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?|-?\.\d+")


@dataclass(frozen=True)
class Answer:
    """An answer, and to what."""

    prompt: Prompt
    text: str
    """Its last message."""
    tokens: int
    """How many of the policy's own it has, each message's stop token included."""
    stopped: bool
    """Whether it ended by itself, not at the length limit, nor with a call that nobody has replied to."""
    calls: tuple[Call, ...] = ()
    """What was called before it, and what came back: earlier messages of the same answer."""


class Reward(Config):
    """One way to score answers."""

    shapes: ClassVar[bool] = False
    """Whether it says how to answer, not whether the answer is right."""
    needs_truth: ClassVar[bool] = False
    """Whether it compares with the prompt's `answer`."""

    weight: float
    """What it counts in the sum; below 0 it is a penalty."""

    def scores(self, answers: Sequence[Answer]) -> list[float]:
        """One for each answer."""
        raise NotImplementedError


class Exact(Reward):
    """1 for the true answer, 0 for any other."""

    needs_truth: ClassVar[bool] = True

    after: str
    """What stands before the result in an answer, such as GSM8K's `####`; "": nothing does."""
    strict: bool
    """Without that mark an answer is wrong. Else its last number counts, or all of it where the truth is no
    number."""

    def scores(self, answers: Sequence[Answer]) -> list[float]:
        """Numbers are compared as numbers: 1,000 is 1000.0."""
        return [float(self._right(answer)) for answer in answers]

    def _right(self, answer: Answer) -> bool:
        if self.strict and self.after not in answer.text:
            return False
        truth = result(answer.prompt.answer, self.after, number=False)
        number = number_of(truth)
        said = result(answer.text, self.after, number is not None)
        return number_of(said) == number if number is not None else said.casefold() == truth.casefold()


class Matches(Reward):
    """1 for an answer that matches a pattern, 0 for any other."""

    pattern: str
    """A regular expression of Python's; `.` matches a newline, too."""
    whole: bool
    """Whether the whole answer must match, as a format does, or something in it."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return pattern

    def scores(self, answers: Sequence[Answer]) -> list[float]:
        """Whether it matches."""
        pattern = re.compile(self.pattern, re.DOTALL)
        match = pattern.fullmatch if self.whole else pattern.search
        return [float(bool(match(answer.text.strip()))) for answer in answers]


class Length(Reward):
    """0 for an answer of the right length, falling to -1 for an empty one or one of twice the length."""

    shapes: ClassVar[bool] = True

    shortest: PositiveInt
    """Tokens, the stop token included."""
    longest: PositiveInt
    """Tokens, the stop token included."""

    @model_validator(mode="after")
    def _in_order(self) -> "Length":
        if self.longest < self.shortest:
            raise ValueError(f"longest={self.longest} is less than shortest={self.shortest}")
        return self

    def scores(self, answers: Sequence[Answer]) -> list[float]:
        """Minus how much is missing of the shortest, or is beyond the longest, as a share of it."""
        return [
            -min(1.0, max(0.0, 1 - answer.tokens / self.shortest, answer.tokens / self.longest - 1))
            for answer in answers
        ]


class UnitTests(Reward):
    """1 for code that passes the tests which are the prompt's `answer`, 0 for any other."""

    needs_truth: ClassVar[bool] = True

    limits: Limits
    """What running an answer may take."""
    at_once: PositiveInt
    """Answers that one rank runs side by side."""

    def scores(self, answers: Sequence[Answer]) -> list[float]:
        """The last block of code of an answer, or all of it where there is none, and the tests after it."""
        programs = [f"{code_of(answer.text)}\n\n{answer.prompt.answer}\n" for answer in answers]
        return [float(one.ended) for one in side_by_side(self.limits.run, programs, self.at_once)]


class Model(Reward):
    """What a reward model of ours says; the stage computes it, on the ranks that train."""

    stage: str
    """The stage that trained it."""


class Judge(Reward):
    """What a model behind an OpenAI-compatible endpoint says, from 0 to 1."""

    url: str
    """Up to `/v1`, such as https://api.openai.com/v1."""
    model: str
    """Its name there."""
    key: str | None
    """The environment variable that holds the key; null sends none."""
    instruction: str
    """What it is asked; {prompt}, {answer} and {truth} are filled in."""
    pattern: str
    """The first group of its last match in what it says is the score."""
    highest: PositiveFloat
    """The score that is worth 1."""
    timeout: PositiveFloat
    """Seconds to wait for one answer of its."""
    tries: PositiveInt
    """How often it is asked before the stage gives up, with waits of 1, 2, 4, ... seconds in between."""
    at_once: PositiveInt
    """Requests of one rank under way at a time."""

    @field_validator("url")
    @classmethod
    def _is_http(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{url!r} does not begin with http:// or https://")
        return url.rstrip("/")

    def scores(self, answers: Sequence[Answer]) -> list[float]:
        """What it says of each."""
        return side_by_side(self._score, answers, self.at_once)

    def _score(self, answer: Answer) -> float:
        prompt = "\n".join(message.content for message in answer.prompt.messages)
        asked = self.instruction
        # One after the other in a single pass: what a user wrote is no place to fill in.
        filled = {"prompt": prompt, "answer": answer.text, "truth": answer.prompt.answer}
        asked = re.sub(r"\{(prompt|answer|truth)\}", lambda match: filled[match[1]], asked)
        headers, why = self._headers(), ""
        for attempt in range(self.tries):
            if attempt:
                time.sleep(2.0 ** (attempt - 1))
            try:
                said = self._ask(asked, headers)
            except urllib.error.HTTPError as error:
                why = f"it answers {error.code} {error.reason}"
                if error.code not in (408, 409, 429) and error.code < 500:
                    break  # asked again it would say the same
                continue
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
                why = f"{type(error).__name__}: {error}"
                continue
            if found := re.findall(self.pattern, said):
                number = number_of(found[-1])
                if number is not None:
                    return min(1.0, max(0.0, float(number) / self.highest))
            why = f"there is no {self.pattern!r} in {said[:200]!r}"
        raise ValueError(
            f"the judge {self.model} at {self.url} gave no score in {attempt + 1} of {self.tries} tries: "
            f"{why}; see whether url, model and key are right, or raise timeout and tries"
        )

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        if self.key is not None:
            if not (value := os.environ.get(self.key)):
                raise ValueError(
                    f"the environment has no {self.key}; export it, or set key=null to send none"
                )
            headers["Authorization"] = f"Bearer {value}"
        return headers

    def _ask(self, text: str, headers: dict[str, str]) -> str:
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], "temperature": 0}
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            said: Any = json.load(response)["choices"][0]["message"]["content"]
        return str(said)


def by_programs(
    rewards: Mapping[str, Reward], answers: Sequence[Answer], mesh: Mesh
) -> dict[str, Float[Tensor, " batch"]]:
    """What each says of every answer, but for reward models. The data ranks share the answers."""
    return {
        name: torch.tensor(by_ranks(reward.scores, answers, mesh), dtype=torch.float64)
        for name, reward in rewards.items()
        if not isinstance(reward, Model)
    }


def correct(
    rewards: Mapping[str, Reward], by_reward: Float[Tensor, "rewards batch"]
) -> Bool[Tensor, " batch"]:
    """Which answers are right: all rewards that compare with the true answer give them 1."""
    compare = torch.tensor([reward.needs_truth for reward in rewards.values()])
    return (by_reward[compare] >= 1).all(0)


def pass_at(k: int, samples: int, right: int) -> float:
    """The chance that one of k answers is right, where so many of `samples` are: unbiased (Chen et al., 2021,
    https://arxiv.org/abs/2107.03374). Example: of 4 answers 1 is right -> pass@1 1/4, pass@2 1 - 3/6 = 1/2.
    """
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def passes(right: Bool[Tensor, "prompts samples"]) -> dict[str, float]:
    """The mean over prompts at 1, 2, 4, ... answers, and at all there are."""
    samples = right.shape[1]
    counts = right.sum(1).tolist()
    at = sorted({*(1 << power for power in range(samples.bit_length())), samples})
    return {f"pass@{k}": sum(pass_at(k, samples, one) for one in counts) / len(counts) for k in at}


def check_truths(rewards: Mapping[str, Reward], prompts: Iterable[Prompt], block: str) -> None:
    """Raises what a reward misses that compares with the true answer."""
    prompts = [*prompts]
    for name, reward in rewards.items():
        for prompt in prompts if reward.needs_truth else []:
            if not prompt.answer:
                raise ValueError(
                    f"{block}.{name} compares with the true answer, and a prompt has none: "
                    f"{prompt.messages[-1].content[:80]!r}; give it an `answer`, or choose another reward"
                )


def result(text: str, after: str, number: bool) -> str:
    """What an answer comes to: what follows the last mark on its line; else its last number, or all of it."""
    if after and after in text:
        text = text.rpartition(after)[2].strip().partition("\n")[0]
        return text.strip()
    numbers = NUMBER.findall(text) if number else []
    return numbers[-1] if numbers else text.strip()


def number_of(text: str) -> Fraction | None:
    """Example: number_of("$1,250.50.") -> Fraction(2501, 2)"""
    plain = text.strip().strip("$€£¥ ").rstrip(".%").replace(",", "").removeprefix("+")
    try:
        return Fraction(plain)
    except (ValueError, ZeroDivisionError):
        return None


def code_of(text: str) -> str:
    """The last block between fences, or all of the text where there is none."""
    blocks = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return blocks[-1] if blocks else text
