"""Which start of a run may write: each one claims `attempt.json`, and whoever finds another name there ends.

A node that was cut off and wakes up again, or that Slurm has given up too early, still runs the old start of
a job while the new one trains: two writers of one folder. So rank 0 takes the next number when it starts, and
looks whether the file still names it before anything is saved.
"""

import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megachat.files import write_json
from megachat.parallel.mesh import Mesh
from megachat.run import Superseded

FILE = "attempt.json"


@dataclass(frozen=True)
class Attempt:
    """One start of a stage, as its `attempt.json` names it."""

    attempt: int
    """Counts the starts, from 1."""
    restart: int
    """How often Slurm has requeued the job."""
    job: str
    """Slurm's job id; empty outside Slurm."""
    host: str
    pid: int

    def check(self, stage: Path) -> None:
        """Raises Superseded unless the stage's folder still names this attempt."""
        now = recorded(stage)
        # Host and process, too: two that started in the same moment may have taken the same number.
        if now is not None and now != self:
            raise Superseded(
                f"{stage / FILE} names attempt {now.attempt} ({now.host}, process {now.pid}), so this one, "
                f"attempt {self.attempt} ({self.host}, process {self.pid}), ends and writes nothing more"
            )
        if now is None:
            raise Superseded(f"{stage / FILE} has gone: somebody else has moved or deleted this run")

    def fence(self, stage: Path, mesh: Mesh) -> None:
        """`check` on rank 0, and what it raises on every rank: before the stage's folder is changed."""
        mesh.lead(lambda: self.check(stage))


def recorded(stage: Path) -> Attempt | None:
    """The attempt that a stage's folder names, or None."""
    path = stage / FILE
    try:
        facts: Any = json.loads(path.read_text(encoding="utf-8"))
        found = Attempt(**facts)
        if not all(isinstance(getattr(found, name), int) for name in ("attempt", "restart", "pid")):
            raise TypeError("a number is none")
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not the record of an attempt ({error}); delete it") from None
    return found


def claim(stage: Path, mesh: Mesh) -> Attempt:
    """Takes the next attempt at a stage; every rank calls it and learns the same.

    An earlier incarnation of the same Slurm job, which has been requeued since, is refused.
    """

    def take() -> Attempt:
        before = recorded(stage)
        job, restart = os.environ.get("SLURM_JOB_ID", ""), int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        if before and job and before.job == job and restart < before.restart:
            raise Superseded(
                f"{stage / FILE} names attempt {before.attempt} of job {job}, which has been requeued "
                f"{before.restart} times; this is a start from before (requeued {restart} times), and it ends"
            )
        number = before.attempt + 1 if before else 1
        mine = Attempt(number, restart, job, socket.gethostname(), os.getpid())
        write_json(stage / FILE, asdict(mine))
        return mine

    return mesh.lead(take)
