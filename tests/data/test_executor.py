"""Who does the tasks: the result is the same, and a killed worker costs nothing that was done."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from megachat.data.executor import Executor, Local, Ray
from megachat.data.steps import Record, Step, carry_out, folder


@dataclass(frozen=True)
class Squares(Step):
    """Each task writes the square of its number; `victim` is killed once."""

    victim: int = -1

    def work(self, task: int) -> Record:
        killed = self.folder / "killed"
        if task == self.victim and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        (self.folder / f"{task}.txt").write_text(str(task**2))
        return {"square": task**2}


def squares(at: Path, executor: Executor, victim: int = -1) -> Squares:
    step = Squares("squares", at, 7, victim)
    carry_out(step, executor)
    return step


@pytest.mark.slow
def test_processes_do_what_one_does(tmp_path: Path) -> None:
    for processes in (1, 2):
        step = squares(tmp_path / str(processes), Local(processes=processes))
        assert [record["square"] for record in step.records] == [0, 1, 4, 9, 16, 25, 36]


@pytest.mark.slow
def test_a_killed_process_is_told_of_and_the_same_command_goes_on(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a process was killed.*run the same command again.*processes=2"):
        squares(tmp_path, Local(processes=2), victim=3)
    done = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    step = squares(tmp_path, Local(processes=2), victim=3)
    assert [record["square"] for record in step.records] == [0, 1, 4, 9, 16, 25, 36]
    for name, time in done.items():  # what was done has not been done again
        assert (tmp_path / name).stat().st_mtime_ns == time


def test_a_share_of_an_array_does_its_own_tasks(tmp_path: Path) -> None:
    step = Squares("squares", tmp_path, 7)
    carry_out(step, Local(processes=1), (1, 3))
    assert step.missing() == [0, 2, 3, 5, 6]
    carry_out(step, Local(processes=1), (0, 3))
    carry_out(step, Local(processes=1), (2, 3))
    assert step.missing() == []


def test_a_folder_is_named_for_all_that_its_result_depends_on(tmp_path: Path) -> None:
    assert folder(tmp_path, "sign", {"a": 1, "b": 2}) == folder(tmp_path, "sign", {"b": 2, "a": 1})
    assert folder(tmp_path, "sign", {"a": 1}) != folder(tmp_path, "sign", {"a": 2})


@pytest.mark.slow
def test_ray_does_what_processes_do_and_does_again_what_was_lost(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    try:
        step = squares(tmp_path, Ray(address="local", cores=1, retries=3), victim=3)
        assert (tmp_path / "killed").exists()
        assert [record["square"] for record in step.records] == [0, 1, 4, 9, 16, 25, 36]
    finally:
        ray.shutdown()
