"""Writing: one token after another, for many prompts of any lengths at once, with a key-value cache.

A `Writer` has slots. A text moves into one as soon as it is free and out with its last token, so that nobody
waits for the longest answer (continuous batching; Yu et al., 2022, Orca). Each text stands at the beginning
of its slot, and everything random in it follows from its seed (`draws`): it does not matter with which others
it is written, when it is added, or on which rank.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from megachat.config import Config
from megachat.model.draws import draw, keys
from megachat.model.layers import Cache
from megachat.model.precision import wide

READ = 4096
"""Tokens of prompts, pads included, that are read in one forward pass, at most, unless one alone has more."""
PADS = 256
"""Pads among them, at most."""


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
        self,
        logits: Float[Tensor, "batch vocab"],
        seeds: Sequence[int] = (),
        position: int | Sequence[int] = 0,
    ) -> Int[Tensor, " batch"]:
        """One token per row: the one that its seed draws at this position of its answer (or one for each)."""
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


def token_logps(
    logits: Float[Tensor, "batch vocab"], tokens: Int[Tensor, " batch"], temperature: float
) -> Float[Tensor, " batch"]:
    """log p of each token among all tokens, in fp32 at least: what a loss at this temperature computes.

    At temperature 0, where all the others have none, those at 1.
    """
    logits = logits.to(wide(logits)) / (temperature or 1.0)
    return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to continue."""

    prompt: Sequence[int]
    sampling: Sampling
    stop: Collection[int]
    """The tokens that end the answer."""
    seed: int = 0
    """64 bits that decide the answer; at temperature 0 of no matter."""


class Written(NamedTuple):
    """A token, just chosen."""

    request: int
    """Its request, by the number that `Writer.add` has given it."""
    token: int
    logp: float
    """Its log-probability among all tokens at the request's temperature; at 0, that at 1."""
    last: bool
    """Whether it ends the answer: it is a stop token, or there is no room for another."""


@dataclass(slots=True)
class _Text:
    """A request that is waiting, or has a slot."""

    number: int
    request: Request
    read: int = 0
    """Tokens that the model has read."""
    written: int = 0
    token: int = 0
    """The last one chosen."""
    ended: bool = False


class Writer:
    """Answers requests, which may come and go while it does."""

    def __init__(self, model: nn.Module, slots: int, capacity: int, pad: int = 0) -> None:
        """`slots` texts are written side by side, each of at most `capacity` tokens, but for its last."""
        self.model = model
        self.slots = slots
        self.capacity = capacity
        self.pad = pad
        self._cache = Cache(slots, capacity)
        self._added = 0
        self._waiting: dict[int, _Text] = {}
        self._texts: list[_Text] = []
        """One in each of the first slots."""

    @property
    def idle(self) -> bool:
        """Whether all that was asked for is written."""
        return not self._waiting and not self._texts

    def add(self, request: Request) -> int:
        """Takes a request; its number."""
        assert request.prompt, "a prompt without tokens has nothing to continue"
        needed = len(request.prompt) + request.sampling.max_new_tokens - 1
        if needed > self.capacity:
            raise ValueError(
                f"a prompt of {len(request.prompt)} tokens and max_new_tokens="
                f"{request.sampling.max_new_tokens} need room for {needed} tokens, and there is for "
                f"{self.capacity}; shorten one of them"
            )
        self._added += 1
        self._waiting[self._added - 1] = _Text(self._added - 1, request)
        return self._added - 1

    def cancel(self, number: int) -> None:
        """Forgets a request, unless it is already answered. Nothing more is written of it."""
        self._waiting.pop(number, None)
        for slot, text in enumerate(self._texts):
            if text.number == number:
                self._leave(slot)
                return

    @torch.no_grad()
    def step(self) -> list[Written]:
        """One forward pass, and the tokens chosen after it, in the order of their requests.

        It reads new prompts if there are slots for them, else goes on with all texts that have one. With
        nothing to do it reads a pad: under ZeRO 3, where ranks gather the weights together, each needs as
        many forward passes as the others, whatever they read in them.
        """
        with evaluating(self.model):
            if self._waiting and len(self._texts) < self.slots:
                texts = self._next()
                logits = self._read_prompts(texts)
            elif self._texts:
                texts = self._texts
                logits = self._read_tokens()
            else:
                self._forward([[self.pad]], [0])
                return []
        written = self._chosen(texts, logits)
        for slot in reversed(range(len(self._texts))):
            if self._texts[slot].ended:
                self._leave(slot)
        return sorted(written)

    def _next(self) -> list[_Text]:
        """Those of the waiting that get a slot now: the longest waiting, of them the shortest that make
        little padding.
        """
        first = [*islice(self._waiting.values(), self.slots - len(self._texts))]
        chosen: list[_Text] = []
        real = 0
        for text in sorted(first, key=lambda text: len(text.request.prompt)):
            length = len(text.request.prompt)
            whole = length * (len(chosen) + 1)
            if chosen and (whole > READ or whole - real - length > PADS):
                break
            chosen.append(text)
            real += length
        for text in chosen:
            del self._waiting[text.number]
        return chosen

    def _read_prompts(self, texts: Sequence[_Text]) -> Float[Tensor, "texts vocab"]:
        """Gives them the first free slots; the logits after their prompts."""
        prompts = [text.request.prompt for text in texts]
        counts = [len(prompt) for prompt in prompts]
        rows = [[*prompt, *[self.pad] * (max(counts) - len(prompt))] for prompt in prompts]
        first = len(self._texts)
        self._texts += texts
        for text, count in zip(texts, counts, strict=True):
            text.read = count
        return self._forward(rows, [0] * len(texts), counts, first)

    def _read_tokens(self) -> Float[Tensor, "texts vocab"]:
        """The logits after the last token of each text.

        With so many free slots that there are few different numbers of rows: a CPU kernel is made anew for
        each number.
        """
        count = len(self._texts)
        step = 8 if count > 8 else 1 << (count - 1).bit_length()
        spare = min(self.slots, -(-count // step) * step) - count
        rows = [[text.token] for text in self._texts] + [[self.pad]] * spare
        starts = [text.read for text in self._texts] + [0] * spare
        for text in self._texts:
            text.read += 1
        return self._forward(rows, starts)[:count]

    def _forward(
        self, rows: list[list[int]], starts: list[int], counts: Sequence[int] = (), first: int = 0
    ) -> Float[Tensor, "rows vocab"]:
        tokens = torch.tensor(rows, device=next(self.model.parameters()).device)
        reading = self._cache.read(starts, tokens.shape[1], counts, first)
        logits: Tensor = self.model(tokens, cache=reading)[:, -1]
        return logits

    def _chosen(self, texts: Sequence[_Text], logits: Float[Tensor, "texts vocab"]) -> list[Written]:
        """The next token of each text."""
        written = []
        for sampling, rows in _by_sampling(texts).items():
            some = [texts[row] for row in rows]
            own = logits if len(rows) == len(texts) else logits[torch.tensor(rows, device=logits.device)]
            seeds = [text.request.seed for text in some] if sampling.temperature else []
            tokens = sampling.choose(own, seeds, [text.written for text in some])
            logps = token_logps(own, tokens, sampling.temperature)
            for text, token, logp in zip(some, tokens.tolist(), logps.tolist(), strict=True):
                text.token = token
                text.written += 1
                text.ended = token in text.request.stop or text.written == sampling.max_new_tokens
                written.append(Written(text.number, token, logp, text.ended))
        return written

    def _leave(self, slot: int) -> None:
        """Frees a slot; the last text moves into it, so that those in use are the first."""
        last = self._texts.pop()
        if slot < len(self._texts):
            self._texts[slot] = last
            self._cache.move(len(self._texts), slot)


def _by_sampling(texts: Sequence[_Text]) -> dict[Sampling, list[int]]:
    """Which texts are sampled alike; mostly all."""
    first = texts[0].request.sampling
    if all(text.request.sampling is first for text in texts):
        return {first: [*range(len(texts))]}
    groups: dict[Sampling, list[int]] = {}
    for row, text in enumerate(texts):
        groups.setdefault(text.request.sampling, []).append(row)
    return groups


def write(
    model: nn.Module,
    requests: Sequence[Request],
    slots: int = 0,
    pad: int = 0,
    synced: Callable[[bool], bool] | None = None,
) -> Iterator[Written]:
    """Each token of the answers as it is chosen, by the requests' places in their sequence.

    `slots`: how many are written side by side; 0: all. `synced(finished)` says whether all ranks have
    finished; it is for ZeRO 3, which gathers weights in every forward and so needs equally many on all ranks.
    """
    assert requests, "no prompts"
    longest = max(len(request.prompt) + request.sampling.max_new_tokens - 1 for request in requests)
    writer = Writer(model, min(slots or len(requests), len(requests)), longest, pad)
    for request in requests:
        writer.add(request)
    with evaluating(model):
        while True:
            yield from writer.step()
            if synced(writer.idle) if synced else writer.idle:
                return


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
    `on_token(row, token)` hears of each as it is chosen. `synced` is `write`'s.
    """
    assert len(seeds) == len(prompts) or not sampling.temperature, "a seed for each prompt"
    requests = [
        Request(prompt, sampling, stop, seed)
        for prompt, seed in zip(prompts, seeds or [0] * len(prompts), strict=True)
    ]
    answers: list[list[int]] = [[] for _ in prompts]
    for row, token, _, _ in write(model, requests, pad=pad, synced=synced):
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
    for written in write(model, [Request(prompt, sampling, stop, seed)]):
        yield written.token


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off within, and as it was after."""
    if not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()
