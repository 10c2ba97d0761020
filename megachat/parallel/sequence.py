"""Rows that ranks share, DeepSpeed-Ulysses (Jacobs et al., 2023, https://arxiv.org/abs/2309.14509).

Each rank has some of the tokens of every row: what is computed token by token it computes of its own. For
attention the ranks exchange tokens for heads, so that each has whole rows of some heads, and back again.
Ranks that share rows hold the same weights, so ZeRO shards over them as it does over data ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megachat.model.gpt import GPT, GPTConfig
from megachat.model.layers import Attention
from megachat.model.rows import Attend
from megachat.parallel.mesh import Mesh, divisors
from megachat.parallel.tensor import Sum

Around = Callable[[Attend, Any], Callable[..., Tensor]]
"""From attention over whole rows, and a group of ranks, to attention over stretches of them."""


def check_rows(config: GPTConfig, sequence: int, context: int) -> None:
    """Raises unless heads and tokens divide evenly."""
    if sequence > 1 and config.moe is not None:
        raise ValueError(
            f"parallel.sequence={sequence} leaves routers no whole rows to be balanced over (model.moe); "
            "use parallel.sequence=1"
        )
    for name, count in (("model.kv_heads", config.kv_heads), ("context", context)):
        if count % sequence:
            both = [n for n in divisors(config.kv_heads) if context % n == 0]
            raise ValueError(
                f"parallel.sequence={sequence} does not divide {name}={count}; use one of {both}"
            )


def share_rows(model: nn.Module, mesh: Mesh, around: Around) -> None:
    """Leaves each rank of a row its stretch of it. `around` exchanges tokens for heads and back."""
    if mesh.sequence > 1:
        for module in model.modules():
            if isinstance(module, GPT | Attention):
                module.stretch = Own(mesh, around)


@dataclass(frozen=True)
class Own:
    """This rank's stretch of each row, for `megachat.model.rows.Stretch`."""

    mesh: Mesh
    around: Around

    def start(self, seq: int) -> int:
        """The place of its first token."""
        assert seq % self.mesh.sequence == 0, f"{self.mesh.sequence} ranks do not divide rows of {seq} tokens"
        return seq // self.mesh.sequence * self.mesh.sequence_rank

    def own(self, rows: Tensor) -> Tensor:
        """Its tokens."""
        first = self.start(rows.shape[1])
        return rows[:, first : first + rows.shape[1] // self.mesh.sequence]

    def attend(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        """Whole rows of this rank's heads, and back."""
        return self.around(attend, self.mesh.sequence_group)(q, k, v, 0, None, mask)

    def sum(self, part: Tensor) -> Tensor:
        """Over the ranks that share rows."""
        total: Tensor = Sum.apply(part, self.mesh.sequence_group)
        return total

    def join(self, part: Tensor) -> Tensor:
        """Whole rows."""
        parts = [torch.empty_like(part) for _ in range(self.mesh.sequence)]
        dist.all_gather(parts, part.contiguous(), group=self.mesh.sequence_group)
        return torch.cat(parts, dim=1)
