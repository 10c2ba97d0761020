"""Looked at once before training: whether this node can compute, talk to the others, and see the run folder.

A node that fails is told from a mistake of the user's: its ranks end with code 70, so that a launcher can
start the run again without it. What may yet do (a wrong clock, a disk that is nearly full) is only said.
"""

import secrets
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from megachat.log import say
from megachat.parallel.mesh import Mesh, Unfit

APART = 5.0
"""Seconds by which clocks may differ."""
PATIENCE = 20.0
"""Seconds until all nodes must see a file that one has written: network file systems remember absence."""


@dataclass
class Findings:
    """What one rank has found."""

    host: str
    unfit: str = ""
    """What is wrong with the node."""
    blind: bool = False
    """Whether it does not see what rank 0 has written."""
    notes: list[str] = field(default_factory=list)
    """What is worth a word."""

    def __str__(self) -> str:
        return self.host


def preflight(mesh: Mesh, folder: Path, needed: int) -> None:
    """All ranks call it. `needed` is the size of a checkpoint in bytes."""
    mine = Findings(socket.gethostname())
    if mesh.device.type == "cuda":
        check_gpu(mesh.device, mine)
    speed = check_sum(mesh, mine)
    check_folder(mesh, folder, mine)
    skew = mesh.each(time.time())
    everybody = mesh.gather(mine)
    if mesh.rank == 0:
        for host, ranks in at_odds(skew, [found.host for found in everybody]).items():
            mine.notes.append(
                f"the clock of {host} is {skew[ranks] - skew[0]:+.0f} s from that of {mine.host}, where "
                "rank 0 runs; times in logs and files will mislead"
            )
        free = shutil.disk_usage(folder).free
        if free < needed:
            mine.notes.append(
                f"{folder} has {free / 1e9:.2f} GB free, and a checkpoint takes {needed / 1e9:.2f} GB; "
                "free some"
            )
        for note in dict.fromkeys([*(note for found in everybody for note in found.notes), *mine.notes]):
            say(f"preflight: {note}")
        if mesh.world > 1 and not any(found.unfit or found.blind for found in everybody):
            say(f"preflight: {mesh.world} ranks, all-reduce {speed:.2f} GB/s")
    judge(mesh, folder, everybody)


def judge(mesh: Mesh, folder: Path, everybody: list[Findings]) -> None:
    """Raises what is wrong, if anything: Unfit on the nodes that are, else an error that names them."""
    hosts = {found.host for found in everybody}
    blind = {found.host for found in everybody if found.blind}
    if blind and len(hosts) > 1 and blind == hosts - {everybody[0].host}:
        raise ValueError(
            f"only {everybody[0].host} sees {folder}, which rank 0 has made there; "
            "run=... must be a folder that all nodes share"
        )
    unfit = [
        f"rank {rank} on {found.host} "
        + (found.unfit or f"does not see {folder}, which rank 0 on {everybody[0].host} has made")
        for rank, found in enumerate(everybody)
        if found.unfit or found.blind
    ]
    mine = everybody[mesh.rank]
    if mine.unfit or mine.blind:
        raise Unfit(f"this node is unfit: {unfit[0] if len(unfit) == 1 else '; '.join(unfit)}")
    if unfit:
        raise OSError(f"unfit for training: {'; '.join(unfit)}")


def check_gpu(device: torch.device, found: Findings) -> None:
    """A product of whole numbers must be the CPU's to the last bit: in TF32, too, they are exact."""
    try:
        free, total = torch.cuda.mem_get_info(device)
        if free < total / 2:
            found.notes.append(
                f"{device} of {found.host} has {free / 1e9:.1f} of {total / 1e9:.1f} GB free: "
                "somebody else uses it"
            )
        draw = torch.Generator().manual_seed(0)
        a, b = (torch.randint(-8, 9, (512, 512), generator=draw).float() for _ in range(2))
        wrong = int(((a.to(device) @ b.to(device)).cpu() != a @ b).sum())
        if wrong:
            found.unfit = f"computes wrongly: {wrong} of {a.numel()} entries of a product on {device}"
    except RuntimeError as error:  # no memory at all, a card that has fallen off the bus
        found.unfit = f"cannot compute on {device}: {str(error).splitlines()[0]}"


def check_sum(mesh: Mesh, found: Findings) -> float:
    """Sums a known tensor over all ranks; how many GB/s went through each rank."""
    right = sum(map(share, range(mesh.world)))
    if mesh.world == 1:
        return 0.0
    count = 2**24 if mesh.device.type == "cuda" else 2**18
    seconds = 0.0
    for _ in range(2):  # the first makes the connections
        there = torch.full((count,), float(share(mesh.rank)), device=mesh.device)
        mesh.barrier()
        begun = time.perf_counter()
        dist.all_reduce(there)
        total = float(there[-1])  # waits for a GPU
        seconds = time.perf_counter() - begun
        wrong = int((there != right).sum())
        if wrong:
            found.unfit = f"received {wrong} wrong numbers of {count}, such as {total}, from an all-reduce"
    return there.nbytes * 2 * (mesh.world - 1) / mesh.world / seconds / 1e9


def share(rank: int) -> int:
    """What a rank adds: so little that fp32 has the sum of 100,000 ranks exactly, whatever the order."""
    return rank % 251 + 1


def check_folder(mesh: Mesh, folder: Path, found: Findings) -> None:
    """Whether every rank reads what rank 0 writes to the run folder."""
    path = folder / "preflight.tmp"
    token = secrets.token_hex(8)
    if mesh.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(token)
    token = mesh.first(token)
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            found.blind = path.read_text() != token
        except OSError:
            found.blind = True
        if not found.blind or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    mesh.barrier()
    if mesh.rank == 0:
        path.unlink(missing_ok=True)


def read_again(mesh: Mesh, wrong: Path | None, whole: Callable[[Path], bool]) -> Path | None:
    """The first of the files that ranks find damaged (each says which: `wrong`), and others find so, too.

    All ranks call it; what one has found, the one half the world away reads again. A host with bad memory
    would otherwise have one good checkpoint after another set aside, or end the run: it is Unfit.
    """
    apart = mesh.world // 2
    found = mesh.gather((wrong, socket.gethostname()))
    other, _ = found[(mesh.rank - apart) % mesh.world]
    try:
        refuted = mesh.gather(other is not None and whole(other))
    except OSError:  # no word against what the other has found
        refuted = mesh.gather(False)
    for rank, (path, host) in enumerate(found):
        judge = (rank + apart) % mesh.world
        if refuted[judge]:
            again = "read a second time" if judge == rank else f"read by rank {judge} on {found[judge][1]}"
            problem = (
                f"rank {rank} on {host} finds {path} damaged, and {again} it is whole; check the memory "
                f"and the network card of {host}; nothing was changed"
            )
            raise Unfit(problem) if mesh.rank == rank else OSError(problem)
    return next((path for path, _ in found if path), None)


def at_odds(times: list[float], hosts: list[str]) -> dict[str, int]:
    """Hosts whose clock is far from rank 0's, with a rank of theirs."""
    return {
        host: rank
        for rank, (seconds, host) in enumerate(zip(times, hosts, strict=True))
        if abs(seconds - times[0]) > APART
    }
