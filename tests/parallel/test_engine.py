"""Every layout computes the same thing.

Compared are losses and gradient norms of one process, ZeRO 0-3, and tensor parallelism.
"""

import json
from pathlib import Path

import pytest
import torch

from megachat.config import ConfigError
from megachat.parallel.engine import Engine
from megachat.parallel.mesh import start
from megachat.tokenizer.tokenizer import Tokenizer
from megachat.train.loop import Progress, Running, train_step
from tests.spawn import on_ranks
from tests.tiny_run import make, pretrain

STEPS = 10


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("layouts") / "runs" / "tiny")


def curve(run: Path, *overrides: str) -> list[list[float]]:
    """Loss and gradient norm of ten steps."""
    task = pretrain(run, *overrides)
    mesh = start(task.parallel.tensor)
    torch.manual_seed(0)
    state = Running(mesh, Tokenizer.load(run / "tokenizer"), Progress())
    model = task.models(state)["model"]
    groups = task.optimizer.groups(model)
    state.engines["model"] = Engine(model, task.optimizer.build, groups, task.parallel, task.clip, mesh)
    state.total = task.prepare(state)
    batches = task.batches(state)
    out = []
    for _ in range(STEPS):
        sums = train_step(task, state, next(batches), 1e-2)
        state.progress.step += 1
        out.append([sums["loss"] / sums["weight"], sums["gradient_norm"] / sums["weight"]])
    return out


def compare(run: Path, *layouts: str) -> None:
    """Each layout's ten losses and norms against those of one process, to 1e-4."""
    expected = torch.tensor(json.loads((run / "reference.json").read_text()))
    for overrides in layouts:
        found = torch.tensor(curve(run, *overrides.split()))
        torch.testing.assert_close(
            found, expected, rtol=1e-4, atol=0, msg=lambda text, layout=overrides: f"{layout}: {text}"
        )


@on_ranks(1)
def reference(tiny: Path) -> None:
    (tiny / "reference.json").write_text(json.dumps(curve(tiny, "parallel=zero0", "parallel.precision=fp32")))


@pytest.fixture(scope="module")
def measured(tiny: Path) -> Path:
    reference(tiny=tiny)
    losses = [loss for loss, _ in json.loads((tiny / "reference.json").read_text())]
    assert losses[-1] < losses[0] - 0.5  # it does learn, so equal curves mean something
    return tiny


def layouts(zeros: str, tensor: int) -> list[str]:
    return [f"parallel=zero{zero} parallel.precision=fp32 parallel.tensor={tensor}" for zero in zeros]


@pytest.mark.slow
@on_ranks(1)
def test_zero_1_2_3_and_checkpointing_on_one_process_equal_plain_training(measured: Path) -> None:
    compare(
        measured, *layouts("123", 1), "parallel=zero0 parallel.precision=fp32 parallel.checkpointing=true"
    )


@pytest.mark.slow
@on_ranks(2)
def test_two_data_ranks_at_zero_0_to_3_equal_one_process(measured: Path) -> None:
    compare(measured, *layouts("0123", 1))


@pytest.mark.slow
@on_ranks(2)
def test_two_tensor_ranks_at_zero_0_to_3_equal_one_process(measured: Path) -> None:
    compare(measured, *layouts("0123", 2))


@pytest.mark.slow
@on_ranks(4)
def test_two_by_two_at_zero_1_2_3_equals_one_process(measured: Path) -> None:
    compare(measured, *layouts("123", 2))


def test_heads_that_do_not_divide_name_the_degrees_that_would(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        ConfigError, match=r"parallel.tensor=4 does not divide model.kv_heads=2; use one of \[1, 2\]"
    ):
        pretrain(tiny, "parallel.tensor=4")


@on_ranks(1)
def test_bf16_keeps_fp32_weights_at_every_zero_stage(tiny: Path) -> None:
    task = pretrain(tiny, "parallel.precision=bf16")
    mesh = start(1)
    for zero in range(4):
        model = task.model.build(300)
        parallel = task.parallel.model_copy(update={"zero": zero})
        engine = Engine(model, task.optimizer.build, task.optimizer.groups(model), parallel, 1.0, mesh)
        kept = {name: tensor.clone() for name, tensor in engine.logical() if name.startswith("weight.")}
        assert all(tensor.dtype == torch.float32 for tensor in kept.values()), zero
        tokens = torch.randint(0, 300, (2, 16))
        loss = engine(tokens).float().logsumexp(-1).sum()
        engine.backward(loss, last=True)
        engine.step(1e-6)
        after = {name: tensor for name, tensor in engine.logical() if name.startswith("weight.")}
        # A step of 1e-6 would vanish from weights of 0.02 kept in bf16 (8 bits of mantissa).
        moved = (after["weight.blocks.0.mlp.up.weight"] - kept["weight.blocks.0.mlp.up.weight"]).abs().max()
        assert 1e-7 < moved < 1e-5, (zero, moved)
