"""Reward hacking: the reward rises, and what it was meant for does not (Gao et al., 2023,
https://arxiv.org/abs/2210.10760, "overoptimization").

The newest rollouts are compared with the first ones of the run. While the reward is higher than it was by
more than noise, an alarm is raised if a judge that is not trained against says that the answers have become
worse, or if answers have become much longer or shorter, repeat themselves, or do not end any more.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, PositiveFloat, model_validator

from megachat.align.rewards import Model, Reward
from megachat.config import Config
from megachat.log import say

Figures = Mapping[str, float]
"""The means of one rollout."""

KEPT = ("reward/mean", "answer/length", "answer/repetition", "answer/stopped", "judge")


class Hacked(ValueError):
    """The policy has learnt to please its reward alone."""


class Alarms(Config):
    """When a reward that rises is not to be believed."""

    window: NonNegativeInt
    """Rollouts: the mean of the newest so many is compared with that of the first so many; 0: no alarms."""
    noise: PositiveFloat
    """A mean has risen or fallen if it did by so many standard errors of its difference."""
    longer: Annotated[float, Field(gt=1)]
    """Answers so many times as long as at first, or so many times as short, are an alarm."""
    repetition: Annotated[float, Field(gt=0, le=1)]
    """An alarm if so much more of an answer is what it has said before, as a share of its fours of tokens."""
    unfinished: Annotated[float, Field(gt=0, le=1)]
    """So many more answers that do not end by themselves are an alarm, as a share of all."""
    judge: dict[str, Reward]
    """What says how good answers are, and is not trained on: a weighted sum. That it falls while the reward
    rises is an alarm. Empty: nobody says."""
    stop: bool
    """Whether an alarm ends the run; else it is said aloud, once of each kind, and the run goes on."""

    @model_validator(mode="after")
    def _can_tell(self) -> "Alarms":
        if self.window == 1:
            raise ValueError("window=1 says nothing about noise; use window=2 or more, or 0 for no alarms")
        for name, judge in self.judge.items():
            if isinstance(judge, Model):
                raise ValueError(
                    f"judge.{name} is a reward model, which only stages can ask; name a program or endpoint"
                )
        return self

    def watch(self, stage: str, figures: Figures, state: dict[str, Any]) -> dict[str, float]:
        """Takes note of a rollout. Says what is wrong, or raises Hacked; returns what is to be logged.

        `state` is what a checkpoint carries along.
        """
        if not self.window:
            return {}
        row = {name: figures[name] for name in KEPT if name in figures}
        history = state.get("alarms", {})
        if (history.get("window"), history.get("names")) != (self.window, [*row]):  # other settings: anew
            history = {
                "window": self.window,
                "names": [*row],
                "first": [],
                "newest": [],
                "count": 0,
                "told": [],
            }
        first = [*history["first"], row][: self.window]
        newest = [*history["newest"], row][-self.window :]
        count = history["count"] + 1
        wrong = self.wrong(first, newest) if count >= 2 * self.window else {}
        new = [kind for kind in wrong if kind not in history["told"]]
        told = [*history["told"], *new]
        state["alarms"] = history | {"first": first, "newest": newest, "count": count, "told": told}
        if new or (wrong and self.stop):
            text = (
                f"the reward has risen from {_mean(first, 'reward/mean'):.4g} to "
                f"{_mean(newest, 'reward/mean'):.4g}, but {'; '.join(wrong.values())}: the policy may be "
                "learning to please its reward alone"
            )
            if self.stop:
                raise Hacked(
                    f"{stage}: {text}. Look at samples.jsonl and mend the reward, raise the cost of the "
                    "distance to the reference (kl), or go on with alarms.stop=false"
                )
            say(f"ALARM: {stage}: {text}")
        return {"alarms": float(len(wrong))}

    def wrong(self, first: Sequence[Figures], newest: Sequence[Figures]) -> dict[str, str]:
        """What has gone wrong between two windows, by kind; nothing while the reward is no higher."""
        if not self._moved(first, newest, "reward/mean") > self.noise:
            return {}
        found = {}
        was, now = (_mean(rows, "answer/length") for rows in (first, newest))
        if now > was * self.longer or now < was / self.longer:
            found["length"] = f"answers have {now:.4g} tokens where they had {was:.4g}"
        was, now = (_mean(rows, "answer/repetition") for rows in (first, newest))
        if now > was + self.repetition:
            found["repetition"] = (
                f"{now:.0%} of what an answer says it has said before, where it was {was:.0%}"
            )
        was, now = (_mean(rows, "answer/stopped") for rows in (first, newest))
        if now < was - self.unfinished:
            found["stopped"] = f"{now:.0%} of the answers end by themselves, where {was:.0%} did"
        if self.judge and self._moved(first, newest, "judge") < -self.noise:
            was, now = (_mean(rows, "judge") for rows in (first, newest))
            found["judge"] = f"the judge gives them {now:.4g} where it gave {was:.4g}"
        return found

    def _moved(self, first: Sequence[Figures], newest: Sequence[Figures], name: str) -> float:
        """By how many standard errors a mean has moved."""
        before, after = ([row[name] for row in rows] for rows in (first, newest))
        apart = statistics.fmean(after) - statistics.fmean(before)
        spread = statistics.variance(before) / len(before) + statistics.variance(after) / len(after)
        return apart / max(spread**0.5, 1e-6 * max(1e-6, *map(abs, before), *map(abs, after)))


def _mean(rows: Sequence[Figures], name: str) -> float:
    return statistics.fmean(row[name] for row in rows)
