"""A model that is cut before it has memory."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megachat.parallel import engine
from megachat.parallel.mesh import start
from megachat.train.loop import engines
from megachat.train.pretrain import Pretrain
from tests.spawn import on_ranks
from tests.tiny_run import pretrain

VOCAB = 301
"""Which two tensor ranks do not divide."""
EXPERTS = "model.hidden=32 model.moe={experts:4,per_token:2,balance:0.05,router_z:0.001}"


def task(*overrides: str) -> Pretrain:
    stage = pretrain(Path("unused"), *overrides)
    assert isinstance(stage, Pretrain)
    return stage


def check(*layouts: str) -> None:
    """That all start from the same weights, to the last bit of fp32, though they compute in bf16."""
    for layout in layouts:
        stage = task("parallel.precision=bf16", *layout.split())
        torch.manual_seed(0)
        expected = stage.model.build(VOCAB).state_dict()
        torch.manual_seed(0)
        mesh = start(stage.parallel.tensor, sequence=stage.parallel.sequence)
        made = engines(stage, {"model": stage.model.blueprint(VOCAB)}, mesh)["model"]
        found = {name: tensor for name, tensor in made.logical() if name.startswith("weight.")}
        assert found.keys() == {f"weight.{name}" for name in expected}, layout
        for name, tensor in expected.items():
            assert torch.equal(found[f"weight.{name}"], tensor), f"{layout}: {name}"


@pytest.mark.slow
@on_ranks(2)
def test_all_zero_stages_start_from_the_same_weights() -> None:
    check(*(f"parallel=zero{zero}" for zero in range(4)), "parallel=zero3 parallel.persistent=0")


@pytest.mark.slow
@on_ranks(2)
def test_tensor_ranks_start_from_the_same_weights() -> None:
    check(*(f"parallel=zero{zero} parallel.tensor=2" for zero in (0, 1, 3)))


@pytest.mark.slow
@on_ranks(2)
def test_expert_ranks_start_from_the_same_weights() -> None:
    check(*(f"parallel=zero{zero} parallel.expert=2 {EXPERTS}" for zero in (0, 1, 3)))


@pytest.mark.slow
@on_ranks(2)
def test_ranks_that_share_rows_start_from_the_same_weights() -> None:
    check(*(f"parallel=zero{zero} parallel.sequence=2" for zero in (1, 3)))


@on_ranks(2)
def test_zero_3_never_has_memory_for_more_than_a_block_that_is_not_sharded_yet() -> None:
    mesh, stage = start(1), task("parallel=zero3", "model.layers=5", "parallel.precision=fp32")
    planned = stage.model.blueprint(40)
    parameters = [*planned.model.parameters()]
    give, most = engine._give_memory, 0

    def counted(*arguments: Any) -> None:
        nonlocal most
        give(*arguments)
        there = [one for one in parameters if not one.is_meta and not hasattr(one, "ds_id")]
        most = max(most, sum(one.numel() for one in there))

    engine._give_memory = counted
    engines(stage, {"model": planned}, mesh)
    attention, mlp, norms = 32 * (32 + 16 + 16 + 32), 3 * 32 * 64, 2 * 32 + 2 * 8
    assert most == attention + mlp + norms  # embedding and last norm, at the end, are fewer: 41 * 32
