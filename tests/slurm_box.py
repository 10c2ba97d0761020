"""A real Slurm in a box: a controller and two nodes on this machine, which leave nothing behind.

All daemons live in a PID namespace of their own, whose first process dies with pytest: then the kernel kills
the daemons and every process of every job. Only root may make one.
They listen on 127.0.0.1 alone: Slurm listens where the host's name points, so the box is called `localhost`.
Its nodes are called 127.0.0.1 and 127.0.0.2: names that resolve without a line in /etc/hosts.
"""

import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ["slurmctld", "slurmd", "slurm-client", "munge"]
PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin"
NODES = ["127.0.0.1", "127.0.0.2"]
NAMESPACE = "setpriv --pdeathsig KILL unshare --uts --pid --mount-proc --fork --kill-child".split()
CONF = """\
ClusterName=box
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# Four CPUs a node, whatever this machine has.
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1
KillWait=3
# A job's number decides on which port its ranks meet: two boxes on one machine must not agree on it.
FirstJobId={first}
PartitionName=main Nodes=ALL Default=YES State=UP
NodeName={nodes} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports} CPUs=4
"""
START = """\
hostname localhost
mkdir state
munged --foreground --force --key-file=$PWD/munge.key --socket=$PWD/munge.sock \\
    --pid-file=$PWD/munged.pid --log-file=$PWD/munged.log --seed-file=$PWD/munge.seed &
while [ ! -S munge.sock ]; do sleep 0.05; done
slurmctld -D &
for node; do mkdir spool-$node; slurmd -D -N $node & done
wait
"""


@dataclass(frozen=True)
class Slurm:
    """A running cluster."""

    conf: Path

    def call(self, *command: str, environment: Mapping[str, str] = os.environ) -> str:
        """What a Slurm command prints."""
        found = {**environment, "SLURM_CONF": str(self.conf)}
        return subprocess.run(
            command, env=found, stdout=subprocess.PIPE, text=True, check=True, timeout=120
        ).stdout

    def wait(self, job: str, timeout: float) -> str:
        """The state in which a job ends. `sbatch --wait` would look only every ten seconds."""
        deadline, state = time.monotonic() + timeout, ""
        while time.monotonic() < deadline:
            words = self.call("scontrol", "show", "job", "-o", job).split()
            state = next(word for word in words if word.startswith("JobState=")).removeprefix("JobState=")
            if state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
                return state
            time.sleep(0.2)
        raise TimeoutError(f"job {job} is still {state} after {timeout:g} s")


def missing() -> str:
    """Why there can be no Slurm here; empty if there can. Root installs what is missing (Debian, Ubuntu)."""
    if os.geteuid() != 0:
        return "Slurm in a box needs root: its daemons get a PID namespace of their own"
    if not all(shutil.which(name, path=PATH) for name in ("slurmctld", "slurmd", "sbatch", "munged")):
        if not shutil.which("apt-get"):
            return f"Slurm is not installed, and there is no apt-get to install {' '.join(PACKAGES)} with"
        quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "-qq", "update"], env=quiet, capture_output=True)
        install = ["apt-get", "-qq", "install", "-y", "--no-install-recommends", *PACKAGES]
        done = subprocess.run(install, env=quiet, capture_output=True, text=True)
        if done.returncode:
            return f"Slurm is not installed, and `{' '.join(install)}` failed: {done.stderr.strip()[-500:]}"
    tried = subprocess.run([*NAMESPACE, "true"], capture_output=True, text=True)
    return f"this root may not make namespaces: {tried.stderr.strip()}" if tried.returncode else ""


@contextmanager
def cluster() -> Iterator[Slurm]:
    """Two idle nodes."""
    with tempfile.TemporaryDirectory(prefix="slurm-box-") as name:  # short: a socket's path has 107 letters
        folder = Path(name)
        conf = folder / "slurm.conf"
        ports = [str(port) for port in free_ports(1 + len(NODES))]
        conf.write_text(
            CONF.format(
                folder=folder,
                controller=ports[0],
                nodes=",".join(NODES),
                ports=",".join(ports[1:]),
                first=random.randrange(1, 12000),
            )
        )
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        with (folder / "box.log").open("w") as log:
            box = subprocess.Popen(
                [*NAMESPACE, "sh", "-ec", START, "start", *NODES],
                cwd=folder,
                env=os.environ | {"SLURM_CONF": str(conf), "PATH": PATH},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            slurm = Slurm(conf)
            deadline = time.monotonic() + 120
            while idle(slurm) < len(NODES):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"Slurm does not start\n{(folder / 'box.log').read_text()[-5000:]}")
                time.sleep(0.1)
            yield slurm
        finally:
            box.kill()
            box.wait()


def idle(slurm: Slurm) -> int:
    """How many nodes wait for work; none as long as nobody answers."""
    try:
        return slurm.call("sinfo", "-h", "-N", "-t", "idle").count("\n")
    except (subprocess.SubprocessError, OSError):
        return 0


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at the moment, all different."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports
