"""Writing: one token after another, for a batch of prompts of any lengths, with a key-value cache.

Prompts are padded on the left and the pads are hidden, so that a row gets what it would get alone.
Rows that have stopped are dropped from the batch once they are half of it. Everything random in a row follows
from its seed (`draws`), so it does not matter with which others it is written, or on which rank.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import torch
from jaxtyping import Float, Int
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from megachat.config import Config
from megachat.model.draws import draw, keys
from megachat.model.layers import Cache


class Sampling(Config):
    """How the next token is chosen."""

    temperature: NonNegativeFloat
    """Logits are divided by it; 0 takes the likeliest token every time."""
    top_k: NonNegativeInt
    """Only this many likeliest tokens are considered; 0 considers all."""
    top_p: Annotated[float, Field(gt=0, le=1)]
    """Only the likeliest tokens that together have this probability are considered; 1 considers all."""
    max_new_tokens: PositiveInt
    """The longest answer, in tokens."""

    def choose(
        self, logits: Float[Tensor, "batch vocab"], seeds: Sequence[int] = (), position: int = 0
    ) -> Int[Tensor, " batch"]:
        """One token per row: the one that its seed draws at this position of its answer."""
        if self.temperature == 0:
            return logits.argmax(-1)
        kept = truncate(logits.float() / self.temperature, self.top_k, self.top_p)
        return draw(kept.softmax(-1), keys(seeds, position, logits.device))


def truncate(logits: Float[Tensor, "batch vocab"], top_k: int, top_p: float) -> Float[Tensor, "batch vocab"]:
    """Logits with -inf outside the `top_k` likeliest, then outside the smallest set of probability `top_p`.

    The token that reaches `top_p` stays, so at least one does. Of equal logits the lower id comes first.
    Example: truncate(log [0.5, 0.3, 0.2], top_k=0, top_p=0.6) keeps the first two.
    """
    if top_k == 0 and top_p == 1:
        return logits
    values, order = logits.sort(descending=True, stable=True)
    if top_k:
        values[:, top_k:] = -torch.inf
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    if top_p < 1:
        values = values.masked_fill(before >= top_p, -torch.inf)
    return values.new_empty(values.shape).scatter_(-1, order, values)


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop: Collection[int],
    seeds: Sequence[int] = (),
    pad: int = 0,
    on_token: Callable[[int, int], None] | None = None,
    synced: Callable[[bool], bool] | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, up to and with the first that is in `stop`.

    `seeds`: one of 64 bits for each prompt, which decides its answer; at temperature 0 none is needed.
    `on_token(row, token)` hears of each as it is chosen. `synced(finished)` says whether all ranks have
    finished; it is for ZeRO-3, which gathers weights in every forward and so needs equally many on all ranks.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    for row, token in _write(model, prompts, sampling, stop, seeds, pad, synced):
        answers[row].append(token)
        if on_token is not None:
            on_token(row, token)
    return answers


def stream(
    model: nn.Module,
    prompt: Sequence[int],
    sampling: Sampling,
    stop: Collection[int],
    seed: int = 0,
) -> Iterator[int]:
    """The new tokens of one prompt, each as soon as it is chosen; the one in `stop` comes last."""
    for _, token in _write(model, [prompt], sampling, stop, [seed], 0, None):
        yield token


@torch.no_grad()
def _write(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop: Collection[int],
    seeds: Sequence[int],
    pad: int,
    synced: Callable[[bool], bool] | None,
) -> Iterator[tuple[int, int]]:
    """Yields (row, token) in the order they are chosen."""
    assert prompts, "no prompts"
    assert all(prompts), "a prompt without tokens has nothing to continue"
    assert len(seeds) == len(prompts) or not sampling.temperature, "a seed for each prompt"
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    tokens = torch.tensor([[pad] * n + list(p) for n, p in zip(padding, prompts, strict=True)], device=device)
    ragged = torch.tensor(padding, device=device) if any(padding) else None
    # The last token is chosen but never read, so it needs no place.
    cache = Cache(longest + sampling.max_new_tokens - 1, ragged)
    rows = list(range(len(prompts)))
    stopped: set[int] = set()
    with evaluating(model):
        for position in range(sampling.max_new_tokens):
            own = [seeds[row] for row in rows] if sampling.temperature else []
            chosen = sampling.choose(model(tokens, cache=cache)[:, -1], own, position)
            for row, token in zip(rows, chosen.tolist(), strict=True):
                if row not in stopped:
                    if token in stop:
                        stopped.add(row)
                    yield row, token
            going = [index for index, row in enumerate(rows) if row not in stopped]
            if synced(not going) if synced else not going:
                break
            kept = going or [0]  # another rank still writes: go along with one row
            if 2 * len(kept) <= len(rows):
                index = torch.tensor(kept, device=device)
                cache.keep(index)
                chosen, rows = chosen[index], [rows[i] for i in kept]
            tokens = chosen[:, None]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off within, and as it was after."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
