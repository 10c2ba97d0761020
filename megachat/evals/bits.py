"""Bits per byte: how many bits a model needs for each byte of text it has not seen.

Unlike the loss per token it does not depend on the tokenizer, so models with different vocabularies compare.
Only tokens that stand for bytes count: where a document begins and ends is neither text nor charged for.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from megachat.data.loader import Window, documents_of
from megachat.evals.score import Score, ratio
from megachat.log import track


@torch.inference_mode()
def bits_per_byte(
    model: nn.Module,
    windows: Sequence[Window],
    token_bytes: NDArray[np.int64],
    batch: int,
    seed: int = 0,
    what: str = "bits per byte",
) -> Score:
    """Over windows one token longer than what the model reads; a window is one item."""
    device = next(model.parameters()).device
    lengths = torch.as_tensor(token_bytes, device=device)
    bits, counts = [], []
    starts = range(0, len(windows), batch)
    for start in track(starts, what, len(starts), "batch"):
        rows = windows[start : start + batch]
        tokens = torch.from_numpy(np.stack([row.tokens for row in rows]).astype(np.int64)).to(device)
        documents = torch.from_numpy(documents_of(rows))
        labels = tokens[:, 1:]
        nats = model(tokens[:, :-1], documents[:, :-1], labels=labels, each=True)  # batch seq
        weights = lengths[labels]
        bits.append(torch.where(weights > 0, nats / math.log(2), 0.0).double().sum(1).cpu().numpy())
        counts.append(weights.sum(1).cpu().numpy())
    return ratio(np.concatenate(bits), np.concatenate(counts), seed)


def spread(total: int, count: int) -> list[int]:
    """At most `count` of `range(total)`, evenly spread, so that a part of the shard speaks for all of it.

    Example: spread(10, 4) -> [0, 2, 5, 7]
    """
    taken = min(count, total)
    return [index * total // taken for index in range(taken)]
