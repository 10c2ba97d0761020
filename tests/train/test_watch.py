"""A run that stands still is ended, and says which rank it waited for; a slow rank is named."""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megachat.parallel.mesh import HUNG, Mesh, start
from megachat.train import watch as module
from megachat.train.watch import State, Watch, Watching, ranks, slowest, verdict, who
from tests.fault_table import record
from tests.spawn import on_ranks
from tests.tiny_run import TINY, environment, make, rows

LIMITS = ["watch.hang=3", "watch.start=120", "watch.long=60", "tokens=10000000", "prefetch=0"]
"""Three seconds in a step, and a run that would last for hours."""

BLOCKED = """
import os
from megachat.train import pretrain
share = pretrain.share
def stuck(order, start, *place):
    if os.environ["RANK"] == "1" and start >= 4 * 8:
        {how}
    return share(order, start, *place)
pretrain.share = stuck
"""
"""Rank 1 does not come back from reading the data of step 5."""


class Ranks:
    """Processes that train together, started by hand."""

    def __init__(self, run: Path, inputs: Path, *overrides: str, world: int = 2, before: str = "") -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.folder, self.logs = run / "pretrain", []
        self.processes = []
        run.mkdir(parents=True)
        code = f"{before}\nfrom megachat.__main__ import main\nmain()"
        places = [f"run={run}", f"inputs={inputs}"]
        command = ["pretrain", "model=gpt_3m", *TINY, *LIMITS]
        for rank in range(world):
            self.logs.append(run / f"rank{rank}.log")
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            with self.logs[-1].open("w") as log:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-c", code, *command, *places, *overrides],
                        stdout=log, stderr=log, env=environment() | place,
                    )
                )  # fmt: skip

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 300
        while not (self.heartbeat() or {"step": 0})["step"] > step:
            assert all(process.poll() is None for process in self.processes), self.said(0) + self.said(1)
            assert time.monotonic() < deadline, "no progress"
            time.sleep(0.05)

    def heartbeat(self) -> dict[str, float] | None:
        path = self.folder / "heartbeat.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def end(self, rank: int) -> int:
        return self.processes[rank].wait(timeout=300)

    def said(self, rank: int) -> str:
        return self.logs[rank].read_text()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("watch") / "runs" / "inputs")


def waiting(rank: int, **changed: object) -> State:
    """A rank that has waited for 9 s in an all-reduce of step 7, of 5 s that it may."""
    usual = State(rank, "a", section="sum", step=7, moves=70, stood=9.0, limit=5.0, collective="all_reduce")
    return replace(usual, **changed)  # type: ignore[arg-type]


def test_the_culprit_is_silent_or_in_no_collective_or_behind() -> None:
    me = waiting(0)
    silent, busy = waiting(1, silent=4.0, stood=0.0), waiting(2, collective="")
    behind = waiting(3, section="forward", moves=67)
    for culprit, others in ((silent, [busy, behind]), (busy, [behind]), (behind, [])):
        assert who([me, culprit, *others], me, grace=3.0) == [culprit]
    assert who([me, waiting(1)], me, grace=3.0) == [me, waiting(1)]  # the connection between them, then


def test_a_rank_that_waits_for_a_slow_one_is_no_culprit() -> None:
    me, slow = waiting(0), waiting(1, collective="", section="save", stood=8.0, limit=60.0)
    assert who([me, slow], me, grace=3.0) == []
    assert who([me, waiting(1, collective="", stood=0.1)], me, grace=3.0) == []  # it moves


def test_the_verdict_names_who_waits_where() -> None:
    stuck = waiting(4, pid=11, collective="", section="backward", where="loop.py:3 in loss")
    states = [*(waiting(rank) for rank in range(4)), stuck, waiting(5, section="count", step=8)]
    assert verdict([stuck], states) == (
        "rank 4 (host a, pid 11) stands still in `backward` of step 7 for 9 s (loop.py:3 in loss); "
        "ranks 0-3 wait in all_reduce (`sum` of step 7); rank 5 waits in all_reduce (`count` of step 8)"
    )
    assert ranks([0, 1, 2, 5]) == "ranks 0-2, 5"


def test_the_slowest_is_compared_with_the_median_of_the_others() -> None:
    assert slowest([1.0, 2.0, 9.0]) == (2, 9.0, 1.5)
    assert slowest([3.0, 1.0]) == (0, 3.0, 1.0)


def test_the_first_long_part_may_take_as_long_as_later_ones() -> None:
    limits = Watching(start=30, hang=10, long=60, slow=0)
    watch = Watch(limits)
    found = {}
    for settled in (False, True):
        watch.settled = settled
        for watch.section in ("forward", "rollout"):
            found[settled, watch.section] = watch.limit()
    assert found == {
        (False, "forward"): 30,
        (False, "rollout"): 60,
        (True, "forward"): 10,
        (True, "rollout"): 60,
    }
    watch.settings, watch.settled = limits.model_copy(update={"long": 0}), False
    assert watch.limit() == math.inf


class SlowOnce:
    """A store that does not answer the first time."""

    def __init__(self, store: dist.Store) -> None:
        self.store, self.asked = store, 0

    def connect(self, _: timedelta) -> dist.Store:
        self.asked += 1
        if self.asked == 1:
            raise dist.DistNetworkError("timed out")
        return self.store


def test_a_rank_outlives_a_store_that_is_slow_once(monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = SlowOnce(dist.HashStore())
    monkeypatch.setattr(module, "meeting", lambda: meeting)
    limits = Watching.model_validate({"start": 0.8, "hang": 0.8, "long": 60.0, "slow": 0.0})
    with Watch(limits, Mesh(0, 2, 1, torch.device("cpu"), None, None)) as watch:
        keys, deadline = watch._keys, time.monotonic() + 60
        while not meeting.store.check(keys):  # rank 0 makes them all, so that nobody waits for one
            watch.at("forward")
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert json.loads(meeting.store.get(keys[1])) == {}
    assert meeting.asked == 2


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("where", ["pretrain.share", "pretrain.Pretrain.loss"])
def test_a_slow_rank_is_named_within_twenty_steps(inputs: Path, run: Path, where: str) -> None:
    slow = f"""
import os, time
from megachat.train import pretrain
usual = {where}
def slow(*arguments):
    time.sleep(0.2 if os.environ["RANK"] == "1" else 0.0)
    return usual(*arguments)
{where} = slow
"""
    with Ranks(run, inputs, "max_steps=20", "log.interval=5", before=slow) as both:
        assert (both.end(0), both.end(1)) == (0, 0), both.said(0) + both.said(1)
        pid = both.processes[1].pid
        found = re.findall(rf"SLOW: (rank 1) \(host \S+, pid {pid}\) .* as of step (\d+);", both.said(0))
    assert found, both.said(0)
    assert found[0][1] in ("10", "20")
    assert "SLOW" not in both.said(1)
    last = rows(run)[-1]
    assert last["watch/slowest_rank"] == 1
    assert last["watch/slowest_ratio"] > 1.5
    record("18 a slow rank", survived=True, lost=0)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_rank_is_named_by_the_other_which_ends(inputs: Path, run: Path, frozen: int) -> None:
    with Ranks(run, inputs) as both:
        both.wait_for_step(3)
        both.processes[frozen].send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        other = 1 - frozen
        assert both.end(other) == HUNG, both.said(other)
        seconds = time.monotonic() - begun
        said = both.said(other)
    pid = both.processes[frozen].pid
    if frozen == 1:
        stuck = rf"rank 1 \(host \S+, pid {pid}\), last heard of in `\w+` of step \d+, does not answer"
        assert re.search(rf"HUNG: {stuck}.*; rank 0 waits in \w+ \(`\w+` of step \d+\); ending", said), said
    else:
        assert re.search(
            rf"HUNG: rank 1 .*; rank 0 \(host \S+, pid {pid}\), where all ranks meet, does not answer", said
        )
    assert "Current thread" in said or "Thread 0x" in said, said
    assert seconds < 30
    record("2 a rank is frozen", survived=True, seconds=seconds)


@pytest.mark.slow
@pytest.mark.faults
def test_a_rank_that_waits_for_the_disk_is_named_with_the_place(
    inputs: Path, run: Path, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "disk")
    with Ranks(run, inputs, before=BLOCKED.format(how=f"open({str(tmp_path / 'disk')!r}).read()")) as both:
        begun = time.monotonic()
        assert (both.end(0), both.end(1)) == (HUNG, HUNG), both.said(0) + both.said(1)
        seconds = time.monotonic() - begun
        said = [both.said(0), both.said(1)]
    pid = both.processes[1].pid
    stuck = rf"rank 1 \(host \S+, pid {pid}\) stands still in `data` of step 5 for \d+ s"
    stuck += r" \(\w+\.py:\d+ in \w+\)"  # where it waits for the thread that reads, or reads itself
    assert len(re.findall("HUNG: ", said[0] + said[1])) == 1, said
    assert re.search(
        rf"HUNG: {stuck}; rank 0 waits in all_reduce \(`count` of step 5\); ending", said[0] + said[1]
    ), said
    assert re.search(r'File "<string>", line \d+ in stuck', said[1]), said[1]
    beat = both.heartbeat()
    assert beat is not None
    assert beat["pid"] == both.processes[0].pid
    assert beat["time"] < time.time() - 3, "it was written by somebody who does not train"
    record("3 a rank waits for the disk", survived=True, seconds=seconds)


@pytest.mark.slow
@pytest.mark.faults
def test_a_rank_that_holds_pythons_lock_in_c_is_named_by_the_other(inputs: Path, run: Path) -> None:
    how = "import ctypes; ctypes.PyDLL(None).sleep(600)"
    with Ranks(run, inputs, before=BLOCKED.format(how=how)) as both:
        begun = time.monotonic()
        assert both.end(0) == HUNG, both.said(0)
        record("4 a rank holds the GIL", survived=True, seconds=time.monotonic() - begun)
        assert re.search(r"HUNG: rank 1 .* does not answer any more: .* holds Python's lock", both.said(0)), (
            both.said(0)
        )


LAUNCH = """
import sys
from pathlib import Path
from megachat.parallel.mesh import launch
sys.exit(launch(sys.argv[2:], 2, Path(sys.argv[1])))
"""


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("frozen", ["one", "all"])
def test_the_launcher_ends_when_ranks_are_frozen(inputs: Path, run: Path, frozen: str) -> None:
    beat = run / "pretrain" / "heartbeat.json"
    limits = ["watch.hang=3", "watch.start=120", "watch.long=60", "tokens=10000000"]
    overrides = ["pretrain", "model=gpt_3m", *TINY, *limits, f"run={run}", f"inputs={inputs}"]
    command = [sys.executable, "-c", LAUNCH, str(beat), *overrides]
    parent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
    try:
        deadline = time.monotonic() + 300
        while not (beat.is_file() and json.loads(beat.read_text())["settled"]):
            assert time.monotonic() < deadline, "no progress"
            assert parent.poll() is None, parent.communicate()[1]
            time.sleep(0.1)
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        ranks_there = [int(number) for number in children]
        first = json.loads(beat.read_text())["pid"]
        for pid in ranks_there if frozen == "all" else [pid for pid in ranks_there if pid != first]:
            os.kill(pid, signal.SIGSTOP)
        begun = time.monotonic()
        _, said = parent.communicate(timeout=120)
        record("2 frozen ranks, seen by the launcher", survived=True, seconds=time.monotonic() - begun)
    finally:
        parent.kill()
    assert parent.returncode == HUNG, said
    words = "rank 0 stands in" if frozen == "all" else "HUNG: rank 1 "
    assert words in said, said
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks_there)


@on_ranks(2)
def test_a_rank_is_named_that_has_no_quick_step_twice_in_a_row() -> None:
    mesh, said = start(1), list[str]()
    module.say = said.append
    limits = Watching.model_validate({"start": 0.0, "hang": 0.0, "long": 0.0, "slow": 1.5})
    watch = Watch(limits, mesh)

    def ten_steps(last: int, seconds: list[float]) -> None:
        for step in range(last - 9, last + 1):
            own = seconds[step % len(seconds)] if mesh.rank else 0.1
            watch.split.total["forward"] = watch.split.total.get("forward", 0.0) + own
            watch.stepped(step)

    ten_steps(10, [0.9, 0.9, 0.9, 0.1])  # somebody else uses its processor
    ten_steps(20, [0.3])
    ten_steps(30, [0.1])
    ten_steps(40, [0.3])
    assert not said
    assert watch.figures == {"watch/slowest_rank": 1, "watch/slowest_ratio": pytest.approx(3.0)}
    ten_steps(50, [0.3])
    assert len(said) == (mesh.rank == 0)
    assert all("SLOW: rank 1 (" in line and "3.0x the others' time" in line for line in said)
