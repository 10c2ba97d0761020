"""Where the time of a step goes: data, forward, backward, communication, optimizer, saving, and the rest.

The parts are those that the loop names with `watch.at("forward")`, and they add up to all of the time that
has passed. On a CPU the clock on the wall is read. A GPU works on while Python is elsewhere: it notes the
time itself whenever its main stream comes to such a place, and the notes are read when they are there,
without waiting for them; so they may be those of a step ago. What Python does meanwhile takes no time of the
GPU's, and is not seen.

Communication is a collective that is called, or waited for, from Python: with the wait for the other ranks in
it. On a GPU it is those on the main stream; what DeepSpeed overlaps runs on another one, and lengthens the
part that it sticks out of. The output layer's gradient is computed with its loss
(`megachat/model/cross_entropy.py`), so it counts as forward.
"""

import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

PARTS = {
    "data": "data", "forward": "forward", "backward": "backward", "communication": "communication",
    "step": "optimizer", "save": "saving", "validation": "validation", "sample": "validation",
    "rollout": "rollout", "reward": "rewards", "score": "scoring", "log": "logging", "profile": "profile",
}  # fmt: skip
"""The part that a section belongs to; the others are `other`."""
ALWAYS = ("data", "forward", "backward", "communication", "optimizer", "saving", "other")
"""Parts that are told of also when nothing was spent there."""

COLLECTIVES = (
    "all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_object", "all_gather_single",
    "all_reduce", "all_reduce_coalesced", "all_to_all", "all_to_all_single", "barrier", "broadcast",
    "broadcast_object_list", "gather", "gather_object", "recv", "reduce", "reduce_scatter",
    "reduce_scatter_single", "reduce_scatter_tensor", "scatter", "send",
)  # fmt: skip
"""Of torch.distributed: what waits for other ranks, or has the GPU wait for them."""


class Split:
    """Seconds by part, since they were last taken."""

    listening: "Split | None" = None
    """The one that is told of collectives."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device if device is not None and device.type == "cuda" else None
        self.spent: dict[str, float] = {}
        self.total: dict[str, float] = {}
        """As `spent`, but never taken."""
        self.section = ""
        self.span: Callable[[str], None] | None = None
        """Is told of each section while a trace is taken, so that it shows there."""
        self._depth = 0
        self._thread = threading.get_ident()
        self._since = time.monotonic()
        self._notes: deque[tuple[str, Any]] = deque()
        """The GPU's: the part that ends there, and when."""
        self._free: list[Any] = []
        self._last: Any = self._event() if self.device else None

    def begin(self, section: str) -> None:
        """What comes now is of this section; what has been was of the one before."""
        self._note(self.section)
        self.section = section
        if self.span is not None:
            self.span(section)

    def take(self, steps: int) -> dict[str, float]:
        """Seconds of each part, by step; they start again at 0."""
        self._note(self.section)
        self.read()
        parts = dict.fromkeys(ALWAYS, 0.0) | self.spent
        self.spent = {}
        return {f"time/{part}": seconds / max(steps, 1) for part, seconds in parts.items()}

    def read(self) -> None:
        """Adds up what the GPU has noted by now."""
        while self._notes and self._notes[0][1].query():
            part, event = self._notes.popleft()
            self._add(part, float(self._last.elapsed_time(event)) / 1000)
            self._free.append(self._last)
            self._last = event

    @contextmanager
    def communicating(self) -> Iterator[None]:
        """Meanwhile it is communication, unless the call is within another, or not of this run's training."""
        if self._depth or not self._training():
            yield
            return
        self._depth = 1
        self._note(self.section)
        try:
            yield
        finally:
            self._note("communication")
            self._depth = 0

    def _training(self) -> bool:
        if self.device is None:
            return threading.get_ident() == self._thread
        # Autograd has threads of its own for a GPU; the main stream is the one that marks are made on.
        own = threading.get_ident() == self._thread or self.section == "backward"
        return own and torch.cuda.current_stream() == torch.cuda.default_stream()

    def _note(self, section: str) -> None:
        part = PARTS.get(section, "other")
        if self.device is not None:
            self._notes.append((part, self._event()))
            return
        now = time.monotonic()
        self._add(part, now - self._since)
        self._since = now

    def _event(self) -> Any:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add(self, part: str, seconds: float) -> None:
        for sums in (self.spent, self.total):
            sums[part] = sums.get(part, 0.0) + seconds


def listen(split: Split | None) -> None:
    """From now on this one is told of collectives; None: none is."""
    Split.listening = split
    if split is not None:
        _wrap_all()


@functools.cache
def _wrap_all() -> None:
    """Once, and before DeepSpeed keeps functions of torch's for itself."""
    for name in COLLECTIVES:
        for module in (dist, dist.distributed_c10d):
            if hasattr(module, name):
                setattr(module, name, _told(getattr(module, name)))
    dist.Work.wait = _told(dist.Work.wait)  # type: ignore[method-assign]


def _told(collective: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(collective)
    def told(*arguments: Any, **named: Any) -> Any:
        split = Split.listening
        if split is None or torch.compiler.is_compiling():
            return collective(*arguments, **named)
        with split.communicating():
            return collective(*arguments, **named)

    return told
