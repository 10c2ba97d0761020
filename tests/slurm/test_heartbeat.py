"""When the ranks of a job are taken to hang; the clock is the test's."""

import json
import os
from pathlib import Path

import pytest

from megachat.slurm.heartbeat import MARGIN, PAUSE, Limits, Watch


class Clock:
    """Shows what it is set to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Scene:
    """A watch over a heartbeat that the test beats."""

    def __init__(self, folder: Path, hang: float | None = 20.0) -> None:
        self.path, self.clock, self.beats = folder / "heartbeat.json", Clock(), 0
        self.watch = Watch(self.path, Limits(start=100.0, hang=hang), self.clock)

    def beat(self, step: int, section: str = "forward", **more: object) -> None:
        self.beats += 1
        self.path.write_text(json.dumps({"step": step, "section": section, **more}))
        os.utime(self.path, ns=(self.beats, self.beats))  # a node's clock that is decades behind

    def after(self, seconds: float) -> str:
        """What it says then, having looked every ten seconds."""
        until, said = self.clock.now + seconds, self.watch.hung()
        while self.clock.now < until and not said:
            self.clock.now = min(until, self.clock.now + 10)
            said = self.watch.hung()
        return said


def test_before_the_first_sign_of_life_there_is_patience(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    assert scene.after(100) == ""
    assert scene.after(10) == "no sign of life for 100 s: there was none"


def test_later_a_shorter_standstill_is_a_hang(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    for step in range(5):
        scene.beat(step)
        assert scene.after(20) == ""
    assert scene.after(10) == "no sign of life for 20 s: the last was in 'forward' at step 4"


@pytest.mark.parametrize("limit", [5.0, 500.0])
def test_where_nothing_else_is_said_the_ranks_own_limit_counts_and_a_margin(
    limit: float, tmp_path: Path
) -> None:
    scene = Scene(tmp_path, hang=None)
    scene.beat(3, "save", limit=limit)
    assert scene.after(limit + MARGIN) == ""
    assert scene.after(10) == f"no sign of life for {limit + MARGIN:g} s: the last was in 'save' at step 3"


def test_ranks_without_a_limit_may_take_for_ever(tmp_path: Path) -> None:
    scene = Scene(tmp_path, hang=None)
    scene.beat(3)
    assert scene.after(1e6) == ""


def test_the_heartbeat_of_an_earlier_attempt_is_none(tmp_path: Path) -> None:
    Scene(tmp_path).beat(7)
    assert Scene(tmp_path).after(200) == "no sign of life for 100 s: there was none"


def test_a_job_that_was_suspended_does_not_hang(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.beat(1)
    assert scene.after(10) == ""
    scene.clock.now += PAUSE + 1000  # nobody looked
    assert scene.after(20) == ""
    assert scene.after(10) != ""


def test_half_a_file_is_a_sign_of_life(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.beat(1)
    assert scene.after(20) == ""
    scene.path.write_text('{"step": ')
    assert scene.after(20) == ""


def test_what_is_no_part_of_a_step_has_the_time_that_the_rank_says(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.beat(2, "rollout", limit=300.0, long=True)
    assert scene.after(360) == ""
    assert "the last was in 'rollout'" in scene.after(10)


def test_so_has_the_first_step_until_it_is_over(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.beat(1, "forward", limit=300.0, settled=False)
    assert scene.after(360) == ""
    scene.beat(2, "forward", limit=300.0, settled=True)
    assert scene.after(20) == ""
    assert "the last was in 'forward' at step 2" in scene.after(10)
