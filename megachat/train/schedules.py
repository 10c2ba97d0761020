"""Learning-rate schedules: the factor on the peak learning rate at each step. Steps count from 0."""

import math
from typing import Annotated

from pydantic import Field, model_validator

from megachat.config import Config

Share = Annotated[float, Field(ge=0, le=1)]


class Schedule(Config):
    """Scales the learning rate over a run."""

    warmup: Share
    """The share of all steps over which the rate rises from near 0 to its peak."""

    def factor(self, step: int, total: int) -> float:
        """The factor for optimizer step `step` of `total`; past the end it stays what it is there."""
        warm = round(self.warmup * total)
        if step < warm:
            return (step + 1) / warm
        return self.after((step - warm) / max(1, total - warm))

    def after(self, progress: float) -> float:
        """The factor once warm; `progress` runs from 0 to 1."""
        raise NotImplementedError


class Constant(Schedule):
    """Warm up, then stay."""

    def after(self, progress: float) -> float:
        """Always 1."""
        return 1.0


class Cosine(Schedule):
    """Half a cosine from the peak down to the floor (Loshchilov and Hutter, 2017, https://arxiv.org/abs/1608.03983).

    Example: Cosine(warmup=0, floor=0).factor(5, 10) -> 0.5
    """

    floor: Share
    """The factor at the end."""

    def after(self, progress: float) -> float:
        """1 at 0, the floor from 1 on."""
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class WarmupStableDecay(Schedule):
    """Warm up, stay, then fall linearly (Hu et al., 2024, https://arxiv.org/abs/2404.06395).

    Example: WarmupStableDecay(warmup=0, decay=0.5, floor=0).factor(75, 100) -> 0.5
    """

    decay: Share
    """The share of all steps over which the rate falls at the end."""
    floor: Share
    """The factor at the end."""

    @model_validator(mode="after")
    def _fits(self) -> "WarmupStableDecay":
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup ({self.warmup}) and decay ({self.decay}) together exceed the run (1.0)")
        return self

    def after(self, progress: float) -> float:
        """1 until the decay begins, the floor from 1 on."""
        length = self.decay / (1 - self.warmup) if self.warmup < 1 else 0.0
        left = min(1.0, max(0.0, (1 - progress) / length)) if length else float(progress < 1)
        return self.floor + (1 - self.floor) * left
