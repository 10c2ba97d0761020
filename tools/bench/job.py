"""What a training program is given, and how it tells how far it is: `pretrain.py` holds the clock.

A runner in `runners/` reads a job, trains on its rows in their order, and appends a line to its marks after
each so many steps; `pretrain.py` looks for the lines and notes when they come. It runs in the environment of
what it runs, so only Python's own library and NumPy may be imported here.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.bench.on_file import OnFile

IGNORE = -100
"""The label of a position that is not trained on."""


@dataclass(frozen=True, kw_only=True)
class Job(OnFile):
    """The same for all of a table, but for where the marks go."""

    rows: str
    """A .npy file of ids, [steps x batch, context]: each row is one document, in the order of training."""
    marks: str
    """A file of JSON lines: what the program has done so far."""
    model: dict[str, Any]
    """The shape, by the names of `megachat.model.gpt.GPTConfig`."""
    vocab: int
    context: int
    batch: int
    """Rows of one optimizer step."""
    micro_batch: int
    """Rows that pass through the model at once."""
    steps: int
    """Optimizer steps in all."""
    interval: int
    """Steps between two marks."""
    device: str
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip: float
    checkpointing: bool
    """Whether activations are computed again in the backward pass."""

    def micro_batches(self, step: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """The inputs and labels of a step, [micro_batch, context] each."""
        rows = np.load(self.rows, mmap_mode="r")
        for first in range(step * self.batch, (step + 1) * self.batch, self.micro_batch):
            inputs = rows[first : first + self.micro_batch].astype(np.int64)
            yield inputs, labels_of(inputs)

    def mark(self, step: int, loss: float) -> None:
        """Says that so many steps have been taken; `loss` is a token's, the mean since the last mark."""
        row = {"step": step, "tokens": step * self.batch * self.context, "loss": loss}
        torch = sys.modules.get("torch")
        if self.device == "cuda" and torch is not None:
            row["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        with Path(self.marks).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def labels_of(inputs: NDArray[np.int64]) -> NDArray[np.int64]:
    """The token after each; none for the last, behind which another document begins."""
    return np.pad(inputs[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE)
