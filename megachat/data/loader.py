"""Token windows, in one order for all ranks: which samples a step reads depends on nothing else.

The order is a list of window numbers, shuffled anew each epoch and endless. A step takes the next so many of
it, and each rank its slice; so world size, micro-batch and workers do not change what is read, and where a
run stands in its data is one number, the samples consumed. grain computes the shuffle index by index: no list
is ever in memory.
"""

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megachat.data.shards import Shard

if TYPE_CHECKING:
    import grain

Window = dict[str, NDArray[np.int64]]


class TokenWindows:
    """The tokens of a shard cut into windows of `length`, each with the label of its last token.

    Windows ignore where documents begin; `documents` tells, so that attention can stay inside one.
    """

    def __init__(self, shard: Shard, length: int) -> None:
        self.shard, self.length = shard, length
        if len(self) < 1:
            raise ValueError(
                f"{shard.path} has {len(shard.tokens):,} tokens, but one window of {length:,} and the label "
                f"after it take {length + 1:,}; add text, use a smaller context, or, if it is the validation "
                "shard that is short, encode again with a larger validation=..."
            )

    def __len__(self) -> int:
        return max(len(self.shard.tokens) - 1, 0) // self.length

    def __getitem__(self, number: int) -> Window:
        start = int(number) * self.length
        if not 0 <= number < len(self):
            raise IndexError(f"window {number} of {len(self)}")
        positions = np.arange(start, start + self.length + 1)
        return {
            "tokens": self.shard.tokens[start : start + self.length + 1].astype(np.int64),
            "documents": np.searchsorted(self.shard.documents, positions, side="right") - 1,
        }


def order(source: Any, seed: int) -> "grain.MapDataset[Any]":
    """The samples of any indexable source, shuffled, endlessly repeated, shuffled anew in each epoch."""
    # Imported here, for it takes a second; and it warns that there is no jax, which nothing here needs.
    logging.getLogger("absl").addFilter(lambda record: "jax" not in record.getMessage())
    import grain

    return grain.MapDataset.source(source).shuffle(seed).repeat()


def share(samples: "grain.MapDataset[Any]", start: int, count: int, rank: int, world: int) -> list[Any]:
    """What `rank` of `world` reads in the step that takes `count` samples, the first of them number `start`.

    Example: share(samples, start=8, count=4, rank=1, world=2) -> [samples[10], samples[11]]
    """
    if count % world:
        fitting = [size for size in range(1, count + 1) if count % size == 0]
        raise ValueError(
            f"{world} ranks cannot share the {count} samples of a step; use one of {fitting} ranks"
        )
    each = count // world
    return [samples[start + rank * each + number] for number in range(each)]
