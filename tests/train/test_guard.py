"""The guard: what is a jump, what is skipped and with which effect, the way back, ranks that come apart."""

import json
import math
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megachat.parallel.checkpoint import steps
from megachat.parallel.mesh import Mesh, start
from megachat.run import perform
from megachat.train.guard import Guard, Skipped, Unequal, _told, highest
from megachat.train.loop import Batch, Losses, Running, Task
from megachat.train.pretrain import Pretrain
from tests.fault_table import record
from tests.spawn import on_ranks
from tests.tiny_run import make, pretrain, rows

GUARD = Guard(spike=10.0, window=5, rollback_after=2, give_up=1, compare=0)


def test_the_highest_loss_is_median_and_deviations_by_hand() -> None:
    assert highest([1.0, 2.0, 3.0, 4.0, 50.0], 10.0) == pytest.approx(3 + 10 * 1.4826 * 1)
    assert highest([2.0] * 5, 10.0) == pytest.approx(2 + 10 * 0.01 * 2)  # a loss that stands still
    assert highest([], 10.0) == math.inf


def test_what_is_objected_to_and_what_not() -> None:
    recent = [1.0, 2.0, 3.0, 4.0, 50.0]
    assert GUARD.objection({"loss": 4 * 17.7}, 4.0, recent) == ""
    assert "loss is 17.9, above 17.83" in GUARD.objection({"loss": 4 * 17.9}, 4.0, recent)
    assert GUARD.objection({"loss": 4 * 17.9}, 4.0, recent[1:]) == ""  # the window is not full
    assert GUARD.model_copy(update={"spike": 0.0}).objection({"loss": 9e9}, 1.0, recent) == ""
    assert GUARD.objection({"loss": 1.0, "critic/loss": math.inf}, 2.0, recent) == "critic/loss is inf"
    assert GUARD.objection({"loss": math.nan}, 2.0, []) == "loss is nan"


def test_a_batch_is_left_out_if_it_holds_one_of_the_samples() -> None:
    skipped = Skipped([[10, 12], [40, 40]])
    found = [bool(skipped.why(first, first + 3)) for first in range(0, 48, 4)]
    assert [4 * place for place, left_out in enumerate(found) if left_out] == [8, 12, 40]


def test_who_differs_is_told_by_majority_and_with_two_both_are_named() -> None:
    three = _told(["model/a", "model/b"], [False, False], [("x", [1, 2]), ("y", [1, 3]), ("z", [1, 2])], 1, 7)
    assert "since step 7; they differ from what most ranks hold:\n  rank 1 (y): b\n" in three
    two = _told(["model/a"], [False], [("x", [1]), ("y", [2])], 1, 7)
    assert "which of these is right cannot be told:\n  rank 0 (x): a\n  rank 1 (y): a\n" in two
    # Four ranks, two tensor parts: of a parameter that is cut, ranks 0 and 2 are replicas, and 1 and 3.
    cut = _told(["model/a"], [True], [("w", [1]), ("x", [2]), ("y", [1]), ("z", [3])], 2, 7)
    assert "rank 1 (x): a\n  rank 3 (z): a\n" in cut
    assert "rank 0" not in cut


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("guard") / "runs" / "tiny")


def changed(what: Callable[[Running, Tensor], Tensor]) -> None:
    """From here on every loss is what `what` makes of it."""
    original = Pretrain.loss

    def loss(task: Pretrain, run: Running, batch: Batch) -> Losses:
        result = original(task, run, batch)  # type: ignore[arg-type]
        return Losses({role: what(run, value) for role, value in result.losses.items()}, result.metrics)

    Pretrain.loss = loss  # type: ignore[method-assign, assignment]


def final(run: Path) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint."""
    files = sorted(steps(run / "pretrain" / "checkpoints")[-1].glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same(one: Path, other: Path) -> None:
    first, second = final(one), final(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_a_damaged_line_in_the_book_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "skipped.jsonl"
    Skipped(path=path).add(3, 16, 23, "loss is nan")
    with path.open("ab") as file:
        file.write(bytes(30) + b"\n")
    Skipped(path=path).add(5, 32, 39, "loss is nan")
    skipped = Skipped(path=path)
    skipped.recall("", 0, Mesh(0, 1, 1, torch.device("cpu"), None, None))
    assert skipped.why(16, 16) == skipped.why(39, 39) == "an earlier attempt found that loss is nan"
    assert b"\0" not in path.read_bytes()


def book(run: Path) -> list[dict[str, Any]]:
    """What `skipped.jsonl` holds."""
    return [json.loads(line) for line in (run / "pretrain" / "skipped.jsonl").read_text().splitlines()]


def captured() -> str:
    """What this rank has printed so far."""
    return Path(f"/proc/self/fd/{sys.stderr.fileno()}").read_text()


def broken_once(run: Running, loss: Tensor) -> Tensor:
    """The first loss of step 5 on rank 1, and no other."""
    if run.progress.step == 4 and run.mesh.rank == 1 and not run.notes.get("broken"):
        run.notes["broken"] = 1.0
        return loss * math.nan
    return loss


def broken_weights(run: Running, loss: Tensor) -> Tensor:
    """Weights that have become bad unnoticed, once."""
    weight = run.engines["model"].module.norm.weight
    if run.progress.step == 5 and not run.skipped.found:
        weight.data.fill_(math.inf)
    return loss


POISONS: dict[str, Callable[[Running, Tensor], Tensor]] = {
    "nan": lambda run, loss: loss * math.nan if run.progress.step == 4 and run.mesh.rank == 1 else loss,
    # A finite loss whose gradient is not.
    "gradient": lambda run, loss: (
        loss + (loss - loss.detach()).abs().sqrt() if run.progress.step == 4 and run.mesh.rank == 1 else loss
    ),
    "nan0": lambda run, loss: loss * math.nan if run.progress.step == 4 else loss,
    "always": lambda run, loss: loss * math.nan if run.progress.step >= 4 else loss,
    "once": broken_once,
    "weights": broken_weights,
    "spike": lambda run, loss: loss * 100 if run.progress.step == 8 else loss,
}


@on_ranks(2)
def skipping(folder: Path, tiny: Path, zero: int, more: str) -> None:
    """Poisoned runs, and runs that are told to leave out one sample of the batch, in both precisions."""
    for precision in ("fp32", "bf16"):
        layout = [
            f"inputs={tiny}",
            "guard.window=4",
            f"parallel=zero{zero}",
            f"parallel.precision={precision}",
            *more.split(),
        ]
        for step in (5, 9):
            at = 8 * (step - 1) + 3
            perform(pretrain(folder / precision / f"told-{step}", *layout, f"skip=[[{at},{at}]]"))
        for name in ("nan", "gradient", "spike"):
            original = Pretrain.loss
            changed(POISONS[name])
            perform(pretrain(folder / precision / name, *layout))
            Pretrain.loss = original  # type: ignore[method-assign]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("zero", "more"),
    [
        *((zero, f"optimizer={name}") for zero in range(4) for name in ("adamw", "muon")),
        *((zero, "parallel.offload=optimizer") for zero in (2, 3)),
    ],
)
def test_a_bad_batch_changes_nothing_as_if_it_had_been_left_out(
    tiny: Path, tmp_path: Path, zero: int, more: str
) -> None:
    skipping(folder=tmp_path, tiny=tiny, zero=zero, more=more)
    for precision in ("fp32", "bf16"):
        for name, step in (("nan", 5), ("gradient", 5), ("spike", 9)):
            run, told = tmp_path / precision / name, tmp_path / precision / f"told-{step}"
            assert_same(run, told)
            (entry,) = book(run)
            assert (entry["step"], entry["samples"]) == (step, [8 * step - 8, 8 * step - 1])
            assert rows(run)[-1]["guard/skipped"] == rows(told)[-1]["guard/skipped"] == 1
            record("16 a bad batch", survived=True, lost=0)
    assert final(run)["model/weight.norm.weight"].shape == (32,)  # there was something to compare


@on_ranks(1)
def one(run: Path, tiny: Path, overrides: list[str], poison: str | None) -> None:
    if poison is not None:
        changed(POISONS[poison])
    perform(pretrain(run, f"inputs={tiny}", *overrides))


def test_bad_weights_are_left_for_the_checkpoint_and_the_batches_behind_it_are_not_read_again(
    tiny: Path, tmp_path: Path
) -> None:
    often = ["checkpoint_interval=3", "guard.rollback_after=2"]
    one(run=tmp_path / "back", tiny=tiny, overrides=often, poison="weights")
    assert [entry["step"] for entry in book(tmp_path / "back")] == [6, 7]
    one(run=tmp_path / "told", tiny=tiny, overrides=[*often, "skip=[[40,55]]"], poison=None)
    assert_same(tmp_path / "back", tmp_path / "told")
    assert [row["step"] for row in rows(tmp_path / "back")] == list(range(1, 13))
    record("16 broken weights", survived=True, lost=4)


def test_a_restart_knows_what_was_bad(tiny: Path, tmp_path: Path) -> None:
    one(run=tmp_path / "cut", tiny=tiny, overrides=["max_steps=8"], poison="nan0")
    stage = tmp_path / "cut" / "pretrain"  # as if it had been killed before the first checkpoint
    shutil.rmtree(stage / "checkpoints")
    for name in ("done.json", "saved.json"):
        (stage / name).unlink()
    one(run=tmp_path / "cut", tiny=tiny, overrides=["max_steps=8"], poison=None)  # and it would be sound now
    one(run=tmp_path / "told", tiny=tiny, overrides=["max_steps=8", "skip=[[32,39]]"], poison=None)
    assert_same(tmp_path / "cut", tmp_path / "told")


def test_with_no_way_back_the_run_ends_and_says_what_to_leave_out(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="no checkpoint to go back to") as failure:
        one(run=tmp_path, tiny=tiny, overrides=["guard.rollback_after=3"], poison="always")
    assert "skip=[[32,55]]" in str(failure.value)


@on_ranks(2)
def test_what_is_sound_when_computed_again_was_the_hardware(tiny: Path, tmp_path: Path) -> None:
    perform(pretrain(tmp_path / "calm", f"inputs={tiny}"))
    changed(POISONS["once"])
    perform(pretrain(tmp_path / "once", f"inputs={tiny}"))
    sys.stderr.flush()
    mesh = start(1)
    if mesh.rank == 0:
        assert_same(tmp_path / "once", tmp_path / "calm")
        assert not (tmp_path / "once" / "pretrain" / "skipped.jsonl").exists()
        assert f"has miscounted, of rank 1 ({socket.gethostname()})" in captured()


@on_ranks(2)
def test_a_rank_whose_weights_have_come_apart_ends_the_run_before_they_are_saved(
    tiny: Path, tmp_path: Path
) -> None:
    for zero in range(3):
        run = tmp_path / str(zero)
        flip(at=6)
        with pytest.raises(Unequal, match=r"since step 3") as failure:
            perform(pretrain(run, f"inputs={tiny}", f"parallel=zero{zero}", "checkpoint_interval=3"))
        host = socket.gethostname()
        assert f"rank 0 ({host}): blocks.0.mlp.up.weight\n  rank 1 ({host}): blocks" in str(failure.value)
        assert [path.name for path in steps(run / "pretrain" / "checkpoints")] == ["step-00000003"]


@pytest.mark.slow
@on_ranks(4)
def test_two_copies_of_spread_experts_that_have_come_apart_end_the_run(tiny: Path, tmp_path: Path) -> None:
    experts = ["model.hidden=32", "model.moe={experts:4,per_token:2,balance:0.0,router_z:0.0}"]
    flip(at=2, name="blocks.1.mlp.experts.w2", index=(0, 3, 4))
    with pytest.raises(Unequal, match=r"blocks.1.mlp.experts.down"):
        perform(pretrain(tmp_path, f"inputs={tiny}", *experts, "parallel.expert=2", "guard.compare=1"))


def flip(at: int, name: str = "blocks.0.mlp.up.weight", index: tuple[int, ...] = (3, 4)) -> None:
    """Flips one bit of one weight on rank 1, at the end of a step."""
    original = Task.may_stop

    def may_stop(task: Task, run: Running) -> bool:
        if run.progress.step == at and run.mesh.rank == 1:
            weight = dict(run.engines["model"].module.named_parameters())[name]
            weight.data.view(torch.int32)[index] ^= 1
            Pretrain.may_stop = original  # type: ignore[method-assign]
        return original(task, run)

    Pretrain.may_stop = may_stop  # type: ignore[method-assign]
