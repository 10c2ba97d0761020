"""Which process am I? Ranks on a data x tensor grid, started by plain python, torchrun, or srun.

Tensor-parallel ranks are neighbours (rank = data_rank * tensor + tensor_rank), so that they share a machine's
fast links. A process started without `RANK` and outside Slurm makes one rank for each visible GPU; on a CPU,
one in all.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""How long a collective may wait for a slow rank, for example one that is writing a checkpoint."""


def adopt_slurm() -> None:
    """Under `srun`, RANK and its friends follow from Slurm's own variables."""
    step = os.environ
    if "RANK" in step or "SLURM_PROCID" not in step or "SLURM_STEP_ID" not in step:
        return
    os.environ |= {
        "RANK": step["SLURM_PROCID"],
        "WORLD_SIZE": step["SLURM_NTASKS"],
        "LOCAL_RANK": step["SLURM_LOCALID"],
        "MASTER_ADDR": step.get("MASTER_ADDR", step.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")),
        "MASTER_PORT": step.get("MASTER_PORT", str(20000 + int(step["SLURM_JOB_ID"]) % 10000)),
    }


def expected_world() -> int:
    """How many processes this job has, or will have once it is launched on this machine's visible GPUs."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    if "SLURM_STEP_ID" in os.environ:
        return int(os.environ["SLURM_NTASKS"])
    return max(1, torch.cuda.device_count())


def divisors(number: int) -> list[int]:
    """All of them, in order. Example: divisors(6) -> [1, 2, 3, 6]"""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def launch(arguments: Sequence[str], processes: int) -> int:
    """Starts `python -m megachat <arguments>` once per rank on this machine and waits for all of them.

    Signals are passed on. When one rank fails the others are stopped, and its exit code is returned.
    """
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "megachat", *arguments],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]
    with passing_on_signals(ranks):
        while True:
            codes = [rank.poll() for rank in ranks]
            failed = next((code for code in codes if code), None)
            if failed is not None or all(code == 0 for code in codes):
                return failed or 0
            time.sleep(0.1)


@contextmanager
def passing_on_signals(children: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Meanwhile a signal to this process reaches the children instead; none of them is left behind.

    Ctrl-C reaches them by itself when they share the terminal, so it is passed on as SIGTERM.
    """

    def pass_on(number: int, _: Any) -> None:
        for child in children:
            child.send_signal(signal.SIGTERM if number == signal.SIGINT else number)

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    previous = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield
    finally:
        for child in children:
            child.terminate()
        deadline = time.monotonic() + 30
        for child in children:
            try:
                child.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Mesh:
    """This process's place on the data x tensor grid, and the few collectives the rest of the code needs."""

    rank: int
    world: int
    tensor: int
    device: torch.device
    data_group: Any
    """Ranks that hold the same slice of the model and read different data."""
    tensor_group: Any
    """Ranks that hold different slices of the model and read the same data."""

    @property
    def data(self) -> int:
        """How many data-parallel ranks there are."""
        return self.world // self.tensor

    @property
    def data_rank(self) -> int:
        return self.rank // self.tensor

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor

    def sum(self, value: float) -> float:
        """The sum of a number over the data ranks, in double precision."""
        return self.sum_tensor(torch.tensor(value, dtype=torch.float64)).item()

    def sum_tensor(self, value: Tensor) -> Tensor:
        """The elementwise sum of a tensor over the data ranks."""
        if self.data == 1:
            return value
        there = value.to(self.device)
        dist.all_reduce(there, group=self.data_group)
        return there.to(value.device)

    def any(self, flag: bool) -> bool:
        """Whether any rank says so; all ranks get the same answer."""
        if self.world == 1:
            return flag
        there = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(there, op=dist.ReduceOp.MAX)
        return bool(there.item())

    def all(self, flag: bool) -> bool:
        """Whether every rank says so; all ranks get the same answer."""
        return not self.any(not flag)

    def gather(self, value: Any) -> list[Any]:
        """One plain Python value from every rank, in order of rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def first(self, value: T) -> T:
        """What rank 0 gives, on every rank; what the others give is dropped."""
        if self.world == 1:
            return value
        told = [value]
        dist.broadcast_object_list(told, src=0)
        return told[0]

    def barrier(self) -> None:
        """Waits for every rank."""
        if self.world > 1:
            dist.barrier()


def must_have_none() -> None:
    """Refuses to train on the CPU where torch does not see the GPUs, unless they are hidden on purpose."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    given = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
    if not hidden and (given or (torch.version.cuda is None and Path("/dev/nvidia0").exists())):
        raise ValueError(
            f"this machine has GPUs, but torch {torch.__version__} sees none; `bash tools/setup.sh gpu` "
            "installs one that does, `nvidia-smi` tells whether the driver works, "
            "and CUDA_VISIBLE_DEVICES=-1 trains on the CPU"
        )


_current: Mesh | None = None


def start(tensor: int) -> Mesh:
    """Joins the process group and returns this rank's place. A process stays in the mesh it first joined."""
    global _current
    if _current is not None:
        assert _current.tensor == tensor, "one process cannot change its tensor-parallel degree"
        return _current
    adopt_slurm()
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    assert world % tensor == 0, (
        f"tensor={tensor} does not divide {world} processes"
    )  # the config door has checked
    if torch.cuda.is_available():
        # Slurm may show each task its own GPU only, as device 0.
        device = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed picks the GPU by it
    else:
        must_have_none()
        device = torch.device("cpu")
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    data_group = tensor_group = None
    for t in range(tensor):
        ranks = list(range(t, world, tensor))
        group = dist.new_group(ranks)
        data_group = group if rank in ranks else data_group
    for first in range(0, world, tensor):
        ranks = list(range(first, first + tensor))
        group = dist.new_group(ranks)
        tensor_group = group if rank in ranks else tensor_group
    _current = Mesh(rank, world, tensor, device, data_group, tensor_group)
    return _current
