"""`slurm/pretrain.sh` and `slurm/data.sh` on a real Slurm: two nodes in a box, a CPU or two on each."""

import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from megachat.config import compose
from megachat.run import Stage, perform
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


TRAINING = ["-N", "2", "--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=10"]
"""Two nodes without GPUs."""


def submit(slurm: Slurm, log: Path, script: str, options: list[str], *overrides: str) -> str:
    """The number of a job of a script in `slurm/`, with the Python that runs this test."""
    files = [f"--chdir={ROOT}", f"--output={log}"]
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "VIRTUAL_ENV": sys.prefix,
        "CUDA_VISIBLE_DEVICES": "",
        "RANK": "0",  # typed inside another job
        "WORLD_SIZE": "1",
    }
    path = str(ROOT / "slurm" / script)
    return slurm.call(
        "sbatch", "--parsable", *options, *files, path, *overrides, environment=environment
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
        overrides = [f"run={two}", f"inputs={run}", "model=gpt_3m", *TINY, *layout]
        job = submit(slurm, log, "pretrain.sh", TRAINING, *overrides)
        state = slurm.wait(job, timeout=600)
    assert state == "COMPLETED", log.read_text()
    assert len(list(two.glob("pretrain/checkpoints/*/tensors-*.safetensors"))) == 2  # each rank wrote its own
    losses = [row["loss"] for row in rows(two)]
    assert len(losses) == 12
    assert losses == pytest.approx([row["loss"] for row in rows(run)], rel=1e-4)


def test_arrays_of_jobs_clean_to_the_bytes_of_one_process(slurm: Slurm, run: Path, tmp_path: Path) -> None:
    make(run)
    lines = (run.parent / "numbers.jsonl").read_text().splitlines(keepends=True)
    for name, part in {"a": lines[:70], "b": lines[50:]}.items():  # 20 of them twice
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    paths = f"corpus.json_lines.paths=[{tmp_path / '*.jsonl'}]"
    settings = ["corpus=[json_lines]", paths, "filters=none", "shards=2"]
    settings += ["log.wandb=disabled", "executor.processes=1"]
    perform(Stage.of(compose("clean", [f"run={tmp_path / 'one'}", *settings])))

    log, job = tmp_path / "jobs.log", ""
    # As the first lines of slurm/data.sh have it.
    for step in "collect select sign exact alive join verify components settle filter".split():
        after = [f"--dependency=afterok:{job}"] if job else []
        options = ["--array=0-1", "--cpus-per-task=1", "--mem-per-cpu=0", "--time=10", *after]
        job = submit(slurm, log, "data.sh", options, f"stage={step}", f"run={tmp_path / 'two'}", *settings)
    last = ["--cpus-per-task=1", "--mem-per-cpu=0", "--time=10", f"--dependency=afterok:{job}"]
    job = submit(slurm, log, "data.sh", last, f"run={tmp_path / 'two'}", *settings)
    assert slurm.wait(job, timeout=600) == "COMPLETED", log.read_text()
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "clean").glob("text-*")}
        for name in ("one", "two")
    )
    assert len(one) == 2
    assert two == one
