"""When the ranks of a job are taken to hang; the clock is the test's."""

import json
import os
from pathlib import Path

from megachat.slurm.heartbeat import PAUSE, Limits, Watch


class Clock:
    """Shows what it is set to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Scene:
    """A watch over a heartbeat that the test beats."""

    def __init__(self, folder: Path) -> None:
        self.path, self.clock, self.beats = folder / "heartbeat.json", Clock(), 0
        self.watch = Watch(self.path, Limits(start=100.0, step=20.0), self.clock)

    def beat(self, step: int, section: str = "forward", **more: object) -> None:
        self.beats += 1
        self.path.write_text(json.dumps({"step": step, "section": section, **more}))
        os.utime(self.path, ns=(self.beats, self.beats))  # a node's clock that is decades behind

    def at(self, now: float) -> str:
        """What it says at a time, having looked every ten seconds until then."""
        said = self.watch.hung()
        while self.clock.now < now and not said:
            self.clock.now = min(now, self.clock.now + 10)
            said = self.watch.hung()
        return said


def test_before_the_first_sign_of_life_there_is_patience(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    assert scene.at(100) == ""
    assert scene.at(110) == "no sign of life for 100 s, before the first one"


def test_the_first_step_may_take_as_long(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.beat(0)
    assert scene.at(100) == ""
    scene.beat(0, "backward")
    assert scene.at(200) == ""
    assert scene.at(210) == "no sign of life for 100 s, the last in 'backward' at step 0"


def test_later_a_shorter_standstill_is_a_hang(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    for step in range(5):
        scene.beat(step)
        assert scene.at(20 * step + 20) == ""
    assert scene.at(200) == "no sign of life for 20 s, the last in 'forward' at step 4"


def test_the_heartbeat_of_an_earlier_attempt_is_none(tmp_path: Path) -> None:
    before = Scene(tmp_path)
    before.beat(7)
    scene = Scene(tmp_path)
    assert scene.at(200) == "no sign of life for 100 s, before the first one"


def test_a_job_that_was_suspended_does_not_hang(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    for step in range(3):
        scene.beat(step)
        scene.at(10 * step)
    scene.clock.now += PAUSE + 1000  # nobody looked
    assert scene.watch.hung() == ""
    assert scene.at(scene.clock.now + 20) == ""
    assert scene.at(scene.clock.now + 10) != ""


def test_half_a_file_is_a_sign_of_life(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    for step in range(3):
        scene.beat(step)
        scene.at(10 * step)
    scene.path.write_text('{"step": ')
    assert scene.at(scene.clock.now + 20) == ""


def test_what_is_no_part_of_a_step_has_the_time_that_the_rank_says(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    for step in range(2):
        scene.beat(step)
    scene.at(10)
    scene.beat(2, "rollout", limit=300, long=True)
    assert scene.at(360) == ""
    assert "the last in 'rollout'" in scene.at(400)


def test_a_first_step_that_has_begun_is_not_over(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.beat(0, "prepare", settled=False)
    scene.at(10)
    scene.beat(1, "forward", settled=False)
    assert scene.at(90) == ""
    scene.beat(2, "forward", settled=True)
    assert "the last in 'forward' at step 2" in scene.at(130)
