"""Where a rank computes, how ranks meet, and what becomes of those that do not come."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest

from megachat.parallel import mesh as module
from megachat.parallel.mesh import (
    HUNG,
    TAKEN,
    UNFIT,
    Pulse,
    Unfit,
    free_port,
    launch,
    must_have_all,
    must_have_none,
)
from tests.spawn import on_ranks
from tests.tiny_run import environment


def test_training_on_the_cpu_of_a_gpu_node_takes_an_explicit_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.setattr("torch.version.cuda", None)
    with pytest.raises(ValueError, match=r"sees none; `bash tools/setup\.sh gpu`"):
        must_have_none()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    must_have_none()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "0")
    monkeypatch.setattr("torch.version.cuda", "13.0")
    must_have_none()


def test_a_node_whose_gpus_have_died_is_unfit(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "4")
    monkeypatch.setattr("torch.version.cuda", "13.0")
    with pytest.raises(Unfit, match="CUDA finds none"):
        must_have_none()
    must_have_all(4)
    with pytest.raises(Unfit, match="CUDA finds 3 of the 4 GPUs"):
        must_have_all(3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")  # its own alone
    must_have_all(1)


LEAVE = """
import atexit
import torch.distributed as dist
atexit.register(lambda: print(dist.is_initialized()))  # what is registered first comes last
from megachat.parallel.mesh import start
start(1)
print(dist.is_initialized())
raise SystemExit(75)
"""


@pytest.mark.slow
def test_the_group_is_left_before_python_ends_and_the_exit_code_stays() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEAVE], env=environment(), capture_output=True, text=True, check=False
    )
    assert (done.stdout.split(), done.returncode) == (["True", "False"], 75), done.stderr


MEET = """
import sys
from megachat.parallel import mesh
try:
    mesh.start(1, patience=float(sys.argv[1]))
except OSError as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(getattr(error, "exit_code", 1))
print("met", mesh.meeting().leader)
"""


def rank(number: int, world: int, port: int, patience: float = 8) -> subprocess.Popen[str]:
    place = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(world)}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", MEET, str(patience)]
    return subprocess.Popen(command, env=environment() | place, text=True, stdout=subprocess.PIPE)


@pytest.mark.slow
def test_ranks_that_do_not_come_are_named_and_those_that_have() -> None:
    port = free_port()
    second = rank(2, 4, port, patience=200)  # begins first: on a busy machine a start takes long
    came = [rank(0, 4, port, patience=20), second]
    for process in came:
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 1, said
        here = rf"host {re.escape(socket.gethostname())}, pid"
        places = rf"rank 0 on {here} {came[0].pid}; rank 2 on {here} {came[1].pid}"
        assert re.search(rf"2 of 4 ranks have come in 20 s; missing: 1, 3\. Came: {places}\.", said), said


@pytest.mark.slow
def test_a_rank_that_cannot_reach_the_first_says_where_it_looked() -> None:
    port = free_port()
    alone = rank(1, 2, port, patience=2)
    said, _ = alone.communicate(timeout=120)
    assert f"rank 1 (host {socket.gethostname()}, pid {alone.pid}) could not reach rank 0 at" in said, said
    assert f"MASTER_ADDR=127.0.0.1, MASTER_PORT={port} in 2 s" in said, said


@pytest.mark.slow
def test_a_port_that_is_taken_is_told_from_other_failures() -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        first = rank(0, 2, port)
        said, _ = first.communicate(timeout=120)
    assert first.returncode == TAKEN, said
    assert f"PortTaken: rank 0 (host {socket.gethostname()}, pid {first.pid}) cannot listen on" in said
    assert "start again with another MASTER_PORT" in said


@on_ranks(2)
def test_every_rank_gives_a_number() -> None:
    from megachat.parallel.mesh import place, start

    mesh = start(1)
    assert mesh.each(mesh.rank + 0.5) == [0.5, 1.5]
    assert place(mesh.rank).endswith(f"pid {os.getpid()}")
    mesh.barrier()  # rank 0 holds the store that the other one asks


@on_ranks(2)
def test_all_groups_wait_as_long_as_they_are_told() -> None:
    import torch
    import torch.distributed as dist

    from megachat.parallel.mesh import be_patient, start

    mesh = start(1, timeout=timedelta(seconds=700))
    own = dist.new_group([0, 1])  # as DeepSpeed makes them

    def limits() -> list[float]:
        groups = (dist.group.WORLD, mesh.data_group, own)
        return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]

    assert limits()[:2] == [700.0, 700.0]
    be_patient(timedelta(seconds=1))
    begun = time.monotonic()
    if mesh.rank == 0:
        with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
            dist.barrier(own)
        assert time.monotonic() - begun < 100
    else:
        time.sleep(5)


@pytest.mark.parametrize(
    ("endings", "code"),
    [
        (["sys.exit(1)", "sys.exit(70)"], UNFIT),
        (["sys.exit(70)", "sys.exit(87)"], HUNG),
        (["os.kill(os.getpid(), 9)", "sys.exit(3)"], 3),
        (["os.kill(os.getpid(), 9)", "time.sleep(100)"], 128 + 9),
        (["sys.exit(0)", "sys.exit(0)"], 0),
    ],
)
def test_the_launcher_returns_the_code_that_says_most(
    endings: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    cases = "\n".join(f"if os.environ['RANK'] == '{rank}': {how}" for rank, how in enumerate(endings))
    python.write_text(f"#!{sys.executable}\nimport os, sys, time\n{cases}\n")
    python.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(python))
    assert launch([], len(endings)) == code


def test_the_launcher_sees_a_heartbeat_that_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    path = tmp_path / "heartbeat.json"
    pulse = Pulse(path, pid=5)
    beat = {"step": 3, "section": "forward", "limit": 4.0, "pid": 5, "time": 1}
    path.write_text(json.dumps(beat))
    assert pulse.stopped() == ""
    now = 8.0
    assert pulse.stopped() == ""
    now = 9.0
    assert pulse.stopped() == "rank 0 stands in `forward` of step 3 for 9 s"
    path.write_text(json.dumps(beat | {"time": 2}))
    assert pulse.stopped() == ""
    now = 1000.0  # the launcher itself was frozen
    assert pulse.stopped() == ""
    path.write_text(json.dumps(beat | {"pid": 6}))  # of an earlier attempt
    assert pulse.stopped() == ""
    now = 1009.0
    assert pulse.stopped() == ""
    now = 1018.0
    assert pulse.stopped() == ""
