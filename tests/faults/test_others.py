"""Faults 7 and 20: a start that was given up wakes up again; a port that is taken; clocks that are wrong."""

import re
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.fault_table import record
from tests.faults.conftest import Start, Straight
from tests.faults.inject import Fault
from tests.faults.ranks import Attempt, weights
from tests.faults.test_layouts import losses

pytestmark = pytest.mark.faults

SETTINGS = ("checkpoint_interval=2", "checkpoint_background=false", "tokens=4096")  # 16 steps
DAY = 86_400.0


def frozen(attempt: Attempt) -> bool:
    """Whether all ranks have been stopped."""
    stats = [Path(f"/proc/{process.pid}/stat").read_text() for process in attempt.processes]
    states = [stat.rpartition(")")[2].split()[0] for stat in stats]
    return states == ["T"] * len(states)


@pytest.mark.parametrize("finishes", [True, False], ids=["finished", "training"])
def test_a_start_that_wakes_up_after_another_took_over_writes_nothing_more(
    finishes: bool, start: Start, straight: Straight
) -> None:
    job = start(*SETTINGS)
    before = {}

    def take_over(zombie: Attempt) -> None:
        deadline = time.monotonic() + 60
        while not frozen(zombie):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        newer = job.attempt([] if finishes else [Fault("forward", "kill", step=9)])
        assert newer.codes == ([0, 0] if finishes else [-9, -9]), newer.said
        before.update({path: path.stat().st_mtime_ns for path in job.stage.rglob("*") if path.is_file()})
        zombie.send(signal.SIGCONT)

    job.attempt([Fault("backward", "freeze", step=5)], watch=take_over)
    zombie = job.story.attempts[0]
    after = {path: path.stat().st_mtime_ns for path in job.stage.rglob("*") if path.is_file()}
    changed = {path.name for path in before | after if before.get(path) != after.get(path)}
    if not finishes:
        again = job.attempt()
        assert again.codes == [0, 0], again.said
    same = job.story.finished and weights(job.run) == weights(straight(*SETTINGS).run)
    refused = all(zombie.codes) and "writes nothing more" in zombie.said
    assert refused, zombie.said
    assert same
    assert not {name for name in changed if name.endswith((".safetensors", "manifest.json", "latest.json"))}
    assert not changed - {"metrics.jsonl", "heartbeat.json"}, changed
    record("7 zombie writer", survived=True, lost=0)


def test_a_port_that_is_taken_ends_one_attempt_and_not_the_run(start: Start, straight: Straight) -> None:
    job = start(*SETTINGS, "watch.start=10", patience=60.0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        job.variables = {"MASTER_PORT": str(taken.getsockname()[1])}
        attempt = job.attempt()
    assert attempt.codes[0], "rank 0 did not end"
    assert "cannot listen on port" in attempt.printed(), attempt.said
    job.variables = {}
    job.attempt()
    same = job.story.finished and weights(job.run) == weights(straight(*SETTINGS).run)
    assert same
    record("20 port taken", survived=True, lost=0, seconds=job.story.costs()[0][1])


@pytest.mark.parametrize(
    ("first", "second"), [(0.0, DAY), (DAY, 0.0), (DAY, -DAY)], ids=["rank 1", "rank 0", "both"]
)
def test_wrong_clocks_are_told_of_and_change_nothing(
    first: float, second: float, start: Start, straight: Straight
) -> None:
    """Nor do clocks that jump while the run trains, or is away."""
    job, reference = start(*SETTINGS), straight(*SETTINGS)

    def clocks(sign: int, at: str = "start", step: int = 0) -> list[Fault]:
        return [
            Fault(at, "clock", step, rank, sign * value)
            for rank, value in enumerate((first, second))
            if value
        ]

    job.go(
        [*clocks(1), *clocks(-2, "forward", 4), Fault("backward", "kill", step=7, rank=1)], then=[clocks(-1)]
    )
    story, difference = job.story, second - first
    assert story.finished, story.attempts[-1].said
    for attempt, apart in zip(story.attempts, (difference, -difference), strict=True):
        told = re.findall(r"preflight: the clock of \S+ is (\S+) s from that of .*rank 0", attempt.printed())
        assert len(told) == 1, attempt.printed()
        assert float(told[0]) == pytest.approx(apart, abs=60)
    assert "the clock of" not in reference.story.attempts[0].printed()
    assert weights(job.run) == weights(reference.run)
    assert story.samples() == reference.story.samples()
    assert losses(job) == losses(reference)
    assert not re.findall("ALARM|HUNG", "".join(attempt.said for attempt in story.attempts))
    ((lost, seconds),) = story.costs()
    assert lost <= 2
    record("20 wrong clock", survived=True, lost=lost, seconds=seconds)
