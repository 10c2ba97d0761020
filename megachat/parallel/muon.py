"""Muon: steps that are orthogonal matrices (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/).

Adam scales every number of a gradient by itself. Muon keeps one momentum and takes of it, for each matrix,
the nearest orthogonal one: all its directions count alike. What is not a matrix between states (embeddings,
the output layer, norms, biases) is AdamW's.

A step is made as large as AdamW's are wont to be, 0.2 times the root of the longer side, so that AdamW's
learning rate and decay serve for both (Liu et al., 2025, https://arxiv.org/abs/2502.16982, section 2.2).

A matrix must be whole to be orthogonalised, and ZeRO and tensor parallelism leave a rank a piece of it. The
momentum stays in pieces. Each matrix is given to a data rank that holds much of it; the others send it theirs
and get their share of the result, so over all data ranks a matrix is computed once. Tensor ranks each gather
the whole one. Under ZeRO 0 every data rank holds all matrices, and computes them all.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

from megachat.parallel.mesh import Mesh
from megachat.parallel.tensor import whole

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Piece:
    """What a flat tensor of the optimizer has of one matrix."""

    shape: torch.Size
    """Of this tensor rank's part of the matrix."""
    axis: int | None
    """Along which the tensor ranks have cut it."""
    start: int
    """Where in the flat tensor it begins."""
    counts: tuple[int, ...]
    """How many of its numbers each data rank has, one rank after the other; one count: every rank has all."""
    owner: int
    """The data rank that orthogonalises it."""


class Muon(torch.optim.Optimizer):
    """Muon for the groups marked `muon`, AdamW for the others."""

    def __init__(
        self,
        groups: Groups,
        lr: float,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
        fused: bool,
        orthogonal: Callable[[Tensor], Tensor],
    ) -> None:
        """`orthogonal` makes all singular values of a matrix about 1."""
        defaults = {
            "lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "fused": fused,
            "weight_decay": 0.0, "muon": False,
        }  # fmt: skip
        super().__init__(groups, defaults)
        self._orthogonal = orthogonal
        self._pieces: Mapping[Tensor, Sequence[Piece]] = {}
        self._mesh: Mesh | None = None

    def spread(self, pieces: Mapping[Tensor, Sequence[Piece]], mesh: Mesh) -> None:
        """Says which matrices the tensors of the groups marked `muon` have pieces of; without, each is one.

        All data ranks give theirs in the same order.
        """
        self._pieces, self._mesh = pieces, mesh

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient. Of Muon's, the gradients are used up."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["muon"]:
                for parameter in parameters:
                    self._step_of_muon(parameter, group)
            elif parameters:
                self._step_of_adamw(parameters, group)

    def _step_of_muon(self, parameter: Tensor, group: Mapping[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp_(momentum, group["momentum"])  # Nesterov's
        self._orthogonalise(parameter, update)
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def _step_of_adamw(self, parameters: list[Tensor], group: Mapping[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                step = torch.zeros((), device=parameter.device if group["fused"] else "cpu")
                moments = {moment: torch.zeros_like(parameter) for moment in ("exp_avg", "exp_avg_sq")}
                self.state[parameter] |= {"step": step, **moments}
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            max_exp_avg_sqs=[],
            state_steps=[state["step"] for state in states],
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _orthogonalise(self, parameter: Tensor, update: Tensor) -> None:
        """Replaces the pieces of matrices in `update` by those of the steps that they make."""
        pieces = self._pieces.get(parameter)
        if pieces is None:
            update.copy_(scaled(self._orthogonal(update)))
            return
        assert self._mesh is not None
        if len(pieces[0].counts) > 1:
            self._exchange(pieces, update, self._mesh)
            return
        for piece in pieces:
            part = update.view(-1)[piece.start : piece.start + piece.shape.numel()].view(piece.shape)
            part.copy_(self._step_of(part, piece, self._mesh))

    def _exchange(self, pieces: Sequence[Piece], update: Tensor, mesh: Mesh) -> None:
        me, ranks = mesh.replica_rank, range(mesh.replicas)
        held = [update[piece.start : piece.start + piece.counts[me]] for piece in pieces]
        of = [[index for index, piece in enumerate(pieces) if piece.owner == rank] for rank in ranks]
        owned = [pieces[index] for index in of[me]]
        here = [[pieces[index].counts[me] for index in of[rank]] for rank in ranks]
        there = [[piece.counts[rank] for piece in owned] for rank in ranks]
        sent = torch.cat([held[index] for rank in ranks for index in of[rank]])
        came = _all_to_all(sent, here, there, mesh)
        steps = []
        for number, piece in enumerate(owned):
            part = torch.cat([came[rank][number] for rank in ranks]).view(piece.shape)
            steps.append(self._step_of(part, piece, mesh).flatten().split(piece.counts))
        del came, sent  # as large as this rank's share of all matrices
        sent = torch.cat([update[:0], *(step[rank] for rank in ranks for step in steps)])
        back = _all_to_all(sent, there, here, mesh)
        for rank in ranks:
            for index, step in zip(of[rank], back[rank], strict=True):
                held[index].copy_(step)

    def _step_of(self, part: Tensor, piece: Piece, mesh: Mesh) -> Tensor:
        """This tensor rank's part of a matrix's step, from its part of the matrix."""
        if piece.axis is None:
            return scaled(self._orthogonal(part))
        count = part.shape[piece.axis] * mesh.tensor
        step = scaled(self._orthogonal(whole(part, piece.axis, count, mesh.tensor_group, mesh.tensor)))
        return step.chunk(mesh.tensor, piece.axis)[mesh.tensor_rank]


def scaled(step: Tensor) -> Tensor:
    """An orthogonal matrix made as large as a step of AdamW.

    Its numbers have a root mean square of 1 / sqrt(longer side), and AdamW's of 0.2 to 0.4.
    """
    return step * (0.2 * max(step.shape[-2:]) ** 0.5)


def owners(counts: Sequence[Sequence[int]]) -> list[int]:
    """Which rank computes each matrix, given how much of it each has.

    Of those with more than half as much as any it is the one that has the least to do so far.
    Example: owners([[4, 2], [3, 3], [3, 3]]) -> [0, 1, 0]
    """
    loads = [0] * len(counts[0]) if counts else []
    chosen = []
    for held in counts:
        able = [rank for rank, count in enumerate(held) if 2 * count > max(held)]
        rank = min(able, key=loads.__getitem__)
        loads[rank] += sum(held)
        chosen.append(rank)
    return chosen


def _all_to_all(
    sent: Tensor, outgoing: Sequence[Sequence[int]], incoming: Sequence[Sequence[int]], mesh: Mesh
) -> list[tuple[Tensor, ...]]:
    """What each data rank has for this one: of rank r tensors of `incoming[r]` numbers.

    `sent` is laid end to end, for rank r `outgoing[r]` numbers.
    """
    sizes = [sum(counts) for counts in incoming]
    came = sent.new_empty(sum(sizes))
    dist.all_to_all_single(came, sent, sizes, [sum(counts) for counts in outgoing], group=mesh.replica_group)
    return [part.split(list(counts)) for part, counts in zip(came.split(sizes), incoming, strict=True)]
