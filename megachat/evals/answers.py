"""Asking a model many questions at once, and measuring the answers: their reward, the policy's KL.

Everything is sorted by length before it is cut into batches, so that little is padded, and comes back in the
order it was given in. Padding is on the right where nothing is generated: no token sees what comes after it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from megachat.log import track
from megachat.model.draws import seed_of
from megachat.model.generate import Sampling, generate
from megachat.model.gpt import GPT
from megachat.model.heads import Scalar
from megachat.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said to a prompt."""

    tokens: list[int]
    """With the one that ended it, if it came to an end."""
    text: str


def answer(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    batch: int,
    stop: int,
    seed: int = 0,
    what: str = "answers",
) -> list[Answer]:
    """The model's answer to each prompt, up to and with the token `stop`."""
    answers: list[Answer | None] = [None] * len(prompts)
    cut = list(batches(prompts, batch))
    for rows in track(cut, what, len(cut), "batch"):
        asked = [prompts[row] for row in rows]
        seeds = [seed_of(seed, row) for row in rows]
        written = generate(model, asked, sampling, {stop}, seeds, pad=tokenizer.pad)
        for row, tokens in zip(rows, written, strict=True):
            answers[row] = Answer(tokens, tokenizer.decode(tokens))
    return [one for one in answers if one is not None]


@torch.inference_mode()
def rewards(model: nn.Module, conversations: Sequence[Sequence[int]], batch: int) -> NDArray[np.float64]:
    """The reward model's score of each conversation, read at its last token."""

    lengths = torch.tensor([len(row) for row in conversations], device=device_of(model))

    def score(tokens: Int[Tensor, "batch seq"], rows: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        scores: Tensor = model(tokens)
        return scores.gather(1, lengths[rows, None] - 1).squeeze(1)

    return _measure(score, conversations, batch, device_of(model))


@torch.inference_mode()
def divergences(
    policy: nn.Module,
    reference: nn.Module,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Answer],
    batch: int,
) -> NDArray[np.float64]:
    """KL(policy || reference) of each whole answer, in nats, where the policy sampled the answers at
    temperature 1.

    At each token of the answer the divergence of the two next-token distributions is computed exactly, and
    summed. Its mean is that of the usual estimate, log policy(answer) - log reference(answer), but it is
    never negative and never varies more (Amini et al., 2025, https://arxiv.org/abs/2504.10637).
    """
    conversations = [[*prompt, *one.tokens] for prompt, one in zip(prompts, answers, strict=True)]
    device = device_of(policy)
    starts = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ends = torch.tensor([len(conversation) for conversation in conversations], device=device)

    def diverge(tokens: Int[Tensor, "batch seq"], rows: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        ours = F.log_softmax(policy(tokens).float(), -1)
        theirs = F.log_softmax(reference(tokens).float(), -1)
        divergence = (ours.exp() * (ours - theirs)).sum(-1)  # batch seq
        position = torch.arange(1, tokens.shape[1] + 1, device=device)  # of the token that is predicted
        inside = (position >= starts[rows, None]) & (position < ends[rows, None])
        return torch.where(inside, divergence, 0.0).sum(1)

    return _measure(diverge, conversations, batch, device)


def batches(rows: Sequence[Sequence[int]], batch: int) -> Iterator[list[int]]:
    """The indices of the rows, longest first, `batch` at a time: if memory does not suffice, it fails at
    once.

    Example: batches([[1], [1, 2, 3], [1, 2]], 2) yields [1, 2] and [0]
    """
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    for start in range(0, len(order), batch):
        yield order[start : start + batch]


def device_of(model: nn.Module) -> torch.device:
    """Where the model's weights are."""
    return next(model.parameters()).device


def context_of(model: nn.Module) -> int:
    """The longest sequence that a language model or a reward model reads, in tokens."""
    trunk = model.trunk if isinstance(model, Scalar) else model
    assert isinstance(trunk, GPT), f"{type(trunk).__name__} is not a model of megachat.model"
    return trunk.config.context


def best_device(device: str) -> torch.device:
    """The device that a setting means: `auto`, `cpu` or `cuda`."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no GPU here; use device=cpu or device=auto")
    return torch.device(device)


def _measure(
    function: Callable[[Int[Tensor, "batch seq"], Int[Tensor, " batch"]], Float[Tensor, " batch"]],
    conversations: Sequence[Sequence[int]],
    batch: int,
    device: torch.device,
) -> NDArray[np.float64]:
    """One number for each conversation: what `function` makes of the padded tokens of some rows, and which
    they are."""
    numbers = np.zeros(len(conversations))
    for rows in batches(conversations, batch):
        chosen = [conversations[row] for row in rows]
        longest = max(map(len, chosen))
        padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in chosen], device=device)
        numbers[rows] = function(padded, torch.tensor(rows, device=device)).double().cpu().numpy()
    return numbers
