"""`slurm/pretrain.sh` on a real Slurm: two nodes in a box, one CPU rank on each."""

import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from megachat.run import perform
from tests.slurm_box import Slurm, cluster, missing
from tests.spawn import on_ranks
from tests.tiny_run import TINY, make, pretrain, rows

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    if why := missing():
        pytest.skip(why)
    with cluster() as started:
        yield started


@on_ranks(1)
def trained(run: Path) -> None:
    perform(pretrain(run))


def submit(slurm: Slurm, log: Path, *overrides: str) -> str:
    """The number of a job that trains on two nodes without GPUs, with the Python that runs this test."""
    nodes = ["-N", "2", "--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=10"]
    files = [f"--chdir={ROOT}", f"--output={log}"]
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "VIRTUAL_ENV": sys.prefix,
        "CUDA_VISIBLE_DEVICES": "",
        "RANK": "0",  # typed inside another job
        "WORLD_SIZE": "1",
    }
    script = str(ROOT / "slurm" / "pretrain.sh")
    return slurm.call(
        "sbatch", "--parsable", *nodes, *files, script, *overrides, environment=environment
    ).strip()


def port_of_next_job(slurm: Slurm) -> int:
    """Where its ranks would meet if the port were free."""
    number = re.search(r"^NEXT_JOB_ID\s*= (\d+)", slurm.call("scontrol", "show", "config"), re.MULTILINE)
    assert number
    return 20000 + int(number[1]) % 12000


def test_sbatch_on_two_nodes_gives_the_losses_of_one_process_though_another_job_has_its_port(
    slurm: Slurm, run: Path, tmp_path: Path
) -> None:
    make(run)
    trained(run=run)
    log, two = tmp_path / "job.log", tmp_path / "runs" / "two"
    layout = ["parallel=zero2", "parallel.precision=fp32"]
    with ExitStack() as taken:
        with suppress(OSError):  # somebody else has it: as good
            taken.enter_context(socket.create_server(("127.0.0.3", port_of_next_job(slurm))))
        job = submit(slurm, log, f"run={two}", f"inputs={run}", "model=gpt_3m", *TINY, *layout)
        state = slurm.wait(job, timeout=600)
    assert state == "COMPLETED", log.read_text()
    assert len(list(two.glob("pretrain/checkpoints/*/tensors-*.safetensors"))) == 2  # each rank wrote its own
    losses = [row["loss"] for row in rows(two)]
    assert len(losses) == 12
    assert losses == pytest.approx([row["loss"] for row in rows(run)], rel=1e-4)
