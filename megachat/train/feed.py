"""Batches are ready before their step: a thread reads them, puts them together and sends them to the GPU.

They leave from pinned memory on a stream of their own, so that neither Python nor a kernel waits for a copy;
the step's own stream waits for the one it needs, which is long over unless reading is slower than training.
What is read does not change: a batch follows from where it begins in the data.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import NonNegativeInt
from torch import Tensor

from megachat.data.loader import ahead
from megachat.train.loop import Batch, Running, Task, mapped, moved

B = TypeVar("B", bound=Batch)


class Fed(Task):
    """A stage whose batches are known beforehand: they are read, and not sampled from the model."""

    prefetch: NonNegativeInt
    """Steps whose batches a thread makes ahead and sends to the GPU; 0: none."""

    neutral: ClassVar[tuple[str, ...]] = (*Task.neutral, "prefetch")


def fed(task: Fed, run: Running, make: Callable[[int], Sequence[B]]) -> Iterator[list[Batch]]:
    """For each step from `run.progress` on, this rank's micro-batches.

    `make` puts them together in host memory, for the step that begins at a sample of that number.
    """
    lane = Lane(run.mesh.device)
    for sent in ahead(lambda start: lane.send(make(start)), run.progress.samples, task.batch, task.prefetch):
        yield [*lane.receive(*sent)]


class Lane:
    """The way of batches to a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, batches: Sequence[B]) -> tuple[list[B], Any]:
        """They set out; with them what tells that they have arrived. From any thread."""
        if self.stream is None:
            return [moved(batch, self.device) for batch in batches], None
        with torch.cuda.stream(self.stream):
            sent = [mapped(batch, self._copied) for batch in batches]
            return sent, self.stream.record_event()

    def receive(self, batches: list[B], arrived: Any) -> list[B]:
        """What the stream of the thread that asks does from now on waits until they have arrived."""
        if arrived is None:
            return batches
        here = torch.cuda.current_stream(self.device)
        here.wait_event(arrived)

        def used(tensor: Tensor) -> Tensor:
            tensor.record_stream(here)  # or its memory would be taken again while a kernel reads it
            return tensor

        return [mapped(batch, used) for batch in batches]

    def _copied(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(self.device, non_blocking=True)
