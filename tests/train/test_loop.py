"""The loop: exact means over unequal micro-batches, what is logged, what is refused, what is repeated."""

import json
import math
from pathlib import Path

import pytest

from megachat.data import shards
from megachat.files import sha256
from megachat.parallel.checkpoint import latest
from megachat.parallel.mesh import Unfit, start
from megachat.run import perform
from megachat.train import loop
from megachat.train.pretrain import Pretrain
from tests.spawn import on_ranks
from tests.tiny_run import make, pretrain, rows


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make(tmp_path_factory.mktemp("loop") / "runs" / "tiny")
    trained(run=run, overrides=["validation_interval=5", "log.wandb=offline"])
    return run


@on_ranks(1)
def trained(run: Path, overrides: list[str]) -> None:
    perform(pretrain(run, *overrides))


def test_training_lowers_the_loss_and_logs_every_step(tiny: Path) -> None:
    logged = rows(tiny)
    assert [row["step"] for row in logged] == list(range(1, 13))
    assert logged[0]["loss"] == pytest.approx(math.log(300), abs=0.3)
    assert logged[-1]["loss"] < logged[0]["loss"] - 1
    assert [row["tokens"] for row in logged] == [256 * step for step in range(1, 13)]  # 8 samples of 32


def test_mfu_is_what_the_model_takes_and_hfu_also_what_is_computed_again(tiny: Path, tmp_path: Path) -> None:
    trained(run=tmp_path, overrides=[f"inputs={tiny}", "tokens=512", "parallel.checkpointing=full"])
    assert all(row["hfu"] == row["mfu"] for row in rows(tiny))
    assert all(0 < row["mfu"] < 1 for row in rows(tiny))
    # Of each token: a forward pass of 2 layers with attention of 8 x (2 x 4 + 2 x 2) x 32 weights and three
    # matrices of 32 x 64, of which the last is not computed again, and the output layer.
    matrices, last, output = 2 * (8 * 12 * 32 + 3 * 32 * 64), 2 * 32 * 64, 300 * 32
    for row in rows(tmp_path):
        again = row["hfu"] / row["mfu"] - 1
        assert (matrices - last) / (3 * (matrices + output)) < again < 1 / 3  # attention is between


def test_the_parts_of_a_step_add_up_to_its_time_without_validation(tiny: Path) -> None:
    for row in rows(tiny)[1:]:
        parts = {name: row[name] for name in row if name.startswith("time/")}
        own = sum(seconds for name, seconds in parts.items() if name != "time/validation")
        assert own == pytest.approx(256 / row["tokens_per_second"], rel=0.02)
        assert min(parts["time/forward"], parts["time/backward"], parts["time/optimizer"]) > 0
        assert ("time/validation" in parts) == ("validation/bits_per_byte" in row)


def test_validation_appears_at_its_interval_and_at_the_end(tiny: Path) -> None:
    validated = [row["step"] for row in rows(tiny) if "validation/bits_per_byte" in row]
    assert validated == [5, 10, 12]


def test_a_run_that_diverges_says_so_and_saves_nothing(tiny: Path) -> None:
    run = tiny.parent / "diverged"
    with pytest.raises(pytest.fail.Exception, match="training has diverged") as failure:
        trained(run=run, overrides=[f"inputs={tiny}", "optimizer.lr=1e30", "checkpoint_interval=1"])
    for part in ("at step 12, at learning rate 4", "so it is at the end", "skip=[[8,95]]"):
        assert part in str(failure.value), str(failure.value)
    saved = sorted(path.name for path in (run / "pretrain" / "checkpoints").iterdir())
    assert saved == ["latest.json", "step-00000001"]


def test_bits_per_byte_agrees_with_an_independent_computation(tiny: Path) -> None:
    from megachat.data.loader import TokenWindows
    from megachat.data.shards import Shards, read_split
    from megachat.evals.bits import bits_per_byte, spread
    from megachat.parallel.checkpoint import load_model

    loaded = load_model(tiny / "pretrain")
    source = TokenWindows(Shards([*read_split(tiny / "encode", "validation").values()]), 32)
    windows = [source[index] for index in spread(len(source), 4)]
    score = bits_per_byte(loaded.model, windows, loaded.tokenizer.token_bytes, 4)
    assert rows(tiny)[-1]["validation/bits_per_byte"] == pytest.approx(score.value, rel=1e-3)


@pytest.mark.slow
def test_accumulation_and_data_ranks_do_not_change_the_losses(tiny: Path, tmp_path: Path) -> None:
    for name, size in (("one-by-one", 1), ("three", 3), ("all-at-once", 8)):
        run = tmp_path / name
        trained(run=run, overrides=[f"inputs={tiny}", f"micro_batch={size}"])
        assert [row["loss"] for row in rows(run)] == pytest.approx(
            [row["loss"] for row in rows(tiny)], rel=1e-5
        )


@on_ranks(2)
def on_two(run: Path, overrides: list[str]) -> None:
    perform(pretrain(run, *overrides))


@pytest.mark.slow
def test_two_ranks_through_the_whole_loop_give_one_ranks_losses(tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "two"
    on_two(run=run, overrides=[f"inputs={tiny}", "parallel=zero2", "parallel.precision=fp32"])
    assert [row["loss"] for row in rows(run)] == pytest.approx([row["loss"] for row in rows(tiny)], rel=1e-4)
    assert (run / "pretrain" / "done.json").is_file()


@pytest.mark.slow
def test_a_run_whose_experts_are_spread_over_two_ranks_goes_on_with_all_of_them_on_one(
    tiny: Path, tmp_path: Path
) -> None:
    shape = ["model.hidden=32", "model.moe={experts:4,per_token:2,balance:0.05,router_z:0.001}"]
    layout = ["parallel=zero1", "parallel.precision=fp32", "schedule=constant", "validation_interval=3"]
    common = [f"inputs={tiny}", *layout, *shape]
    trained(run=tmp_path / "one", overrides=common)
    run = tmp_path / "two"
    on_two(run=run, overrides=[*common, "parallel.expert=2", "guard.compare=1", "max_steps=6"])
    trained(run=run, overrides=[*common, "resume=any"])
    for figure, tolerance in (("loss", 1e-4), ("gradient_norm", 1e-3), ("validation/bits_per_byte", 1e-4)):
        two, one = ([row[figure] for row in rows(path) if figure in row] for path in (run, tmp_path / "one"))
        assert two == pytest.approx(one, rel=tolerance), figure
    assert all(1 <= row["expert_load"] <= 2 for row in rows(run))  # of 4 experts 2 take all at most
    assert all("expert_load" not in row for row in rows(tiny))


@on_ranks(2)
def test_a_host_that_misreads_token_shards_is_unfit_and_the_run_not_refused(tiny: Path) -> None:
    mesh = start(1)
    sums = {path: sha256(path) for path in sorted(tiny.rglob("*.bin"))}
    assert len(sums) > 1
    loop.written = lambda folder: sums
    loop.check_shards(tiny, mesh)
    if mesh.rank == 1:
        shards.sha256 = lambda path: "0"
    with pytest.raises(
        OSError, match=r"rank 1 on .* damaged, and read by rank 0 on .* it is whole"
    ) as raised:
        loop.check_shards(tiny, mesh)
    assert isinstance(raised.value, Unfit) == (mesh.rank == 1)


@on_ranks(3)
def on_three(run: Path, overrides: list[str]) -> None:
    perform(pretrain(run, *overrides))


@pytest.mark.slow
def test_eight_samples_on_three_ranks_cost_what_they_cost_on_one(tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "three"  # the third rank has an idle micro-batch in every step
    layout = ["parallel=zero2", "micro_batch=1", "parallel.precision=fp32"]
    on_three(run=run, overrides=[f"inputs={tiny}", *layout])
    expected, found = rows(tiny), rows(run)
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=1e-4)
    assert [row["tokens"] for row in found] == [row["tokens"] for row in expected]


@on_ranks(3)
def test_a_batch_with_fewer_samples_than_data_ranks_is_refused(tiny: Path, tmp_path: Path) -> None:
    task = pretrain(tmp_path / "few", f"inputs={tiny}", "batch=2")
    start(1).barrier()  # no rank leaves while others are still joining
    with pytest.raises(
        ValueError, match=r"batch=2 has no sample for some of the 3 data-parallel ranks; use batch=3"
    ):
        task.execute()


def test_changed_settings_do_not_overwrite_a_finished_stage(tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "changed"
    trained(run=run, overrides=[f"inputs={tiny}", "tokens=512"])
    first = rows(run)
    trained(run=run, overrides=[f"inputs={tiny}", "tokens=768"])
    assert len(rows(run)) == 3
    (aside,) = (run / "replaced").iterdir()
    assert [json.loads(line) for line in (aside / "metrics.jsonl").read_text().splitlines()] == first


def test_resume_any_goes_on_from_a_finished_run_with_other_settings(tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "longer"
    trained(run=run, overrides=[f"inputs={tiny}", "tokens=512"])
    first = rows(run)
    trained(run=run, overrides=[f"inputs={tiny}", "tokens=1024", "resume=any"])
    assert rows(run)[:2] == first
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4]
    assert not (run / "replaced").exists()


def test_a_run_that_is_refused_keeps_the_record_of_its_settings(tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "refused"
    trained(run=run, overrides=[f"inputs={tiny}", "tokens=512"])
    (run / "pretrain" / "done.json").unlink()  # as if it had been stopped
    before = (run / "pretrain" / "config.yaml").read_text()
    with pytest.raises(pytest.fail.Exception, match="was trained with other settings or data") as failure:
        trained(run=run, overrides=[f"inputs={tiny}", "tokens=512", "optimizer.lr=1"])
    assert "What has changed:\n  optimizer.lr: 0.01 -> 1" in str(failure.value)
    wide = [f"inputs={tiny}", "tokens=512", "model.hidden=96", "resume=any"]
    with pytest.raises(pytest.fail.Exception, match=r"weight.blocks.0.mlp.gate.weight in shape") as failure:
        trained(run=run, overrides=wide)
    assert "model.hidden: 64 -> 96" in str(failure.value)
    assert (run / "pretrain" / "config.yaml").read_text() == before


def test_the_largest_seed_and_a_prompt_longer_than_the_context_do_no_harm(tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "large"
    prompt = "prompt='" + "one " * 60 + "'"
    trained(run=run, overrides=[f"inputs={tiny}", "tokens=256", "seed=4294967295", prompt])
    assert len(rows(run)) == 1


def test_wandb_runs_offline_and_holds_no_secret(tiny: Path) -> None:
    (folder,) = (tiny / "wandb").glob("offline-run-*")
    (record,) = folder.glob("run-*.wandb")
    content = record.read_bytes()
    assert b"loss_nats" in content
    assert b"tokens_per_second" in content


@on_ranks(2)
def test_a_rank_whose_copies_of_the_files_are_of_another_time_goes_along(tiny: Path, tmp_path: Path) -> None:
    mesh = start(1)
    own = Pretrain.fingerprint
    Pretrain.fingerprint = lambda task: f"{own(task)}{mesh.rank}"  # type: ignore[method-assign]
    for _ in range(2):
        perform(pretrain(tmp_path, f"inputs={tiny}", "max_steps=2"))
        (tmp_path / "pretrain" / "done.json").unlink(missing_ok=True)
        mesh.barrier()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def test_losses_of_other_settings_are_no_measure_of_the_next(tiny: Path, tmp_path: Path) -> None:
    trained(run=tmp_path, overrides=[f"inputs={tiny}", "max_steps=3"])
    trained(run=tmp_path, overrides=[f"inputs={tiny}", "max_steps=5", "resume=any"])
    saved = latest(tmp_path / "pretrain").manifest["progress"]
    assert saved["recent"] == pytest.approx([row["loss"] for row in rows(tmp_path)[3:]])
