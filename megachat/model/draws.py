"""Draws that follow from numbers alone: whose answer it is, and which of its tokens.

Every token of the vocabulary gets an exponential time from a hash of (seed of the row, position, token); the
first to come at a rate of its probability is drawn, which is how `torch.multinomial` draws, too. There is no
state: a row draws the same in any batch, on any rank, on a CPU or a GPU. And it draws nearly the same from
nearly the same probabilities: rounding moves the choice as often as it moves probability, where a walk up the
cumulative distribution would add up the rounding of all tokens before.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 2**16
"""Numbers hashed at a time on a CPU, so that all passes over them stay in its cache: four times as fast."""


def seed_of(*parts: int | str) -> int:
    """64 bits that follow from the parts. Example: seed_of(0, "validation", 7)"""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest())


def keys(
    seeds: Sequence[int], position: int | Sequence[int], device: torch.device | str = "cpu"
) -> Int[Tensor, "rows 2"]:
    """What the rows draw their token of this position by, or of one position each: splitmix64 of each seed,
    in two halves.

    Steele, Lea and Flood, 2014, https://doi.org/10.1145/2660193.2660195.
    """
    positions = [position] if isinstance(position, int) else position
    x = np.array(seeds, np.uint64) + np.array([p * 0x9E3779B97F4A7C15 % 2**64 for p in positions], np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return torch.from_numpy(x.astype("<u8").view("<i4").reshape(-1, 2)).to(device)


def draw(probabilities: Float[Tensor, "rows vocab"], by: Int[Tensor, "rows 2"]) -> Int[Tensor, " rows"]:
    """A token for each row, by its key."""
    rows, vocab = probabilities.shape
    tokens = torch.arange(vocab, dtype=torch.int32, device=probabilities.device)
    size = max(1, BLOCK // vocab) if probabilities.device.type == "cpu" else rows
    found = [
        (some / exponentials(keyed, tokens)).argmax(-1)
        for some, keyed in zip(probabilities.split(size), by.split(size), strict=True)
    ]
    return torch.cat(found)


def exponentials(by: Int[Tensor, "rows 2"], tokens: Int[Tensor, " vocab"]) -> Float[Tensor, "rows vocab"]:
    """Exponential times of mean 1, each a hash of a row's key and a token.

    The hash is `lowbias32` (https://nullprogram.com/blog/2018/07/31/) of numbers that begin at one half of
    the key, in strides of the other. torch has no unsigned shift, hence the masks; the last shift goes
    without, which clears the sign: 31 random bits.
    """
    x = (by[:, 1:] | 1) * tokens  # rows vocab
    x += by[:, :1]
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= -0x7B935975  # 0x846ca68b as a signed number
    x ^= x >> 16
    # log1p, for small times decide: log(1 - 0.5 / 2**31) would be 0 in fp32, a time that always comes first.
    times = x.to(torch.float32).add_(0.5).mul_(-(2.0**-31)).clamp_(min=-1 + 2.0**-24).log1p_()
    return times.neg_()
