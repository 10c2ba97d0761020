"""Which process am I? Ranks on a data x sequence x tensor grid, started by plain python, torchrun, or srun.

Ranks that share a model or a row are neighbours (rank = (data_rank * sequence + sequence_rank) * tensor +
tensor_rank), so that they share a machine's fast links. A process started without `RANK` and outside Slurm
makes one rank for each visible GPU; on a CPU, one in all.
"""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megachat.log import say

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""How long a collective may wait for a slow rank where nobody watches (megachat/train/watch.py)."""
FOREVER = timedelta(days=24)
"""The longest wait that torch can be told of: in places it counts milliseconds in 32 bits."""

UNFIT = 70
"""The exit code of ranks whose node failed the checks before training (megachat/parallel/preflight.py)."""
HUNG = 87
"""The exit code of a process that was ended because the run stood still."""
TAKEN = 75
"""The exit code for a port that somebody else has: starting again with another one helps."""


class PortTaken(OSError):
    """Somebody else listens where rank 0 was told to."""

    exit_code = TAKEN


class Unfit(OSError):
    """This node cannot take part: the run may go on without it."""

    exit_code = UNFIT


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


def launch(arguments: Sequence[str], processes: int, heartbeat: Path | None = None) -> int:
    """Starts `python -m megachat <arguments>` once per rank on this machine and waits for all of them.

    Signals are passed on. When one rank fails the others are stopped, and the exit code that says most is
    returned; for a rank that was killed 128 + the signal, as in a shell. They are started anew when somebody
    else was quicker to take their port, and killed when `heartbeat` stands still.
    """
    for _ in range(3):
        code = _launch_once(arguments, processes, heartbeat)
        if code != TAKEN:
            break
    return code


def _launch_once(arguments: Sequence[str], processes: int, heartbeat: Path | None) -> int:
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "megachat", *arguments], env=environment_of(rank, processes, port)
        )
        for rank in range(processes)
    ]
    pulse = None if heartbeat is None else Pulse(heartbeat, ranks[0].pid)
    with passing_on_signals(ranks):
        while True:
            codes = [rank.poll() for rank in ranks]
            failed = next((code for code in codes if code), None)
            stopped = pulse.stopped() if pulse is not None and failed is None else ""
            if stopped:  # each rank watches the others, so that all must have stopped together
                print(f"HUNG: {stopped}; the ranks are killed", file=sys.stderr)
            if failed == HUNG or stopped:
                _kill(ranks, 0.0 if stopped else 15.0)  # one that is frozen would not stop when asked to
                return HUNG
            if failed is not None:
                return _telling(ranks)
            if all(code == 0 for code in codes):
                return 0
            time.sleep(0.1)


def environment_of(rank: int, world: int, port: int) -> dict[str, str]:
    """What makes a process a rank among `world` on this machine."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    return {**os.environ, "MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}}


def _telling(ranks: Sequence[subprocess.Popen[bytes]], patience: float = 2.0) -> int:
    """The exit code that says most of those that failed: the others often end of the first one's failure."""
    deadline = time.monotonic() + patience
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = [code for code in codes if code]
        found = next((code for code in (HUNG, UNFIT, TAKEN) if code in failed), None)
        if found is not None:
            return found
        if time.monotonic() > deadline or None not in codes:
            return next((code for code in failed if code > 0), 128 - failed[0])
        time.sleep(0.1)


def _kill(children: Sequence[subprocess.Popen[bytes]], patience: float) -> None:
    deadline = time.monotonic() + patience
    while any(child.poll() is None for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    for child in children:
        child.kill()


class Pulse:
    """Whether rank 0, which rewrites its `heartbeat.json` as it gets on, has stopped doing so."""

    SLACK = 60.0
    """Seconds beyond the limit that the file itself names: the ranks' own watch comes first."""

    def __init__(self, path: Path, pid: int) -> None:
        self.path, self.pid = path, pid
        self.text, self.since, self.looked = "", time.monotonic(), time.monotonic()

    def stopped(self) -> str:
        """Where it stands, once that has lasted too long."""
        now = time.monotonic()
        if now - self.looked > 10:  # this process was frozen itself
            self.since = now
        self.looked = now
        try:
            text = self.path.read_text(encoding="utf-8")
            beat = json.loads(text)
            if text != self.text or beat["pid"] != self.pid:
                self.text, self.since = text, now
            limit = beat["limit"]
        except (OSError, ValueError, KeyError, TypeError):
            return ""
        if limit is None or now - self.since <= limit + min(limit, self.SLACK):
            return ""
        return f"rank 0 stands in `{beat['section']}` of step {beat['step']} for {now - self.since:.0f} s"


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
    """This process's place on the data x sequence x tensor grid, and the few collectives that the rest of the
    code needs."""

    rank: int
    world: int
    tensor: int
    device: torch.device
    data_group: Any
    """Ranks that hold the same slice of the model and read the same place of different rows."""
    tensor_group: Any
    """Ranks that hold different slices of the model and read the same data."""
    sequence: int = 1
    sequence_group: Any = None
    """Ranks that hold the same slice of the model and read different tokens of the same rows."""
    replica_group: Any = None
    """Ranks that hold the same slice of the model, over which ZeRO shards it."""

    @property
    def data(self) -> int:
        """How many data-parallel ranks there are."""
        return self.world // (self.tensor * self.sequence)

    @property
    def data_rank(self) -> int:
        return self.rank // (self.tensor * self.sequence)

    @property
    def replicas(self) -> int:
        """How many ranks hold the same slice of the model."""
        return self.world // self.tensor

    @property
    def replica_rank(self) -> int:
        return self.rank // self.tensor

    @property
    def sequence_rank(self) -> int:
        return self.replica_rank % self.sequence

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

    def join(self, own: Tensor, places: range, count: int) -> Tensor:
        """All of `count` rows, of which this data rank has those of `places` and the others the rest."""
        if self.data == 1:
            return own
        rows = own.new_zeros(count, *own.shape[1:])
        rows[places.start : places.stop] = own
        return self.sum_tensor(rows)

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

    def collect(self, value: Any) -> list[Any]:
        """`gather` for rank 0 alone, which spares the others the memory; they get nothing."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world if self.rank == 0 else []
        dist.gather_object(value, values if self.rank == 0 else None, dst=0)
        return values

    def first(self, value: T) -> T:
        """What rank 0 gives, on every rank; what the others give is dropped."""
        if self.world == 1:
            return value
        told = [value]
        dist.broadcast_object_list(told, src=0)
        return told[0]

    def lead(self, action: Callable[[], T]) -> T:
        """What `action` returns on rank 0, on every rank; so is its error, of the disk or of a value."""
        done: T | None = None
        failed: OSError | ValueError | None = None
        if self.rank == 0:
            try:
                done = action()
            except (OSError, ValueError) as error:
                failed = error
        done, failed = self.first((done, failed))
        if failed is not None:
            raise failed
        return cast(T, done)

    def each(self, value: float) -> list[float]:
        """One number from every rank, in order of rank: `gather` in a single small collective."""
        if self.world == 1:
            return [value]
        there = torch.zeros(self.world, dtype=torch.float64, device=self.device)
        there[self.rank] = value
        dist.all_reduce(there)
        return list(there.tolist())

    def barrier(self) -> None:
        """Waits for every rank."""
        if self.world > 1:
            dist.barrier()


def must_have_none() -> None:
    """Refuses to train on the CPU where torch does not see the GPUs, unless they are hidden on purpose."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    given = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
    if not hidden and given and torch.version.cuda:
        raise Unfit(
            f"Slurm gives this job {given} GPUs of {socket.gethostname()}, and CUDA finds none; "
            "`nvidia-smi` there tells whether the driver works, and CUDA_VISIBLE_DEVICES=-1 trains on the CPU"
        )
    if not hidden and (given or (torch.version.cuda is None and Path("/dev/nvidia0").exists())):
        raise ValueError(
            f"this machine has GPUs, but torch {torch.__version__} sees none; `bash tools/setup.sh gpu` "
            "installs one that does, `nvidia-smi` tells whether the driver works, "
            "and CUDA_VISIBLE_DEVICES=-1 trains on the CPU"
        )


def must_have_all(found: int) -> None:
    """Refuses a node where a GPU has died, which two ranks would share another for.

    Slurm, or whoever sets CUDA_VISIBLE_DEVICES, may show a rank only its own, which is all that it needs.
    """
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    shown = len(names.split(",")) if names else int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or 0)
    if found < min(shown, ranks):
        raise Unfit(
            f"CUDA finds {found} of the {shown} GPUs on {socket.gethostname()} for {ranks} ranks; "
            "`nvidia-smi` there tells which is gone"
        )


@dataclass(frozen=True)
class Meeting:
    """The key-value store where the ranks have met: a thread in rank 0's process, or in torchrun's."""

    host: str
    port: int
    store: dist.Store
    """This process's first connection. In rank 0 the store lives as long as this does."""
    leader: str
    """Where rank 0 is: its host and process."""

    def connect(self, timeout: timedelta) -> dist.Store:
        """Another connection: a request that waits holds up all others of its connection."""
        store = dist.TCPStore(self.host, self.port, timeout=timeout, wait_for_workers=False)
        return dist.PrefixStore(_attempt(), store)


def _attempt() -> str:
    # torchrun keeps one store while it starts ranks anew.
    return f"megachat/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _meet(rank: int, world: int, patience: float) -> Meeting:
    """Waits until all ranks have come; after `patience` seconds says which have not."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    me, forever = f"host {socket.gethostname()}, pid {os.getpid()}", timedelta(seconds=patience)
    if rank == 0 and not hosted:
        _check_own(host)
        host = "localhost"  # the way to oneself needs no name that others understand
    try:
        served = dist.TCPStore(
            host, port, is_master=rank == 0 and not hosted, timeout=forever, wait_for_workers=False
        )
    except dist.DistError as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error):
            raise PortTaken(
                f"rank 0 ({me}) cannot listen on port {port}: somebody else does; "
                "start again with another MASTER_PORT"
            ) from None
        raise TimeoutError(
            f"rank {rank} ({me}) could not reach rank 0 at MASTER_ADDR={host}, MASTER_PORT={port} in "
            f"{patience:g} s: rank 0 has not started, or runs on another host, or a firewall is between them"
        ) from None
    store = dist.PrefixStore(_attempt(), served)
    store.set(f"came/{rank}", me)
    if rank == 0:
        store.set("all", _wait_for_all(store, world, patience))
    try:
        store.wait(["all"], timedelta(seconds=patience + 30))
        problem = store.get("all").decode()
        leader = store.get("came/0").decode()
    except RuntimeError:
        raise TimeoutError(f"rank {rank} ({me}) met rank 0 at {host}:{port}, which has gone since") from None
    if problem:
        store.set(f"heard/{rank}", "")
        if rank == 0:  # with this process the store goes, and the others wait in it for what is wrong
            heard = [f"heard/{other}" for other in range(world) if store.check([f"came/{other}"])]
            with suppress(dist.DistError):
                store.wait(heard, timedelta(seconds=30))
        raise TimeoutError(problem)
    return Meeting(host, port, served, leader)


def _wait_for_all(store: dist.Store, world: int, patience: float) -> str:
    """ "" once all have come; else who has, and who has not."""
    keys = [f"came/{rank}" for rank in range(world)]
    soon = min(60.0, patience / 2)
    for seconds, last in ((soon, False), (patience - soon, True)):
        with suppress(dist.DistError):
            store.wait(keys, timedelta(seconds=seconds))
            return ""
        came = {rank: store.get(key).decode() for rank, key in enumerate(keys) if store.check([key])}
        missing = ", ".join(str(rank) for rank in range(world) if rank not in came)
        places = "; ".join(f"rank {rank} on {place}" for rank, place in came.items())
        if not last:
            say(f"waiting for the other ranks: {len(came)} of {world} have come, missing: {missing}")
    return (
        f"{len(came)} of {world} ranks have come in {patience:g} s; missing: {missing}. Came: {places}. "
        "Look at the logs of the missing ranks; all need the same MASTER_ADDR and MASTER_PORT"
    )


def _check_own(address: str) -> None:
    """Says so when rank 0 is told to be on another host; there may be a way around it, so it goes on."""
    try:
        with socket.socket(socket.getaddrinfo(address, None)[0][0]) as probe:
            probe.bind((address, 0))
    except OSError as error:
        say(
            f"MASTER_ADDR={address} is no address of {socket.gethostname()}, where rank 0 runs "
            f"({error.strerror}); if the other ranks do not come, set it to this host"
        )


_current: Mesh | None = None
_meeting: Meeting | None = None


def meeting() -> Meeting | None:
    """Where the ranks of this process's job have met; None for a process alone."""
    return _meeting


def place(rank: int) -> str:
    """Where a rank runs: its host and process."""
    if _meeting is None:
        return f"host {socket.gethostname()}"
    return str(dist.PrefixStore(_attempt(), _meeting.store).get(f"came/{rank}").decode())


def start(tensor: int, patience: float = 0.0, timeout: timedelta | None = None, sequence: int = 1) -> Mesh:
    """Joins the process group and returns this rank's place. A process stays in the mesh it first joined.

    All ranks must come within `patience` seconds, 0 for TIMEOUT; `timeout` is how long a collective may take.
    """
    global _current, _meeting
    if _current is not None:
        now = (_current.tensor, _current.sequence)
        assert now == (tensor, sequence), "one process cannot change who shares its model and its rows"
        return _current
    adopt_slurm()
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    assert world % (tensor * sequence) == 0, (
        f"tensor={tensor} x sequence={sequence} does not divide {world} processes"
    )  # the config door has checked
    if torch.cuda.is_available():
        must_have_all(torch.cuda.device_count())
        # Slurm may show each task its own GPU only, as device 0.
        device = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed picks the GPU by it
    else:
        must_have_none()
        device = torch.device("cpu")
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        store: dist.Store = dist.HashStore()
        if world > 1:
            _meeting = _meet(rank, world, patience or TIMEOUT.total_seconds())
            store = dist.PrefixStore(f"{_attempt()}/group", _meeting.store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout or TIMEOUT)
        atexit.register(_leave)
    together = tensor * sequence
    replica_group = _group([range(t, world, tensor) for t in range(tensor)], rank, timeout)
    data_group = replica_group
    if sequence > 1:
        data_group = _group([range(t, world, together) for t in range(together)], rank, timeout)
    groups = [range(first, first + tensor) for first in range(0, world, tensor)]
    tensor_group = _group(groups, rank, timeout)
    sequence_group = None
    if sequence > 1:
        starts = [first + t for first in range(0, world, together) for t in range(tensor)]
        groups = [range(first, first + together, tensor) for first in starts]
        sequence_group = _group(groups, rank, timeout)
    _current = Mesh(
        rank, world, tensor, device, data_group, tensor_group, sequence, sequence_group, replica_group
    )
    return _current


def _leave() -> None:
    """Ends the process group while Python still stands: its threads do not survive the end of Python.

    Without it one of eight processes was aborted (SIGABRT) on a busy machine, after all had been done.
    """
    if dist.is_initialized():
        leaving = threading.Thread(target=dist.destroy_process_group, daemon=True)
        leaving.start()
        leaving.join(5.0)  # after an error it may wait for a rank that is gone


def _group(groups: Sequence[range], rank: int, timeout: timedelta | None) -> Any:
    """Makes a group of each of these ranks, which all must call; returns that of `rank`."""
    made = [dist.new_group(list(ranks), timeout=timeout or TIMEOUT) for ranks in groups]
    return next(group for group, ranks in zip(made, groups, strict=True) if rank in ranks)


def be_patient(timeout: timedelta) -> None:
    """Collectives of all groups that there are may take so long; DeepSpeed makes groups of its own.

    Their own limit is the backend's (NCCL: 10 minutes), which kills a healthy save or load, and a hang before
    anybody could say who is waited for.
    """
    # torch has no public call for it, nor for the list of groups; both are the same from 2.9 to 2.13.
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timeout, group)
