"""What is damaged is found, named and passed over, by all ranks alike; nothing in it is ever run."""

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megachat.files import patiently, sha256, write_json
from megachat.parallel import checkpoint
from megachat.parallel.attempt import claim
from megachat.parallel.checkpoint import Checkpoint, TooNew, newest, write_manifest
from megachat.parallel.mesh import Mesh, Unfit, start
from megachat.parallel.saving import write_tensors
from megachat.run import Superseded, finished
from tests.payload import Payload
from tests.spawn import on_ranks

ALONE = Mesh(0, 1, 1, torch.device("cpu"), None, None)


def write(folder: Path, *steps: int) -> None:
    """Checkpoints of two files each."""
    for step in steps:
        path = folder / f"step-{step:08d}"
        path.mkdir(parents=True)
        files = write_tensors(path, [("model/weight.a", torch.full((40,), float(step)))], 0)
        files |= write_tensors(path, [("model/weight.b", torch.zeros(4, 4))], 1)
        progress = {"step": step, "samples": 8 * step, "data": {"seed": 0}}
        write_manifest(
            path, {"architecture": {"model": {}}, "tokenizer": "", "progress": progress, "files": files}
        )
    write_json(folder / "latest.json", {"checkpoint": path.name, "step": step})


def flipped(path: Path) -> None:
    data = bytearray((path / "tensors-00001-00000.safetensors").read_bytes())
    data[-5] ^= 1
    (path / "tensors-00001-00000.safetensors").write_bytes(data)


def truncated(path: Path) -> None:
    os.truncate(path / "tensors-00000-00000.safetensors", 100)


def missing(path: Path) -> None:
    (path / "tensors-00000-00000.safetensors").unlink()


def edited(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"samples": 16', '"samples": 17'))


def torn(path: Path) -> None:
    os.truncate(path / "manifest.json", 200)


def empty(path: Path) -> None:
    os.truncate(path / "manifest.json", 0)


def without_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def renamed(path: Path) -> None:
    path.rename(path.with_name("step-00000009"))


def escaping(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    name = "../step-00000001/tensors-00000-00000.safetensors"
    manifest["files"][name] = manifest["files"].pop("tensors-00000-00000.safetensors")
    write_manifest(path, manifest)


DAMAGES = {
    flipped: "tensors-00001-00000.safetensors is damaged: its sha256 differs from the manifest's",
    truncated: "has 100 bytes, its manifest says 248",
    missing: "is not a complete checkpoint",
    edited: "manifest.json is damaged: it has been changed since it was written",
    torn: "manifest.json is damaged: it is not JSON",
    empty: "manifest.json is damaged: it is not JSON",
    without_manifest: "is not a complete checkpoint",
    renamed: "manifest.json is damaged: it is of step 2",
    escaping: "is not the name of a file of tensors in that folder",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_named_set_aside_and_the_checkpoint_before_it_is_taken(
    tmp_path: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints"
    write(folder, 1, 2)
    damage(folder / "step-00000002")
    found = newest(folder, ALONE)
    assert found is not None
    assert found.path.name == "step-00000001"
    said = capsys.readouterr().err
    assert "ALARM: a damaged checkpoint is passed over" in said
    assert DAMAGES[damage] in said
    assert len(list((folder / "damaged").iterdir())) == 1
    assert checkpoint.steps(folder) == [folder / "step-00000001"]
    assert json.loads((folder / "latest.json").read_text()) == {"checkpoint": "step-00000001", "step": 1}


@on_ranks(2)
def test_two_ranks_agree_although_one_sees_the_damage_and_another_list(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    mesh = start(1)
    if mesh.rank == 0:
        write(folder, 1, 2, 3)
        flipped(folder / "step-00000003")  # in the second file, which the second rank verifies
    else:
        checkpoint.steps = lambda folder: [folder / "step-00000001"]  # type: ignore[assignment]
    mesh.barrier()
    found = newest(folder, mesh)
    assert found is not None
    assert found.path.name == "step-00000002"
    mesh.barrier()
    assert (folder / "damaged" / "step-00000003").is_dir()


@on_ranks(2)
def test_a_disk_that_does_not_answer_one_rank_is_no_damage(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    mesh = start(1)
    if mesh.rank == 0:
        write(folder, 1)
    else:

        def broken(path: Path) -> str:
            raise OSError(errno.ESTALE, "Stale file handle", str(path))

        checkpoint.sha256 = broken
        checkpoint.patiently = lambda read: patiently(read, waits=(0.0, 0.0))  # type: ignore[assignment]
    mesh.barrier()
    with pytest.raises(OSError, match=r"cannot be read \(rank 1: .*Stale file handle.*nothing was changed"):
        newest(folder, mesh)
    mesh.barrier()
    assert sorted(path.name for path in folder.iterdir()) == ["latest.json", "step-00000001"]


def test_a_disk_that_answers_late_is_asked_again() -> None:
    answers: list[OSError | str] = [OSError(errno.EIO, "Input/output error"), "there"]

    def read() -> str:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    assert patiently(read, waits=(0.0,)) == "there"
    answers[:] = [OSError(errno.EIO, "Input/output error")] * 2
    with pytest.raises(OSError, match="Input/output error"):
        patiently(read, waits=(0.0,))
    answers[:] = [FileNotFoundError(errno.ENOENT, "gone"), "never asked"]
    with pytest.raises(FileNotFoundError):
        patiently(read, waits=(0.0,))
    assert answers == ["never asked"]


def test_a_run_never_starts_over_by_itself(tmp_path: Path) -> None:
    folder = tmp_path / "pretrain" / "checkpoints"
    assert newest(folder, ALONE) is None  # nothing was ever saved
    write(folder, 1, 2)
    for step in (1, 2):
        truncated(folder / f"step-{step:08d}")
    for _ in range(2):  # the second start finds them set aside
        with pytest.raises(
            ValueError, match=r"all checkpoints are damaged \(2 are in .*; put one back, or delete"
        ):
            newest(folder, ALONE)
    shutil.rmtree(folder / "damaged")
    with pytest.raises(ValueError, match=r"latest.json tells of a checkpoint that was written, but"):
        newest(folder, ALONE)
    write_json(folder.parent / "saved.json", {"checkpoint": "step-00000002", "step": 2})
    shutil.rmtree(folder)  # purged by whoever cleans the disk
    with pytest.raises(ValueError, match=rf"saved.json tells of .* delete {folder.parent} to start over"):
        newest(folder, ALONE)
    shutil.rmtree(folder.parent)
    assert newest(folder, ALONE) is None


def test_a_checkpoint_whose_name_a_killed_save_was_about_to_take_has_it_again(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000001.replaced.tmp")
    found = newest(tmp_path, ALONE)
    assert found is not None
    assert found.path.name == "step-00000001"


def test_a_start_that_has_been_superseded_sets_nothing_aside(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    write(folder, 1, 2)
    zombie = claim(tmp_path, ALONE)

    def fence() -> None:
        if not (folder / "step-00000002" / "manifest.json").exists():  # what it reads is being deleted
            claim(tmp_path, ALONE)
        zombie.fence(tmp_path, ALONE)

    without_manifest(folder / "step-00000002")
    with pytest.raises(Superseded, match="names attempt 2"):
        newest(folder, ALONE, fence)
    assert len(checkpoint.steps(folder)) == 2


@on_ranks(2)
def test_ranks_share_the_verification_and_all_learn_what_one_has_found(tmp_path: Path) -> None:
    mesh = start(1)
    path = tmp_path / str(mesh.rank) / "step-00000002"  # a copy for each: nobody waits for the other
    write(path.parent, 2)
    flipped(path)  # the second file, which is rank 1's
    saved = Checkpoint.open(path)
    with pytest.raises(ValueError, match=r"1.step-00000002.tensors-00001-00000.safetensors is damaged"):
        saved.verify_together(mesh)


def misread(path: Path) -> str:
    """What a host with bad memory makes of a file."""
    return sha256(path)[::-1]


@on_ranks(2)
def test_a_host_that_misreads_checkpoints_is_unfit_and_sets_none_aside(tmp_path: Path) -> None:
    mesh, folder = start(1), tmp_path / "checkpoints"
    if mesh.rank == 0:
        write(folder, 1, 2)
    else:
        checkpoint.sha256 = misread
    said = (
        r"rank 1 on .* finds .*00001-00000.safetensors damaged, and read by rank 0 on .* it is whole; check"
    )
    with pytest.raises(OSError, match=said) as raised:
        newest(folder, mesh)
    assert isinstance(raised.value, Unfit) == (mesh.rank == 1)
    assert len(checkpoint.steps(folder)) == 2


@on_ranks(3)
def test_what_two_ranks_find_damaged_is_set_aside_though_a_third_cannot_read_well(tmp_path: Path) -> None:
    mesh, folder = start(1), tmp_path / "checkpoints"
    if mesh.rank == 0:
        write(folder, 1, 2)
        flipped(folder / "step-00000002")  # the second file, which is rank 1's
    elif mesh.rank == 2:  # it reads again what rank 1 has found
        checkpoint.sha256 = misread
    found = newest(folder, mesh)
    assert found is not None
    assert found.path.name == "step-00000001"


def test_a_process_alone_reads_a_second_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)
    sums = iter(["0" * 64])
    monkeypatch.setattr(checkpoint, "sha256", lambda path: next(sums, None) or sha256(path))
    with pytest.raises(Unfit, match="damaged, and read a second time it is whole"):
        newest(tmp_path, ALONE)
    assert len(checkpoint.steps(tmp_path)) == 1


@on_ranks(2)
def test_a_checkpoint_of_a_later_version_is_refused_by_all_ranks_and_stays(tmp_path: Path) -> None:
    mesh, folder = start(1), tmp_path / "checkpoints"
    if mesh.rank == 0:
        write(folder, 1, 2)
        (folder / "step-00000002" / "manifest.json").write_text('{"format": 3, "chunks": []}')
    with pytest.raises(TooNew, match=r"step-00000002 has format 3, .* reads up to 2; update megachat"):
        newest(folder, mesh)
    assert len(checkpoint.steps(folder)) == 2


def test_a_checkpoint_of_the_first_format_is_read(tmp_path: Path) -> None:
    write(tmp_path, 1)
    path = tmp_path / "step-00000001" / "manifest.json"
    manifest = json.loads(path.read_text())
    for facts in manifest["files"].values():
        facts["tensors"] = sorted(facts["tensors"])
    path.write_text(json.dumps({key: manifest[key] for key in manifest if key not in ("format", "sha256")}))
    found = newest(tmp_path, ALONE)
    assert found is not None
    assert torch.equal(found.reader("model")("weight.a"), torch.ones(40))


def test_a_payload_in_any_file_is_refused_and_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    payload = pickle.dumps(Payload(mark))
    pickle.loads(payload)  # it would work
    mark.rmdir()
    folder = tmp_path / "stage" / "checkpoints"

    def planted(name: str) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        write(folder, 1)
        path = folder / "step-00000001"
        (path / name).write_bytes(payload)
        return path

    planted("manifest.json")
    with pytest.raises(ValueError, match="all checkpoints are damaged"):
        newest(folder, ALONE)
    # Someone who can write the file can write its sum, too.
    for saved in (payload, b"PK\x03\x04" + payload):
        path = planted(name := "tensors-00000-00000.safetensors")
        (path / name).write_bytes(saved)
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"][name] |= {"bytes": len(saved), "sha256": sha256(path / name)}
        write_manifest(path, manifest)
        found = newest(folder, ALONE)
        assert found is not None
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            found.reader("model")("weight.a")
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            found.check_shapes("model", {"weight.a": torch.Size([40])})
    # Optimizer, data position: they are in the same two kinds of file. A pickle among them is never opened.
    planted("optimizer.pt")
    planted("data.pkl")
    assert newest(folder, ALONE) is not None
    write_manifest(
        path := planted("x"), json.loads((path / "manifest.json").read_text()) | {"files": {"x.pt": {}}}
    )
    with pytest.raises(ValueError, match=r"'x.pt' is not the name of a file of tensors"):
        Checkpoint.open(path)
    stage = folder.parent
    (stage / "attempt.json").write_bytes(payload)
    with pytest.raises(ValueError, match=r"attempt.json is not the record of an attempt .*; delete it"):
        claim(stage, ALONE)
    (stage / "done.json").write_bytes(payload)
    with pytest.raises(ValueError, match=r"done.json is not JSON"):
        finished(stage)
    (folder / "latest.json").write_bytes(payload)  # only looked for, never read
    (stage / "saved.json").write_bytes(payload)
    shutil.rmtree(folder / "step-00000001")
    with pytest.raises(ValueError, match="tells of a checkpoint that was written"):
        newest(folder, ALONE)
    assert not mark.exists()


def test_a_manifest_cannot_name_what_to_build(tmp_path: Path) -> None:
    write(tmp_path, 1)
    path = tmp_path / "step-00000001"
    manifest = json.loads((path / "manifest.json").read_text())
    for config in ({"_target_": "os.mkdir", "path": str(tmp_path / "mark")}, {}, []):
        described = {"model": {"head": "language", "vocab": 3, "config": config}}
        write_manifest(path, manifest | {"architecture": described})
        with pytest.raises(ValueError, match="does not describe a model"):
            checkpoint.blueprint(Checkpoint.open(path), "model")
    assert not (tmp_path / "mark").exists()
