"""What `slurm/data.sh` starts; small programs stand in for Slurm's and Ray's."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PROGRAMS = {
    "srun": 'export SLURM_STEP_NUM_TASKS=2; while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "ray": 'while [[ $1 != -- ]]; do shift; done; shift; exec "$@"',
    "scontrol": "printf 'one\\ntwo\\n'",
    "python": 'echo "$*, ${SLURM_STEP_NUM_TASKS:-no number of} tasks"',
}


def data_sh(folder: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    for name, body in PROGRAMS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    environment = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "4"}
    environment |= {"PATH": f"{folder}:{os.environ['PATH']}", "VIRTUAL_ENV": str(folder)}
    environment |= {"SLURM_JOB_NODELIST": "some", "SLURM_JOB_NUM_NODES": "1", **settings}
    command = ["bash", str(ROOT / "slurm" / "data.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def array(*numbers: int, own: int) -> dict[str, str]:
    """What Slurm tells one of some jobs."""
    return {
        "SLURM_ARRAY_TASK_ID": str(own),
        "SLURM_ARRAY_TASK_MIN": str(min(numbers)),
        "SLURM_ARRAY_TASK_MAX": str(max(numbers)),
        "SLURM_ARRAY_TASK_COUNT": str(len(numbers)),
    }


def test_on_several_nodes_ray_starts_one_process_that_is_not_told_of_several(tmp_path: Path) -> None:
    done = data_sh(tmp_path, "run=there", SLURM_JOB_NUM_NODES="2")
    assert done.stdout == "-m megachat clean executor=ray run=there, no number of tasks\n", done.stderr


@pytest.mark.parametrize(
    ("jobs", "share"),
    [(array(0, 1, 2, own=2), "2/3"), (array(1, 2, 3, own=1), "0/3"), (array(3, 7, own=7), "7/64")],
)
def test_a_job_of_an_array_has_its_share(jobs: dict[str, str], share: str, tmp_path: Path) -> None:
    more = {"SHARES": "64"} if share.endswith("64") else {}
    assert f"clean stage=sign shard={share}," in data_sh(tmp_path, "stage=sign", **jobs, **more).stdout


def test_of_an_array_with_gaps_nobody_knows_the_shares(tmp_path: Path) -> None:
    done = data_sh(tmp_path, "stage=sign", **array(3, 7, own=3))
    assert done.returncode == 2
    assert "say of how many jobs these are some: SHARES=64 sbatch --array=..." in done.stderr
