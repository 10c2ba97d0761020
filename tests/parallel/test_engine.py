"""Every layout computes the same thing.

Compared are losses and gradient norms of one process, ZeRO 0-3, and tensor parallelism.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megachat.config import ConfigError
from megachat.parallel.engine import Engine
from megachat.parallel.mesh import start
from megachat.tokenizer.tokenizer import Tokenizer
from megachat.train.loop import Progress, Running, engines, train_step
from tests.spawn import on_ranks
from tests.tiny_run import make, pretrain

STEPS = 10
EXPERTS = "model.hidden=32 model.moe={experts:4,per_token:2,balance:0.05,router_z:0.001}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("layouts") / "runs" / "tiny")


def curve(run: Path, *overrides: str) -> list[list[float]]:
    """Loss and gradient norm of ten steps."""
    task = pretrain(run, *overrides)
    mesh = start(task.parallel.tensor, sequence=task.parallel.sequence)
    torch.manual_seed(6)  # of 0 to 6 the one whose norms rise least: what is small stays small for ten steps
    state = Running(mesh, Tokenizer.load(run / "tokenizer"), Progress())
    state.engines = engines(task, task.models(state), mesh)
    state.total = task.prepare(state)
    batches = task.batches(state)
    out = []
    for _ in range(STEPS):
        sums = train_step(task, state, next(batches), 1e-2)
        state.progress.step += 1
        out.append([sums["loss"] / sums["weight"], sums["gradient_norm"] / sums["weight"]])
    return out


def compare(run: Path, *layouts: str, reference: str = "reference") -> None:
    """Each layout's ten losses and norms against those of one process, to 1e-4."""
    expected = torch.tensor(json.loads((run / f"{reference}.json").read_text()))
    for overrides in layouts:
        found = torch.tensor(curve(run, *overrides.split()))
        torch.testing.assert_close(
            found, expected, rtol=1e-4, atol=0, msg=lambda text, layout=overrides: f"{layout}: {text}"
        )


@on_ranks(1)
def reference(tiny: Path) -> None:
    (tiny / "reference.json").write_text(json.dumps(curve(tiny, "parallel=zero0", "parallel.precision=fp32")))


@on_ranks(1)
def reference_of_experts(tiny: Path) -> None:
    plain = ["parallel=zero0", "parallel.precision=fp32", *EXPERTS.split()]
    (tiny / "experts.json").write_text(json.dumps(curve(tiny, *plain)))


@pytest.fixture(scope="module")
def measured_experts(tiny: Path) -> Path:
    reference_of_experts(tiny=tiny)
    losses = [loss for loss, _ in json.loads((tiny / "experts.json").read_text())]
    assert losses[-1] < losses[0] - 0.5
    return tiny


@pytest.fixture(scope="module")
def measured(tiny: Path) -> Path:
    reference(tiny=tiny)
    losses = [loss for loss, _ in json.loads((tiny / "reference.json").read_text())]
    assert losses[-1] < losses[0] - 0.5  # it does learn, so equal curves mean something
    return tiny


def layouts(zeros: str, tensor: int, sequence: int = 1) -> list[str]:
    degrees = f"parallel.tensor={tensor} parallel.sequence={sequence}"
    return [f"parallel=zero{zero} parallel.precision=fp32 {degrees}" for zero in zeros]


@pytest.mark.slow
@on_ranks(1)
def test_zero_1_2_3_and_checkpointing_on_one_process_equal_plain_training(measured: Path) -> None:
    compare(
        measured, *layouts("123", 1), "parallel=zero0 parallel.precision=fp32 parallel.checkpointing=full"
    )


@pytest.mark.slow
@on_ranks(2)
def test_two_data_ranks_at_zero_0_to_3_equal_one_process(measured: Path) -> None:
    compare(measured, *layouts("0123", 1))


FP32 = "parallel.precision=fp32"


@pytest.mark.slow
@on_ranks(2)
def test_what_saves_memory_or_time_changes_no_loss(measured: Path) -> None:
    compare(
        measured,
        f"parallel=zero1 {FP32} parallel.checkpointing=selective",
        f"parallel=zero2 {FP32} parallel.offload=optimizer parallel.checkpointing=full",
        f"parallel=zero3 {FP32} parallel.offload=optimizer parallel.persistent=0",
        f"parallel=zero3 {FP32} parallel.offload=parameters parallel.prefetch=0",
        f"parallel=zero2 {FP32} parallel.bucket=1000 parallel.overlap=false",
    )


COMPILED = """
import json, sys, torch
from pathlib import Path
from tests.parallel.test_engine import curve
print(json.dumps(curve(Path(sys.argv[1]), *sys.argv[2].split())))
print(torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""
"""In a process without the checks of shapes and types, which cannot be compiled."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", ["parallel=zero0 parallel.checkpointing=selective", "parallel=zero3 parallel.persistent=0"]
)
def test_compiled_blocks_change_no_loss(measured: Path, layout: str) -> None:
    overrides = f"{layout} {FP32} parallel.compile=true"
    command = [sys.executable, "-c", COMPILED, str(measured), overrides]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    losses, graphs = done.stdout.splitlines()[-2:]
    assert int(graphs) > 0
    expected = json.loads((measured / "reference.json").read_text())
    torch.testing.assert_close(torch.tensor(json.loads(losses)), torch.tensor(expected), rtol=1e-4, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@on_ranks(1)
def test_fp8_learns_as_bf16_does(tiny: Path, recipe: str) -> None:
    bf16, fp8 = (
        torch.tensor(curve(tiny, f"parallel=zero{zero}", "parallel.precision=bf16", f"parallel.fp8={kind}"))
        for zero, kind in ((0, "none"), (1, recipe))
    )
    off = ((fp8 - bf16) / bf16).abs()[:, 0].max()
    assert 1e-5 < off < 5e-3  # numbers of 3 bits, and sums of many


@pytest.mark.slow
@on_ranks(2)
def test_experts_on_two_data_ranks_at_zero_0_to_3_are_trained_as_on_one(measured_experts: Path) -> None:
    compare(measured_experts, *(f"{one} {EXPERTS}" for one in layouts("0123", 1)), reference="experts")


def spread(zeros: str, *overrides: str) -> list[str]:
    """Two ranks, or two for each copy, share the experts."""
    return [" ".join([one, "parallel.expert=2", EXPERTS, *overrides]) for one in layouts(zeros, 1)]


@on_ranks(2)
def test_experts_spread_over_two_ranks_are_trained_as_on_one(measured_experts: Path) -> None:
    compare(measured_experts, *spread("01"), reference="experts")


@pytest.mark.slow
@on_ranks(2)
def test_experts_spread_over_two_ranks_at_zero_2_and_3_or_recomputed_are_trained_as_on_one(
    measured_experts: Path,
) -> None:
    again = spread("1", "parallel.checkpointing=full")
    compare(measured_experts, *spread("23"), *again, reference="experts")


@pytest.mark.slow
@on_ranks(4)
def test_two_copies_of_experts_spread_over_two_ranks_each_are_trained_as_on_one(
    measured_experts: Path,
) -> None:
    compare(measured_experts, *spread("0123"), reference="experts")


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
def test_two_ranks_that_share_rows_at_zero_0_to_3_equal_one_process(measured: Path) -> None:
    compare(measured, *layouts("0123", 1, sequence=2))


@pytest.mark.slow
@on_ranks(4)
def test_two_data_ranks_by_two_that_share_rows_equal_one_process(measured: Path) -> None:
    compare(measured, *layouts("013", 1, sequence=2))


def test_heads_that_do_not_divide_name_the_degrees_that_would(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        ConfigError, match=r"parallel.tensor=4 does not divide model.kv_heads=2; use one of \[1, 2\]"
    ):
        pretrain(tiny, "parallel.tensor=4")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("parallel.offload=optimizer parallel.zero=0", r"offload=optimizer needs ZeRO 2, not zero=0"),
        ("parallel.offload=parameters parallel.zero=2", r"offload=parameters needs ZeRO 3, not zero=2"),
        ("parallel.fp8=rowwise parallel.tensor=2", r"not to be had with tensor=2.*; spread .* ZeRO 3"),
        ("parallel.fp8=rowwise parallel.precision=fp32", r"set precision=bf16, not fp32"),
        ("parallel.checkpointing=true", r"parallel.checkpointing.*'none', 'selective' or 'full'"),
    ],
)
def test_what_cannot_go_together_says_what_does(
    tiny: Path, settings: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=message):
        pretrain(tiny, *settings.split())


@on_ranks(1)
def test_what_only_the_model_tells_is_said_with_its_remedy(tiny: Path) -> None:
    for settings, message in (
        (
            "parallel.fp8=rowwise parallel.precision=bf16 model.hidden=72",
            r"mlp.gate is 32 x 72, and both must be multiples of 16",
        ),
        (f"parallel.fp8=rowwise parallel.precision=bf16 {EXPERTS}", "has no products for the experts"),
        (f"parallel.compile=true {EXPERTS}", "which torch.compile must know; set"),
        ("parallel.zero=2 parallel.offload=optimizer optimizer=muon", r"use optimizer=adamw, or"),
    ):
        with pytest.raises(ValueError, match=message):
            curve(tiny, *settings.split())


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ("parallel.expert=2", "parallel.expert=2 spreads experts, and the model has none"),
        (
            f"parallel.expert=3 {EXPERTS}",
            r"expert=3 does not divide model.moe.experts=4; use one of \[1, 2, 4\]",
        ),
        (f"parallel.expert=4 {EXPERTS}", r"expert=4 does not divide the 6 processes .* \[1, 2, 3, 6\]"),
        (f"parallel.expert=2 parallel=zero2 parallel.offload=optimizer {EXPERTS}", "use one of them"),
        (f"parallel.expert=2 optimizer=muon {EXPERTS}", "spreads matrices over ranks that optimizer=muon"),
        (f"parallel.sequence=2 {EXPERTS}", "parallel.sequence=2 leaves routers no whole rows"),
        (f"parallel.expert=2 parallel.tensor=2 {EXPERTS}", "expert=2 and tensor=2: one of them must be 1"),
    ],
)
def test_a_spread_of_experts_that_cannot_be_is_refused(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, overrides: str, told: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(ConfigError, match=told):
        pretrain(tiny, *overrides.split())


def test_tensor_parallelism_does_not_cut_experts(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"parallel.tensor=2 does not cut the experts of a mixture"):
        pretrain(tiny, "parallel.tensor=2", *EXPERTS.split())


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
