"""A checkpoint is written by all ranks beside the training, whole or not at all, within bounded memory."""

import json
import os
import resource
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megachat.parallel import checkpoint, saving
from megachat.parallel.attempt import Attempt, claim
from megachat.parallel.engine import Engine
from megachat.parallel.mesh import start
from megachat.parallel.saving import Saver, deal, write_tensors
from megachat.run import Superseded, perform
from megachat.train import loop
from tests.spawn import on_ranks
from tests.tiny_run import make, pretrain, rows


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("saving") / "runs" / "tiny")


def saver(tiny: Path, stage: Path, zero: int = 1, **settings: Any) -> Saver:
    """Of a small model with nothing trained, in a stage's folder."""
    task = pretrain(tiny, f"parallel.zero={zero}")
    mesh = start(1)
    torch.manual_seed(0)
    model = task.model.build(300)
    engine = Engine(model, task.optimizer.build, task.optimizer.groups(model), task.parallel, 1.0, mesh)
    about = {"architecture": {"model": checkpoint.architecture(model)}, "tokenizer": "", "fingerprint": ""}
    plain = {"interval": 1, "keep": 2, "keep_every": 0, "background": False, "step": None}
    attempt = claim(stage, mesh)
    return Saver(stage / "checkpoints", {"model": engine}, about, mesh, attempt, **(plain | settings))


def names(stage: Path) -> list[str]:
    return sorted(path.name for path in (stage / "checkpoints").iterdir())


def test_a_file_of_tensors_is_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = {
        "a/scalar": torch.tensor(1.5),
        "b/matrix": torch.randn(3, 5).t(),
        "c/half": torch.randn(7).bfloat16(),
        "d/none": torch.empty(0, 2),
    }
    files = write_tensors(tmp_path, tensors.items(), writer=3)
    ((name, facts),) = files.items()
    assert name == "tensors-00003-00000.safetensors"
    read = load_file(tmp_path / name)
    assert all(torch.equal(read[key], value) for key, value in tensors.items())
    assert facts["bytes"] == (tmp_path / name).stat().st_size
    assert facts["sha256"] == saving.hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    assert facts["tensors"]["b/matrix"] == {"dtype": "F32", "shape": [5, 3]}


def test_no_more_than_a_file_is_held_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "FILE_BYTES", 1000)
    alive, peak = [0], [0]

    def made() -> Iterator[tuple[str, Tensor]]:
        for index in range(50):
            tensor = torch.full((60,), float(index))  # 240 bytes
            alive[0] += tensor.nbytes
            peak[0] = max(peak[0], alive[0])
            weakref.finalize(tensor.untyped_storage(), lambda: alive.__setitem__(0, alive[0] - 240))
            yield f"t{index:02d}", tensor
            del tensor

    files = write_tensors(tmp_path, made())
    assert len(files) == 13  # four to a file
    assert peak[0] <= 1000 + 240
    assert sum(len(facts["tensors"]) for facts in files.values()) == 50


def test_tensors_are_dealt_to_who_has_least() -> None:
    assert deal({"a": 3, "b": 1, "c": 1, "d": 4}, 2) == {"a": 0, "b": 1, "c": 1, "d": 1}
    sizes = {str(index): 1 + index % 7 for index in range(100)}
    loads = [sum(sizes[name] for name, rank in deal(sizes, 8).items() if rank == r) for r in range(8)]
    assert max(loads) - min(loads) <= 7


@on_ranks(1)
def test_a_full_disk_keeps_the_old_checkpoint_and_leaves_nothing_half_written(
    tiny: Path, tmp_path: Path
) -> None:
    for background in (False, True):
        stage = tmp_path / f"background-{background}"
        writes = saver(tiny, stage, background=background)
        writes.save({"step": 1})
        writes.finish()
        assert writes.step == 1
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing past the limit fails as on a full disk
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        writes.save({"step": 2})
        writes.finish()
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert writes.step == 1
        assert writes.take_figures()["checkpoint/failed"] == 1
        assert names(stage) == ["latest.json", "step-00000001"]
        assert (
            json.loads((stage / "checkpoints" / "latest.json").read_text())["checkpoint"] == "step-00000001"
        )
        writes.save({"step": 3})
        writes.finish()
        assert writes.step == 3


@on_ranks(1)
def test_a_disk_without_room_is_noticed_before_anything_is_written(tiny: Path, tmp_path: Path) -> None:
    writes = saver(tiny, tmp_path)
    told: list[str] = []
    saving.say = told.append  # type: ignore[assignment]
    saving.shutil.disk_usage = lambda path: type("Usage", (), {"free": 1000})  # type: ignore[assignment]
    writes.save({"step": 1})
    assert names(tmp_path) == []
    assert told == [
        f"ALARM: the checkpoint of step 1 could not be written: it takes {writes._bytes:,} bytes, and 1,000 "
        f"are free in {tmp_path / 'checkpoints'}; there is none before it; "
        f"make room in {tmp_path / 'checkpoints'}"
    ]


@on_ranks(1)
def test_a_writer_that_died_commits_nothing(tiny: Path, tmp_path: Path) -> None:
    writes = saver(tiny, tmp_path, background=True)

    def dies(*_: Any) -> None:
        raise SystemExit  # ends a thread without a word

    whole = saving.write_tensors
    saving.write_tensors = dies  # type: ignore[assignment]
    writes.save({"step": 1})
    writes.finish()
    assert writes.step is None

    def forgets(folder: Path, tensors: Any, writer: int) -> saving.Files:
        return whole(folder, list(tensors)[:-1], writer)

    saving.write_tensors = forgets
    writes.save({"step": 2})
    writes.finish()
    assert writes.step is None
    assert names(tmp_path) == []


@on_ranks(1)
def test_training_goes_on_while_a_checkpoint_is_written(tiny: Path, tmp_path: Path) -> None:
    whole = saving.write_tensors
    for zero in range(4):
        stage = tmp_path / f"zero-{zero}"
        writes = saver(tiny, stage, zero=zero, background=True)
        engine, go = writes.engines["model"], threading.Event()

        def waits(*arguments: Any, go: threading.Event = go) -> saving.Files:
            go.wait(60)
            return whole(*arguments)

        def step(engine: Engine = engine) -> None:
            engine.backward(engine(torch.arange(24).view(2, 12)).logsumexp(-1).sum(), last=True)
            engine.step(1e-2)

        saving.write_tensors = waits
        step()
        before = {name: tensor.clone() for name, tensor in engine.logical()}
        writes.save({"step": 1})
        step()
        assert not writes.ready()
        assert writes.step is None
        go.set()
        deadline = time.monotonic() + 60
        while not writes.ready() and time.monotonic() < deadline:
            time.sleep(0.01)
        writes.finish()
        figures = writes.take_figures()
        assert figures["checkpoint/stall"] <= figures["checkpoint/seconds"]
        assert figures["checkpoint/bytes"] == sum(tensor.nbytes for tensor in before.values())
        saved = checkpoint.newest(stage / "checkpoints", writes.mesh)
        assert saved is not None
        read = saved.reader("model")
        assert all(torch.equal(read(name), tensor) for name, tensor in before.items()), zero
        after = dict(engine.logical())
        assert not any(torch.equal(after[name], tensor) for name, tensor in before.items()), zero


@on_ranks(1)
def test_the_last_checkpoints_stay_and_every_kth_for_good(tiny: Path, tmp_path: Path) -> None:
    writes = saver(tiny, tmp_path, keep=2, keep_every=3)
    for step in range(1, 9):
        writes.save({"step": step})
    assert names(tmp_path) == ["latest.json", *(f"step-{step:08d}" for step in (3, 6, 7, 8))]


@on_ranks(1)
def test_multiples_of_the_interval_are_saved_wherever_a_run_goes_on_from(tiny: Path, tmp_path: Path) -> None:
    writes = saver(tiny, tmp_path, interval=10, step=27)
    assert [step for step in range(28, 41) if writes.due(step)] == [*range(30, 41)]
    writes.tried = 34  # only there it was a place to resume from
    assert [step for step in range(35, 51) if writes.due(step)] == [*range(40, 51)]


@on_ranks(1)
def test_without_room_for_one_more_the_older_checkpoints_make_way(tiny: Path, tmp_path: Path) -> None:
    writes = saver(tiny, tmp_path, keep=3, keep_every=2)
    for step in range(1, 4):
        writes.save({"step": step})
    usage = shutil.disk_usage(tmp_path)

    def full(folder: Path) -> Any:
        """Of two checkpoints at the most, and one that is to stay."""
        left = 3 - len(checkpoint.steps(folder))
        return usage._replace(free=left * writes._bytes)

    saving.shutil.disk_usage = full  # type: ignore[attr-defined]
    writes.save({"step": 4})
    assert writes.step == 4
    assert names(tmp_path) == ["latest.json", *(f"step-{step:08d}" for step in (2, 3, 4))]
    writes.save({"step": 5})
    writes.save({"step": 6})  # neither 2 nor 4 makes way, nor the newest
    assert writes.step == 5
    assert names(tmp_path) == ["latest.json", *(f"step-{step:08d}" for step in (2, 4, 5))]


@on_ranks(1)
def test_a_run_that_was_rolled_back_writes_the_same_step_again(tiny: Path, tmp_path: Path) -> None:
    writes = saver(tiny, tmp_path)
    writes.save({"step": 1, "samples": 8})
    writes.save({"step": 1, "samples": 16})
    saved = checkpoint.newest(tmp_path / "checkpoints", writes.mesh)
    assert saved is not None
    assert saved.manifest["progress"]["samples"] == 16
    assert names(tmp_path) == ["latest.json", "step-00000001"]


@on_ranks(1)
def test_a_checkpoint_that_was_to_be_replaced_keeps_its_name_when_the_new_one_is_swept_away(
    tiny: Path, tmp_path: Path
) -> None:
    zombie = saver(tiny, tmp_path)
    zombie.save({"step": 1, "samples": 8})
    check, looks = Attempt.check, []

    def swept(attempt: Attempt, stage: Path) -> None:
        check(attempt, stage)
        looks.append(stage)
        if len(looks) == 3:  # frozen right after the last look, while a newer start takes over
            shutil.rmtree(next((tmp_path / "checkpoints").glob("*.1.tmp")))

    Attempt.check = swept  # type: ignore[method-assign]
    zombie.save({"step": 1, "samples": 16})
    assert names(tmp_path) == ["latest.json", "step-00000001"]
    saved = checkpoint.Checkpoint.open(tmp_path / "checkpoints" / "step-00000001")
    assert saved.manifest["progress"]["samples"] == 8


@on_ranks(1)
def test_a_start_that_was_superseded_ends_between_two_saves(tiny: Path, tmp_path: Path) -> None:
    task = pretrain(tmp_path, f"inputs={tiny}", "checkpoint_interval=0")
    whole, newer = type(task).loss, []

    def loss(task: Any, run: Any, batch: Any) -> Any:
        if run.progress.step == 4 and not newer:
            newer.append(claim(task.folder, run.mesh))
        return whole(task, run, batch)

    type(task).loss = loss  # type: ignore[method-assign]
    loop.LOOK = 0.0
    with pytest.raises(Superseded, match="names attempt 2"):
        perform(task)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]


@on_ranks(1)
def test_the_save_of_an_older_start_is_refused_and_the_newer_ones_files_stay(
    tiny: Path, tmp_path: Path
) -> None:
    zombie = saver(tiny, tmp_path, background=True)
    go = threading.Event()
    whole = saving.write_tensors

    def waits(*arguments: Any) -> saving.Files:
        go.wait(60)
        return whole(*arguments)

    saving.write_tensors = waits
    zombie.save({"step": 1})  # is writing when the next start takes over
    saving.write_tensors = whole
    newer = saver(tiny, tmp_path, background=False)
    assert newer.attempt.attempt == 2
    newer.save({"step": 1, "samples": 2})
    go.set()
    with pytest.raises(Superseded, match=r"names attempt 2 .* so this one, attempt 1 .* writes nothing more"):
        zombie.finish()
    with pytest.raises(Superseded, match="names attempt 2"):
        zombie.save({"step": 2})
    assert names(tmp_path) == ["latest.json", "step-00000001"]
    saved = checkpoint.newest(tmp_path / "checkpoints", newer.mesh)
    assert saved is not None
    assert saved.manifest["progress"]["samples"] == 2
    assert saved.manifest["attempt"]["attempt"] == 2


@on_ranks(1)
def test_a_requeued_job_displaces_its_earlier_start_and_not_the_other_way_round(tmp_path: Path) -> None:
    mesh = start(1)
    os.environ |= {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}
    assert claim(tmp_path, mesh).attempt == 1
    os.environ["SLURM_RESTART_COUNT"] = "0"  # a node that had been cut off wakes up
    with pytest.raises(Superseded, match=r"of job 7, which has been requeued 1 times"):
        claim(tmp_path, mesh)
    os.environ["SLURM_RESTART_COUNT"] = "2"
    assert claim(tmp_path, mesh).attempt == 2
    os.environ |= {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "0"}  # another job, by a person
    assert claim(tmp_path, mesh).attempt == 3


@on_ranks(1)
def test_an_older_start_that_loads_late_leaves_what_the_newer_one_is_writing(
    tiny: Path, tmp_path: Path
) -> None:
    half = tmp_path / "checkpoints" / "step-00000005.2.tmp"
    half.mkdir(parents=True)
    assert saver(tiny, tmp_path).attempt.attempt == 1
    assert half.is_dir()
    saver(tiny, tmp_path)
    assert not half.exists()


@on_ranks(1)
def test_a_start_that_froze_while_it_loaded_changes_nothing_when_it_thaws(tiny: Path, tmp_path: Path) -> None:
    zombie = pretrain(tmp_path, f"inputs={tiny}")
    prepare = type(zombie).prepare

    def freezes(task: Any, run: Any) -> int:
        claim(task.folder, run.mesh)  # meanwhile the next one starts
        (task.folder / "skipped.jsonl").write_text("half a line")
        return prepare(task, run)

    type(zombie).prepare = freezes  # type: ignore[method-assign]
    with pytest.raises(Superseded, match="names attempt 2"):
        perform(zombie)
    left = sorted(path.name for path in zombie.folder.iterdir() if path.name != "heartbeat.json")
    assert left == ["attempt.json", "skipped.jsonl"]
    assert (zombie.folder / "skipped.jsonl").read_text() == "half a line"


@on_ranks(2)
def test_a_rank_that_cannot_start_its_writer_or_has_no_memory_for_it_is_named_and_the_next_save_succeeds(
    tiny: Path, tmp_path: Path
) -> None:
    writes = saver(tiny, tmp_path, background=True)
    told: list[str] = []
    saving.say = told.append  # type: ignore[assignment]
    start_thread, write = threading.Thread.start, saving.write_tensors

    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def no_memory(*_: Any) -> saving.Files:
        raise MemoryError

    for step, background in enumerate((True, True, False), start=1):
        writes.background = background
        if writes.mesh.rank == 1:
            threading.Thread.start = no_thread if step == 1 else start_thread  # type: ignore[method-assign]
            saving.write_tensors = no_memory if step > 1 else write
        writes.save({"step": step})
        writes.finish()
        assert writes.step is None
    threading.Thread.start, saving.write_tensors = start_thread, write  # type: ignore[method-assign]
    writes.save({"step": 4})
    writes.finish()
    assert writes.step == 4
    alarms = [f"step {step} could not be written: rank 1: {why}" for step, why in REASONS.items()]
    assert [text for text, alarm in zip(told, alarms, strict=True) if alarm not in text] == []


REASONS = {1: "can't start new thread", 2: "MemoryError", 3: "MemoryError"}


@on_ranks(2)
def test_without_memory_for_a_copy_on_one_rank_all_save_in_the_foreground(tiny: Path, tmp_path: Path) -> None:
    writes = saver(tiny, tmp_path, background=True)
    told: list[str] = []
    saving.say = told.append  # type: ignore[assignment]
    if writes.mesh.rank == 1:
        empty = torch.empty

        def fails(*arguments: Any, pin_memory: bool | None = None, **named: Any) -> Tensor:
            if pin_memory is not None:
                raise RuntimeError("CUDA error: out of memory")
            return empty(*arguments, **named)

        torch.empty = fails  # type: ignore[assignment]
    writes.save({"step": 1})
    assert writes.step == 1
    assert writes._pending is None
    assert "no memory for a copy of what is saved (rank 1: CUDA error: out of memory)" in told[0]


@on_ranks(2)
def test_all_ranks_learn_that_the_record_of_the_attempt_cannot_be_read(tiny: Path, tmp_path: Path) -> None:
    writes = saver(tiny, tmp_path)
    (tmp_path / "attempt.json").write_text("{")
    writes.save({"step": 1})
    assert writes.failures == 1
    with pytest.raises(ValueError, match=r"attempt.json is not the record of an attempt .* delete it"):
        writes.attempt.fence(tmp_path, writes.mesh)
    with pytest.raises(ValueError, match=r"attempt.json is not the record of an attempt .* delete it"):
        claim(tmp_path, writes.mesh)


@on_ranks(2)
def test_two_ranks_write_half_each_and_agree_that_one_has_failed(tiny: Path, tmp_path: Path) -> None:
    writes = saver(tiny, tmp_path, background=True)
    writes.save({"step": 1})
    writes.finish()
    assert writes.step == 1
    saved = checkpoint.newest(tmp_path / "checkpoints", writes.mesh)
    assert saved is not None
    sizes = [facts["bytes"] for facts in saved.manifest["files"].values()]
    assert len(sizes) == 2
    assert max(sizes) < 1.1 * min(sizes)
    if writes.mesh.rank == 1:

        def fails(*_: Any) -> saving.Files:
            raise OSError(5, "Input/output error")

        saving.write_tensors = fails
    for background in (True, False):
        writes.background = background
        writes.save({"step": 2})
        writes.finish()
        assert writes.step == 1
    writes.mesh.barrier()
    assert names(tmp_path) == ["latest.json", "step-00000001"]


@pytest.mark.slow
@on_ranks(1)
def test_a_failed_save_is_an_alarm_the_training_goes_on_and_the_last_one_must_succeed(
    tiny: Path, tmp_path: Path
) -> None:
    whole = saving.write_tensors
    fails = [True]

    def sometimes(*arguments: Any) -> saving.Files:
        if fails[0]:
            fails[0] = False
            raise OSError(28, "No space left on device")
        return whole(*arguments)

    saving.write_tensors = sometimes
    run = tmp_path / "once"
    # Not in the background: steps this short may all be taken before the second one is written.
    settings = ["checkpoint_interval=4", "checkpoint_background=false", "seed=0"]
    perform(pretrain(run, f"inputs={tiny}", *settings))
    assert (run / "pretrain" / "done.json").exists()
    logged = rows(run)
    assert len(logged) == 12
    assert [row["checkpoint/failed"] for row in logged if "checkpoint/failed" in row] == [1]
    (written,) = [row for row in logged if "checkpoint/bytes" in row]  # the second; the third is the last
    assert written["checkpoint/stall"] >= written["checkpoint/seconds"] > 0
    saved = sorted(path.name for path in (run / "pretrain" / "checkpoints").iterdir())
    assert saved == ["latest.json", "step-00000008", "step-00000012"]

    def always(*_: Any) -> saving.Files:
        raise OSError(28, "No space left on device")

    fails[0] = True
    run = tmp_path / "last"
    loop.AGAIN = (0.1,)
    perform(pretrain(run, f"inputs={tiny}"))  # the only save fails, and then does not
    assert checkpoint.steps(run / "pretrain" / "checkpoints")

    saving.write_tensors = always
    with pytest.raises(OSError, match=r"the final checkpoint of pretrain could not be written"):
        perform(pretrain(tmp_path / "never", f"inputs={tiny}"))
    assert not (tmp_path / "never" / "pretrain" / "done.json").exists()
