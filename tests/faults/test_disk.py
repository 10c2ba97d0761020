"""Fault 12: a disk that is full, broken, or slow. The run goes on, says so, and keeps the last good one."""

import errno
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fault_table import record
from tests.faults.conftest import Start, Straight
from tests.faults.inject import Fault
from tests.faults.ranks import Job, weights

pytestmark = pytest.mark.faults

SETTINGS = ("checkpoint_interval=2", "checkpoint_background=false")
RARELY = ("checkpoint_interval=4", "checkpoint_keep=1")


def goes_on(name: str, job: Job, straight: Straight, *alarms: int) -> None:
    """The one attempt finished, having said that the checkpoints of these steps could not be written."""
    (attempt,) = job.story.attempts
    same = attempt.codes == [0, 0] and weights(job.run) == weights(straight(*job.settings).run)
    assert same, attempt.said
    said = [int(step) for step in re.findall(r"ALARM: the checkpoint of step (\d+)", attempt.printed())]
    assert sorted(set(said)) == [*alarms], attempt.said
    assert not list((job.stage / "checkpoints").glob("*.tmp"))
    record(name, survived=True, lost=0)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_goes_on_when_a_shard_does_not_fit(rank: int, start: Start, straight: Straight) -> None:
    job = start(*SETTINGS)
    full = Fault("stepped", "full", step=4, rank=rank, value=100_000)
    job.go(then=[(full, Fault("stepped", "unlimit", step=7, rank=rank))])
    goes_on("12 disk full", job, straight, 4, 6)


@pytest.mark.parametrize("point", ["save:folder", "save:shard", "save:manifest", "save:rename"])
def test_a_run_goes_on_when_the_disk_is_broken_for_a_while(
    point: str, start: Start, straight: Straight
) -> None:
    job = start(*SETTINGS)
    job.go(then=[[Fault(point, "io", step=6, value=errno.EIO)]])
    goes_on("12 disk broken", job, straight, 6)


def test_a_run_waits_for_a_slow_disk(start: Start, straight: Straight) -> None:
    job = start(*SETTINGS)
    job.go(then=[[Fault("save:shard", "sleep", step=4, rank=1, value=3.0)]])
    goes_on("12 disk slow", job, straight)


@pytest.fixture
def small_disk(tmp_path: Path, straight: Straight) -> Iterator[Path]:
    """A file system that holds one checkpoint, and not two."""
    folder = tmp_path / "small"
    folder.mkdir()
    one = max((straight(*RARELY).stage / "checkpoints").glob("step-*"))
    size = 3 * sum(path.stat().st_size for path in one.iterdir()) // 2
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "small", str(folder)]
    if os.geteuid() or subprocess.run(mount, check=False).returncode:
        pytest.skip("only root can mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_on_a_file_system_that_is_full_the_first_checkpoint_stays_and_training_ends(
    small_disk: Path, start: Start, straight: Straight
) -> None:
    job = start(*RARELY)
    job.stage.mkdir(parents=True)
    (job.stage / "checkpoints").symlink_to(small_disk)
    job.go()
    (attempt,) = job.story.attempts
    trained = max(line["step"] for line in job.story.of("step"))
    assert "ALARM" in attempt.printed()
    assert trained == 12, attempt.said
    assert attempt.codes[0] == 1, "the final checkpoint could not be written"
    assert [path.name for path in small_disk.glob("step-*")] == ["step-00000004"]
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)  # somebody makes room
    again = job.attempt()
    assert again.codes == [0, 0], again.said
    assert "goes on from step 4" in again.printed()
    assert weights(job.run) == weights(straight(*job.settings).run)
    ((lost, _),) = job.story.costs()
    assert lost == 8
    record("12 file system full", survived=True, lost=lost)
