"""Fault 11: what is on disk is not what was written. It is noticed, said, and never trained on."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megachat.parallel.checkpoint import steps
from tests.fault_table import record
from tests.faults.conftest import Start, Straight
from tests.faults.inject import Fault
from tests.faults.ranks import Job, weights

pytestmark = pytest.mark.faults

SETTINGS = ("checkpoint_interval=2", "checkpoint_keep=3", "checkpoint_background=false")


@pytest.fixture(scope="module")
def killed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Killed in step 9: checkpoints of the steps 4, 6 and 8 are there."""
    job = Job(tmp_path_factory.mktemp("killed"), shards, SETTINGS)
    job.go([Fault("forward", "kill", step=9)], then=())
    assert [path.name for path in checkpoints(job)] == [f"step-0000000{step}" for step in (4, 6, 8)]
    return job


def checkpoints(job: Job) -> list[Path]:
    """The complete ones, oldest first."""
    return steps(job.stage / "checkpoints")


def again(killed: Job, start: Start) -> Job:
    """A copy to damage."""
    job = start(*SETTINGS)
    shutil.copytree(killed.run, job.run)
    return job


def a_shard(checkpoint: Path) -> Path:
    return max(checkpoint.glob("*.safetensors"))


def flip(checkpoint: Path) -> None:
    path = a_shard(checkpoint)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def truncate(checkpoint: Path) -> None:
    os.truncate(a_shard(checkpoint), 1000)


def remove(checkpoint: Path) -> None:
    a_shard(checkpoint).unlink()


def tear_manifest(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    os.truncate(path, path.stat().st_size // 2)


def remove_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def empty_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text("")


def edit_manifest(checkpoint: Path) -> None:
    """Somebody has been at it: it names a file that is not there."""
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["other.safetensors"] = next(iter(manifest["files"].values()))
    path.write_text(json.dumps(manifest))


DAMAGE = [flip, truncate, remove, tear_manifest, remove_manifest, empty_manifest, edit_manifest]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    damage: Callable[[Path], None], killed: Job, start: Start, straight: Straight
) -> None:
    job = again(killed, start)
    damage(checkpoints(job)[-1])
    story = job.go()
    (attempt,) = story.attempts
    same = attempt.codes == [0, 0] and weights(job.run) == weights(straight(*SETTINGS).run)
    done = max(note["step"] for note in killed.story.of("step"))
    lost = done - min((note["step"] for note in story.of("step")), default=0) + 1
    assert attempt.codes == [0, 0], attempt.said
    assert "goes on from step 6" in attempt.printed()
    assert "step-00000008" in attempt.printed().split("goes on")[0], "which one is damaged was not said"
    assert lost == 2
    assert same
    record("11 newest checkpoint damaged", survived=True, lost=lost)


@pytest.mark.parametrize("text", ["", "{", '{"checkpoint": "step-00000099"}', None])
def test_latest_json_can_say_what_it_likes(
    text: str | None, killed: Job, start: Start, straight: Straight
) -> None:
    job = again(killed, start)
    latest = job.stage / "checkpoints" / "latest.json"
    if text is None:
        latest.unlink()
    else:
        latest.write_text(text)
    (attempt,) = job.go().attempts
    same = attempt.codes == [0, 0] and weights(job.run) == weights(straight(*SETTINGS).run)
    assert same, attempt.said
    assert "goes on from step 8" in attempt.printed()
    assert json.loads(latest.read_text())["checkpoint"] == "step-00000012"
    record("11 latest.json damaged", survived=True, lost=0)


def test_a_run_whose_checkpoints_are_all_damaged_refuses_to_start_over(killed: Job, start: Start) -> None:
    job = again(killed, start)
    for checkpoint, damage in zip(checkpoints(job), (flip, truncate, tear_manifest), strict=True):
        damage(checkpoint)
    (attempt,) = job.go().attempts
    refused = attempt.codes[0] == 1 and not job.story.of("step")
    assert refused, attempt.said
    assert "damaged" in attempt.printed()
    assert "Traceback" not in attempt.printed()
    record("11 all checkpoints damaged: refused", survived=True)


def test_a_flipped_token_is_not_trained_on(
    killed: Job, start: Start, shards: Path, straight: Straight
) -> None:
    job = again(killed, start)
    job.inputs = job.folder / "inputs"
    shutil.copytree(shards, job.inputs)
    (path,) = (job.inputs / "encode" / "train").glob("*.bin")
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    refused = job.attempt()
    said = f"{path} is damaged" in refused.printed() and refused.codes[0] == 1
    assert said, refused.said
    assert not job.story.of("step")
    data[1000] ^= 1
    path.write_bytes(data)
    (attempt,) = job.go().attempts[1:]
    same = attempt.codes == [0, 0] and weights(job.run) == weights(straight(*SETTINGS).run)
    assert same, attempt.said
    record("11 token shard damaged: refused", survived=True, lost=0)
