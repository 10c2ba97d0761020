"""What a model that has some tokens of each row only, a stretch, asks of the ranks that have the rest."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

Attend = Callable[..., Tensor]
"""From queries, keys, values (batch seq heads head_dim) and a mask to what each token has gathered."""


@runtime_checkable
class Stretch(Protocol):
    """The tokens of each row that are here. All ranks of a row call these together."""

    def start(self, seq: int) -> int:
        """The place of the first in rows of `seq` tokens."""
        raise NotImplementedError

    def own(self, rows: Tensor) -> Tensor:
        """Those of whole rows (batch seq) that are here."""
        raise NotImplementedError

    def attend(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        """Over whole rows, of which the mask is, and some heads on each rank. Passes gradients on."""
        raise NotImplementedError

    def sum(self, part: Tensor) -> Tensor:
        """Over the ranks, the same on all. Its gradient goes to each of them."""
        raise NotImplementedError

    def join(self, part: Tensor) -> Tensor:
        """Whole rows (batch seq), of which each rank has its tokens. Without gradients."""
        raise NotImplementedError
