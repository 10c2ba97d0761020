"""Rendered conversations as tensors: one per row with padding, or several per row with walls between them.

Labels are shifted here, once: `labels[i]` is the token after `tokens[i]` where that token is trained on, and
`IGNORE` elsewhere. What a model computes at a position then always belongs to the label at the same position.
What does not fit is left out whole, or cut off, and counted aloud. What is cut off has no stop token: with
one it would teach to stop in mid-sentence.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from megachat.log import say
from megachat.model.cross_entropy import IGNORE
from megachat.model.size import Work

T = TypeVar("T")

Rendered = tuple[list[int], list[int]]
"""Tokens, and the mask that is 1 on those to train on."""


@dataclass(frozen=True)
class Rows:
    """Rows of tokens of one length, padded on the right."""

    tokens: Int[Tensor, "batch seq"]
    labels: Int[Tensor, "batch seq"]
    real: Bool[Tensor, "batch seq"]
    """Which tokens are not padding."""

    @property
    def mask(self) -> Bool[Tensor, "batch seq"]:
        """Which positions have a label."""
        return self.labels != IGNORE

    def work(self) -> Work:
        """What they ask of a model that is asked for logits where there is a label."""
        numbers = torch.stack([self.real.sum(-1), self.mask.sum(-1)]).tolist()  # one wait for a GPU
        return Work.of(numbers[0], sum(numbers[1]))

    def part(self, start: int, stop: int) -> "Rows":
        """Some of the rows."""
        return Rows(self.tokens[start:stop], self.labels[start:stop], self.real[start:stop])

    def at(self, chosen: Int[Tensor, " chosen"]) -> "Rows":
        """The rows of these numbers, in their order."""
        return Rows(self.tokens[chosen], self.labels[chosen], self.real[chosen])

    def to(self, device: torch.device) -> "Rows":
        """The same on a device."""
        return Rows(self.tokens.to(device), self.labels.to(device), self.real.to(device))


def padded(rendered: Sequence[Rendered], pad: int) -> Rows:
    """One row each, as long as the longest.

    Example: tokens [5, 6, 7] with mask [0, 1, 1], beside a row of four tokens
    -> tokens [5, 6, 7, pad], labels [6, 7, IGNORE, IGNORE].
    """
    shape = len(rendered), max(len(tokens) for tokens, _ in rendered)
    rows = Rows(torch.full(shape, pad), torch.full(shape, IGNORE), torch.zeros(shape, dtype=torch.bool))
    for row, (tokens, mask) in enumerate(rendered):
        rows.tokens[row, : len(tokens)] = torch.tensor(tokens)
        rows.labels[row, : len(tokens) - 1] = torch.tensor(shifted(tokens, mask))
        rows.real[row, : len(tokens)] = True
    return rows


def shifted(tokens: Sequence[int], mask: Sequence[int]) -> list[int]:
    """The label of every token but the last, which is followed by nothing."""
    return [token if trained else IGNORE for token, trained in zip(tokens[1:], mask[1:], strict=True)]


@dataclass(frozen=True)
class Packed:
    """Rows of several conversations each; attention does not cross from one `document` to another."""

    tokens: Int[Tensor, "batch seq"]
    labels: Int[Tensor, "batch seq"]
    documents: Int[Tensor, "batch seq"]
    scale: Float[Tensor, "batch seq"] | None = None
    """How much each label counts; None: all 1."""

    @property
    def trained(self) -> int:
        """How many labels there are."""
        return int((self.labels != IGNORE).sum())

    @property
    def weight(self) -> float:
        """How much all labels count together."""
        return float(self.trained if self.scale is None else self.scale.sum(dtype=torch.float64))


def packed(rows: Sequence[Sequence[Rendered]], pad: int, length: int, prompt_weight: float = 0.0) -> Packed:
    """Each row's conversations one after the other; the padding behind them is a document of its own.

    With `prompt_weight` also the tokens that the mask leaves out have labels, which count that much.
    """
    shape = len(rows), length
    out = Packed(
        torch.full(shape, pad),
        torch.full(shape, IGNORE),
        torch.full(shape, -1),
        torch.zeros(shape) if prompt_weight else None,
    )
    for row, conversations in enumerate(rows):
        start = 0
        for document, (tokens, mask) in enumerate(conversations):
            stop = start + len(tokens)
            out.tokens[row, start:stop] = torch.tensor(tokens)
            if out.scale is None:
                out.labels[row, start : stop - 1] = torch.tensor(shifted(tokens, mask))
            else:
                out.labels[row, start : stop - 1] = torch.tensor(tokens[1:])
                out.scale[row, start : stop - 1] = torch.tensor(mask[1:]).clamp(min=prompt_weight)
            out.documents[row, start:stop] = document
            start = stop
    return out


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which items share a row of `capacity`: each, longest first, goes where it leaves the least room.

    Example: pack([4, 3, 6, 2], 8) -> [[2, 3], [0, 1]]: 6 + 2 and 4 + 3.
    """
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by the room they have left
    rows: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        length = lengths[item]
        assert 0 < length <= capacity, f"an item of {length} tokens for rows of {capacity}"
        room = next((room for room in range(length, capacity + 1) if by_room[room]), None)
        if room is None:
            rows.append([item])
            by_room[capacity - length].append(len(rows) - 1)
        else:
            row = by_room[room].pop(0)
            rows[row].append(item)
            by_room[room - length].append(row)
    return rows


def that_fit(
    items: Sequence[T], longest: Callable[[T], int], context: int, what: str, needed: bool = True
) -> list[T]:
    """The items whose longest row is within the context. How many are left out is said aloud.

    None at all is an error if they are `needed`, to train on.
    """
    kept = [item for item in items if longest(item) <= context]
    if needed and not items:
        raise ValueError(f"no {what} to train on; keep a smaller share of them for validation, or add some")
    if needed and not kept:
        raise ValueError(
            f"none of the {len(items):,} {what} fits in {context} tokens; "
            "use a larger context, or shorter texts"
        )
    if len(kept) < len(items):
        dropped = len(items) - len(kept)
        say(f"{dropped:,} of {len(items):,} {what} are longer than {context} tokens and are left out")
    return kept


def cut(
    items: Sequence[int], lengths: Callable[[int], int], read: Callable[[int], Rendered], context: int
) -> list[int]:
    """The items of which something to train on is left when they are cut off after `context` tokens."""
    long = [item for item in items if lengths(item) > context]
    empty = {item for item in long if not any(read(item)[1][:context])}
    if long:
        say(f"{len(long):,} of {len(items):,} conversations are cut off after {context} tokens")
    if empty:
        say(f"{len(empty):,} of them have nothing to train on before that, and are left out")
    return [item for item in items if item not in empty]


def drawn(count: int, seed: int, places: Iterable[int]) -> list[int]:
    """The items at these places of an endless order that shuffles all of them anew in every epoch.

    It follows from its arguments alone, so a run that resumes at a sample reads what it would have read.
    """
    return [int(_shuffled(count, seed, place // count)[place % count]) for place in places]


@lru_cache(maxsize=4)
def _shuffled(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)
