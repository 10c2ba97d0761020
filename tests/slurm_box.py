"""A real Slurm in a box, by `tools/slurm_cluster.sh`: for tests that submit jobs to it and break its nodes.

The box is a child of pytest's that dies with it, and with it every process of every job.
"""

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "tools" / "slurm_cluster.sh"
ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED")


@dataclass(frozen=True)
class Slurm:
    """A running cluster, whose nodes are called 127.0.0.1, 127.0.0.2 ..."""

    folder: Path

    def call(self, *command: str, environment: Mapping[str, str] = os.environ) -> str:
        """What a Slurm command prints."""
        found = {**environment, "SLURM_CONF": str(self.folder / "slurm.conf")}
        return subprocess.run(
            command, env=found, stdout=subprocess.PIPE, text=True, check=True, timeout=120
        ).stdout

    def box(self, *command: str) -> str:
        """What `tools/slurm_cluster.sh` prints: `kill-node 2`, for one."""
        environment = os.environ | {"BOX": str(self.folder)}
        done = subprocess.run(
            [SCRIPT, *command], env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def about(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job, as `scontrol show job` has it."""
        pairs = [word.partition("=") for word in self.call("scontrol", "show", "job", "-o", job).split()]
        return {name: value for name, _, value in pairs}

    def wait(self, job: str, timeout: float) -> str:
        """The state in which a job ends. `sbatch --wait` would look only every ten seconds."""
        deadline, state = time.monotonic() + timeout, ""
        while time.monotonic() < deadline:
            state = self.about(job)["JobState"]
            if state not in ALIVE:
                return state
            time.sleep(0.2)
        raise TimeoutError(f"job {job} is still {state} after {timeout:g} s")

    def ranks(self, job: str) -> dict[int, int]:
        """The processes of a job's ranks, as this machine numbers them: {rank: pid}."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = (folder / "environ").read_bytes().decode(errors="replace")
                command = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:  # it has ended meanwhile
                continue
            rank = re.search(r"(?:^|\0)SLURM_PROCID=(\d+)\0", environment)
            ours = f"SLURM_JOB_ID={job}\0" in environment and str(self.folder) in environment
            if ours and rank and b"python" in command[0] and b"megachat" in command:
                found[int(rank[1])] = int(folder.name)
        return found


def missing() -> str:
    """Why there can be no Slurm here; empty if there can. Root installs what is missing (Debian, Ubuntu)."""
    done = subprocess.run([SCRIPT, "check"], capture_output=True, text=True)
    return done.stderr.strip()[-500:] if done.returncode else ""


@contextmanager
def cluster(nodes: int = 2) -> Iterator[Slurm]:
    """Idle nodes of four CPUs each."""
    with tempfile.TemporaryDirectory(prefix="slurm-box-") as name:  # short: a socket's path has 107 letters
        slurm = Slurm(Path(name))
        environment = os.environ | {"BOX": name, "NODES": str(nodes)}
        box = subprocess.Popen([SCRIPT, "serve"], env=environment, stdin=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 120
            while idle(slurm) < nodes:
                if time.monotonic() > deadline or box.poll() is not None:
                    log = slurm.folder / "box.log"
                    raise TimeoutError(f"Slurm does not start\n{log.read_text()[-5000:]}")
                time.sleep(0.1)
            yield slurm
        finally:
            box.kill()
            box.wait()


def idle(slurm: Slurm) -> int:
    """How many nodes wait for work; none as long as nobody answers."""
    try:
        return slurm.call("sinfo", "-h", "-N", "-p", "main", "-t", "idle").count("\n")
    except (subprocess.SubprocessError, OSError):
        return 0
