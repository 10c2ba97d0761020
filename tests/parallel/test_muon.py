"""Muon computes the same in every layout, though each holds a matrix in other pieces."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megachat.parallel.engine import Engine
from megachat.parallel.mesh import start
from tests.parallel.test_engine import compare, curve
from tests.parallel.test_reshard import TOKENS, engine_of, nats, task
from tests.spawn import on_ranks
from tests.tiny_run import make


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("layouts") / "runs" / "tiny")


@on_ranks(1)
def reference(tiny: Path) -> None:
    (tiny / "reference.json").write_text(json.dumps(curve(tiny, "optimizer=muon", "parallel=zero0")))


@pytest.fixture(scope="module")
def measured(tiny: Path) -> Path:
    reference(tiny=tiny)
    losses = [loss for loss, _ in json.loads((tiny / "reference.json").read_text())]
    assert losses[-1] < losses[0] - 0.5  # it does learn, so equal curves mean something
    return tiny


def layouts(zeros: str, tensor: int) -> list[str]:
    return [f"optimizer=muon parallel=zero{zero} parallel.tensor={tensor}" for zero in zeros]


@on_ranks(1)
def test_zero_1_2_3_on_one_process_equal_plain_training(measured: Path) -> None:
    compare(measured, *layouts("123", 1))


@on_ranks(2)
def test_two_data_ranks_at_zero_0_to_3_equal_one_process(measured: Path) -> None:
    compare(measured, *layouts("0123", 1))


@pytest.mark.slow
@on_ranks(3)
def test_three_data_ranks_that_divide_no_matrix_equal_one_process(measured: Path) -> None:
    compare(measured, *(f"{layout} batch=8 micro_batch=1" for layout in layouts("123", 1)))


@pytest.mark.slow
@on_ranks(2)
def test_two_tensor_ranks_at_zero_0_to_3_equal_one_process(measured: Path) -> None:
    compare(measured, *layouts("0123", 2))


@pytest.mark.slow
@on_ranks(4)
def test_two_by_two_at_zero_1_2_3_equals_one_process(measured: Path) -> None:
    compare(measured, *layouts("123", 2))


@pytest.mark.slow
@on_ranks(2)
def test_bf16_on_two_ranks_learns_as_fp32_does_at_every_zero_stage(measured: Path) -> None:
    expected = torch.tensor(json.loads((measured / "reference.json").read_text()))[:, 0]
    for layout in layouts("0123", 1):
        losses = torch.tensor(curve(measured, *layout.split(), "parallel.precision=bf16"))[:, 0]
        torch.testing.assert_close(
            losses, expected, rtol=5e-3, atol=0, msg=lambda text, at=layout: f"{at}: {text}"
        )


def held(engine: Engine) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in engine.logical()}


@on_ranks(2)
def test_a_step_that_is_thrown_away_leaves_the_momentum_as_it_was() -> None:
    mesh = start(1)
    for zero in range(4):
        engine = engine_of(task(zero, 1, "optimizer=muon"), mesh)
        for scale, step in ((1.0, True), (1.0, False), (math.nan, True)):
            before = held(engine)
            engine.backward(nats(engine(TOKENS)) * scale / mesh.data, last=True)
            if step:
                engine.step(1e-2)
            else:
                engine.skip()
            same = {name for name, value in held(engine).items() if torch.equal(value, before[name])}
            assert same == (set() if step and scale == 1.0 else before.keys()), (zero, scale, step)
