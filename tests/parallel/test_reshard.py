"""Whole tensors go into any layout and come out of it unchanged, also where the ranks do not divide them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megachat.parallel import checkpoint
from megachat.parallel.checkpoint import Checkpoint, write_manifest
from megachat.parallel.engine import Engine
from megachat.parallel.mesh import Mesh, start
from megachat.parallel.saving import write_tensors
from megachat.train.pretrain import Pretrain
from tests.spawn import on_ranks
from tests.tiny_run import pretrain

STEPS = 5
EXPERTS = "model.hidden=32 model.moe={experts:4,per_token:2,balance:0.01,router_z:0.001}"
VOCAB = 301
"""Which two tensor ranks do not divide."""
TOKENS = torch.arange(24).view(2, 12) * 7 % VOCAB


def task(zero: int, tensor: int, *overrides: str) -> Pretrain:
    layout = [f"parallel.zero={zero}", f"parallel.tensor={tensor}"]
    stage = pretrain(Path("unused"), *layout, *overrides)
    assert isinstance(stage, Pretrain)
    return stage


def engine_of(stage: Pretrain, mesh: Mesh) -> Engine:
    model = stage.model.build(VOCAB)
    return Engine(model, stage.optimizer.build, stage.optimizer.groups(model), stage.parallel, 0.0, mesh)


def nats(output: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(output[:, :-1].float().flatten(0, 1), TOKENS[:, 1:].flatten())


def written(path: Path, *overrides: str) -> dict[str, Tensor]:
    """A checkpoint after five steps that nobody took, and what the sixth must make of its weights."""
    torch.manual_seed(1)
    stage = task(0, 1, *overrides)
    model = stage.model.build(VOCAB)
    names = {weight: name for name, weight in model.named_parameters()}
    tensors = {f"model/weight.{name}": weight.detach().clone() for weight, name in names.items()}
    optimizer = stage.optimizer.build(stage.optimizer.groups(model))  # without DeepSpeed
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
        for weight in group["params"]:
            if group.get("muon"):
                state = {"momentum_buffer": 0.01 * torch.randn_like(weight)}
            else:
                spread = 0.01 * torch.rand_like(weight) + 1e-4
                state = {"exp_avg": 0.01 * torch.randn_like(weight), "exp_avg_sq": spread}
                optimizer.state[weight]["step"] = torch.tensor(float(STEPS))
            for moment, value in state.items():
                tensors[f"model/{moment}.{names[weight]}"] = value.clone()
            optimizer.state[weight] |= state
    path.mkdir(parents=True)
    files = write_tensors(path, tensors.items())
    about = {"architecture": {"model": checkpoint.architecture(model)}, "tokenizer": "", "fingerprint": ""}
    write_manifest(path, {**about, "progress": {"step": STEPS}, "files": files})
    nats(model(TOKENS)).backward()
    optimizer.step()
    after = {f"after/{name}": weight.detach() for weight, name in names.items()}
    return tensors | after


def goes_through(
    folder: Path,
    tensor: int,
    *zeros: int,
    precision: str = "fp32",
    optimizer: str = "adamw",
    more: str = "",
    shape: str = "",
) -> None:
    """Into each ZeRO stage and out, a step, and back again in the middle of the run."""
    mesh = start(tensor)
    path = folder / f"step-{STEPS:08d}"
    if mesh.rank == 0:
        torch.save(written(path, f"optimizer={optimizer}", *shape.split()), folder / "expected.pt")
    mesh.barrier()
    expected = torch.load(folder / "expected.pt", weights_only=True)
    saved = Checkpoint.open(path)
    plain = checkpoint.blueprint(saved, "model").whole()
    with torch.no_grad():
        right = nats(plain(TOKENS)).item()
    for zero in zeros:
        torch.manual_seed(zero)
        settings = [f"parallel.precision={precision}", f"optimizer={optimizer}", *f"{more} {shape}".split()]
        engine = engine_of(task(zero, tensor, *settings), mesh)
        read = saved.reader("model")
        loaded: dict[str, int] = {}

        def counted(name: str, *index: slice, read: Any = read, loaded: Any = loaded) -> Tensor:
            part: Tensor = read(name, *index)
            loaded[name] = loaded.get(name, 0) + part.numel()
            return part

        for _ in range(2):
            loaded.clear()
            saved.check_shapes("model", engine.tensors())
            engine.load_logical(counted, STEPS)
            moments = sum(size for name, size in loaded.items() if not name.startswith("weight."))
            shared = mesh.tensor * (mesh.data if zero else 1)
            whole = sum(
                value.numel()
                for name, value in expected.items()
                if name.startswith("model/") and not name.startswith("model/weight.")
            )
            # What is cut by columns is read by whole rows; norms are not cut by tensor parallelism.
            assert moments <= 1.5 * whole / shared + 300, (zero, moments, whole)
            for name, value in engine.logical():
                assert torch.equal(value, expected[f"model/{name}"]), (zero, name)
            assert engine.steps == STEPS
            loss = nats(engine(TOKENS))
            assert loss.item() == pytest.approx(right, rel=1e-5 if precision == "fp32" else 5e-3), zero
            engine.backward(loss / mesh.data, last=True)
            engine.step(1e-2)
            for name, value in engine.logical():
                if name.startswith("weight.") and precision == "fp32":
                    after = expected[name.replace("weight.", "after/", 1)]
                    torch.testing.assert_close(value, after, rtol=1e-4, atol=2e-6)


@on_ranks(1)
def test_one_rank_takes_what_was_written_at_every_zero_stage(tmp_path: Path) -> None:
    goes_through(tmp_path, 1, 0, 1, 2, 3)


@pytest.mark.slow
@on_ranks(3)
def test_three_ranks_that_divide_nothing_take_it_at_every_zero_stage(tmp_path: Path) -> None:
    goes_through(tmp_path, 1, 0, 1, 2, 3)


@on_ranks(1)
def test_the_bf16_weights_that_compute_follow_the_fp32_ones(tmp_path: Path) -> None:
    goes_through(tmp_path, 1, 0, 1, 2, 3, precision="bf16")


@pytest.mark.slow
@on_ranks(3)
def test_the_bf16_weights_of_three_ranks_follow_the_fp32_ones(tmp_path: Path) -> None:
    goes_through(tmp_path, 1, 1, 2, 3, precision="bf16")


@pytest.mark.slow
@on_ranks(2)
def test_two_tensor_ranks_take_it_at_every_zero_stage(tmp_path: Path) -> None:
    goes_through(tmp_path, 2, 0, 1, 2, 3)


@pytest.mark.slow
@on_ranks(4)
def test_two_by_two_take_it_at_every_zero_stage(tmp_path: Path) -> None:
    goes_through(tmp_path, 2, 0, 1, 2, 3)


@on_ranks(1)
def test_one_rank_takes_muons_momentum_at_every_zero_stage(tmp_path: Path) -> None:
    goes_through(tmp_path, 1, 0, 1, 2, 3, optimizer="muon")


@pytest.mark.slow
@on_ranks(3)
def test_three_ranks_that_divide_nothing_take_muons_momentum(tmp_path: Path) -> None:
    goes_through(tmp_path, 1, 0, 1, 2, 3, optimizer="muon")


@pytest.mark.slow
@on_ranks(4)
def test_two_by_two_take_muons_momentum(tmp_path: Path) -> None:
    goes_through(tmp_path, 2, 0, 1, 2, 3, optimizer="muon")


@pytest.mark.slow
@on_ranks(2)
def test_what_lies_in_the_hosts_memory_is_taken_too(tmp_path: Path) -> None:
    goes_through(tmp_path, 1, 2, 3, more="parallel.offload=optimizer")
    goes_through(tmp_path / "parameters", 1, 3, more="parallel.offload=parameters")


@on_ranks(1)
def test_one_rank_takes_experts_at_every_zero_stage(tmp_path: Path) -> None:
    goes_through(tmp_path, 1, 0, 1, 2, 3, shape=EXPERTS)


@pytest.mark.slow
@on_ranks(3)
def test_three_ranks_that_divide_nothing_take_experts(tmp_path: Path) -> None:
    goes_through(tmp_path, 1, 0, 1, 2, 3, shape=EXPERTS)


@pytest.mark.slow
@on_ranks(3)
def test_three_ranks_take_muons_momentum_of_experts(tmp_path: Path) -> None:
    goes_through(tmp_path, 1, 0, 1, 2, 3, optimizer="muon", shape=EXPERTS)


@on_ranks(2)
def test_two_ranks_that_share_the_experts_take_them_at_every_zero_stage(tmp_path: Path) -> None:
    goes_through(tmp_path, 1, 0, 1, 2, 3, shape=EXPERTS, more="parallel.expert=2")


@pytest.mark.slow
@on_ranks(4)
def test_two_copies_of_experts_on_two_ranks_each_take_them(tmp_path: Path) -> None:
    goes_through(tmp_path, 1, 0, 1, 2, 3, shape=EXPERTS, more="parallel.expert=2")


@on_ranks(1)
def test_another_architecture_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    mesh = start(1)
    path = tmp_path / f"step-{STEPS:08d}"
    written(path)
    saved = Checkpoint.open(path)
    wider = engine_of(task(1, 1, "model.hidden=128"), mesh)
    with pytest.raises(ValueError, match=r"in shape \(64, 32\), and this model in \(128, 32\)"):
        saved.check_shapes("model", wider.tensors())
    deeper = engine_of(task(1, 1, "model.layers=3"), mesh)
    with pytest.raises(ValueError, match=r"holds no tensor model/weight.blocks.2"):
        saved.check_shapes("model", deeper.tensors())
    other = engine_of(task(1, 1, "optimizer=muon"), mesh)
    with pytest.raises(
        ValueError,
        match=r"no momentum_buffer of model/blocks.0.attn.q.weight: it was written with another opt",
    ):
        saved.check_shapes("model", other.tensors())
