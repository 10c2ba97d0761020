"""What the writer says a token's log-probability is, the loss finds, too: in every layout, and after a step.

The bounds are those that NeMo RL gates its rollouts by. A cache, a weight or a temperature that is stale or
wrong moves log-probabilities by a hundred times as much.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, tensor

from megachat.align.logprobs import token_logps
from megachat.align.rows import Rows, padded
from megachat.model.cross_entropy import IGNORE
from megachat.model.generate import Request, Sampling, write
from megachat.model.moe import MoEConfig
from megachat.parallel.engine import Engine
from megachat.parallel.mesh import Mesh, start
from megachat.train.optimizers import AdamW
from tests.parallel.test_tensor import VOCAB, build
from tests.spawn import on_ranks
from tests.tiny_model import spread

STOP = {*range(20)}
"""Of 301 words: some answers end before the others."""


def trained(mesh: Mesh, moe: MoEConfig | None = None, **layout: Any) -> Engine:
    """An engine for a model that is far from undecided."""
    model = build(tied=False).config.model_copy(update={"moe": moe}).build(VOCAB)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(8 if name.startswith("head") else 4)
    optimizer = AdamW(lr=1e-2, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8)
    return Engine(model, optimizer.build, optimizer.groups(model), spread(**layout), 1.0, mesh)


def answered(engine: Engine, mesh: Mesh, temperature: float, slots: int) -> tuple[Rows, Tensor]:
    """Answers to some prompts of a data rank's own, and the writer's log-probability of each token."""
    sampling = Sampling(temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=14)
    prompts = torch.randint(VOCAB, (8, 9), generator=torch.Generator().manual_seed(mesh.data_rank)).tolist()
    requests = [Request(prompt[: 2 + row], sampling, STOP, row) for row, prompt in enumerate(prompts)]
    requests = requests if slots > 1 else requests[-2:]
    texts = [[*request.prompt] for request in requests]
    logps: list[list[float]] = [[] for _ in requests]
    with engine.inference() as model:
        for written in write(model, requests, slots, synced=mesh.all):
            texts[written.request].append(written.token)
            logps[written.request].append(written.logp)
    assert slots == 1 or len({len(row) for row in logps}) > 1
    masks = [[0] * (len(text) - len(row)) + [1] * len(row) for text, row in zip(texts, logps, strict=True)]
    return padded([*zip(texts, masks, strict=True)], pad=0), tensor([one for row in logps for one in row])


def by_the_loss(engine: Engine, rows: Rows, temperature: float) -> Tensor:
    """The log-probability of each token of the answers, by the forward pass that has a gradient."""
    logps = token_logps(engine(rows.tokens, where=rows.mask), rows.labels, temperature or 1.0)
    return logps[rows.mask]


def check(engine: Engine, mesh: Mesh) -> None:
    """Greedy and sampled, one and eight at a time, before and after an update."""
    for _ in range(2):
        for temperature in (0.0, 0.7):
            for slots in (1, 8):
                rows, written = answered(engine, mesh, temperature, slots)
                found = by_the_loss(engine, rows, temperature)
                apart = (found.detach() - written).abs()
                if engine.parallel.bf16:
                    assert apart.exp().mean() < 1.05
                else:
                    assert apart.max() < 1e-4
        assert found.detach().std() > 0.3  # or all were alike, and nothing shown
        labels = torch.where(rows.labels == IGNORE, IGNORE, (rows.labels + 1) % VOCAB)
        engine.backward(engine(rows.tokens, labels=labels) / written.numel(), last=True)
        engine.step(1e-2)
        moved = (by_the_loss(engine, rows, temperature).detach() - written).abs()
        assert moved.mean() > 0.3  # what a writer of stale weights would be off by


@pytest.mark.slow
@on_ranks(1)
def test_one_rank_writes_with_the_probabilities_of_the_loss() -> None:
    mesh = start(1)
    check(trained(mesh, zero=0, precision="fp32"), mesh)
    check(trained(mesh, zero=0, precision="bf16"), mesh)  # by autocast
    check(trained(mesh, zero=1, precision="bf16"), mesh)  # of bf16 weights


@pytest.mark.slow
@on_ranks(2)
def test_two_data_ranks_write_with_the_probabilities_of_the_loss() -> None:
    mesh = start(1)
    check(trained(mesh, zero=2, precision="fp32"), mesh)
    check(trained(mesh, zero=3, precision="fp32"), mesh)
    check(trained(mesh, zero=3, precision="bf16"), mesh)


@pytest.mark.slow
@on_ranks(2)
def test_two_tensor_ranks_write_with_the_probabilities_of_the_loss() -> None:
    mesh = start(2)
    check(trained(mesh, zero=1, tensor=2, precision="fp32"), mesh)
    check(trained(mesh, zero=1, tensor=2, precision="bf16"), mesh)


@pytest.mark.slow
@on_ranks(2)
def test_two_ranks_that_spread_experts_write_with_the_probabilities_of_the_loss() -> None:
    mesh = start(1)
    experts = MoEConfig(experts=4, per_token=2, balance=0.05, router_z=0.001)
    check(trained(mesh, experts, zero=1, expert=2, precision="fp32"), mesh)
