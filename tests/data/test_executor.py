"""Who does the tasks: the result is the same, and a killed worker costs nothing that was done."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megachat.data.executor import Executor, Local, Ray
from megachat.data.steps import Record, Step, carry_out, folder
from tests.tiny_run import environment

ROOT = Path(__file__).parents[2]


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


@dataclass(frozen=True)
class Waits(Step):
    """Each task says who does it, and waits until all may go on."""

    def work(self, task: int) -> Record:
        (self.folder / f"{os.getpid()}.at").touch()
        while not (self.folder / "go").exists():
            time.sleep(0.02)
        return {"task": task}


@dataclass(frozen=True)
class Fails(Step):
    """One task is killed whenever it is tried, or finds a mistake."""

    kill: bool

    def work(self, task: int) -> Record:
        if self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError(f"{self.folder.name}:7: not JSON; mend the line")


def runs(process: str) -> bool:
    """Whether there is such a process, and it has not ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def within(seconds: float, so: Callable[[], bool]) -> bool:
    """Whether something is so before the time is over."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if so():
            return True
        time.sleep(0.02)
    return so()


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
    for name, when in done.items():  # what was done has not been done again
        assert (tmp_path / name).stat().st_mtime_ns == when


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_who_works_for_a_process_that_is_killed_ends_with_it(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from megachat.data.executor import Local
from megachat.data.steps import carry_out
from tests.data.test_executor import Waits
carry_out(Waits("waits", Path(sys.argv[1]), 5), Local(processes=2))
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, env=environment(), cwd=ROOT) as parent:
        assert within(60, lambda: len([*tmp_path.glob("*.at")]) == 2)
        workers = [path.stem for path in tmp_path.glob("*.at")]
        assert all(map(runs, workers))
        parent.kill()
    try:
        assert within(10, lambda: not any(map(runs, workers)))
    finally:
        (tmp_path / "go").touch()  # or they would wait for ever
    step = Waits("waits", tmp_path, 5)
    assert step.missing() == [*range(5)]
    carry_out(step, Local(processes=1))
    assert step.records == [{"task": task} for task in range(5)]


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


def test_where_no_ray_answers_it_says_how_to_start_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")

    def nobody(*given: Any, **settings: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "init", nobody)
    away = Ray(address="auto", cores=1, retries=0)
    with pytest.raises(
        ValueError, match=r"address=auto: no Ray answers; start one with `ray start --head`, or"
    ):
        carry_out(Fails("none", tmp_path / "none", 1, kill=False), away)


@pytest.mark.slow
def test_ray_does_what_processes_do_and_does_again_what_was_lost(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    try:
        step = squares(tmp_path, Ray(address="local", cores=1, retries=3), victim=3)
        assert (tmp_path / "killed").exists()
        assert [record["square"] for record in step.records] == [0, 1, 4, 9, 16, 25, 36]
        once = Ray(address="local", cores=1, retries=0)
        with pytest.raises(ValueError, match=r"^a task was lost 1 times \(\w+\), perhaps for want of memory"):
            carry_out(Fails("fails", tmp_path / "lost", 1, kill=True), once)
        with pytest.raises(ValueError, match=r"^mistaken:7: not JSON; mend the line$"):
            carry_out(Fails("fails", tmp_path / "mistaken", 1, kill=False), once)
    finally:
        ray.shutdown()
