"""What the scripts that train ask of Slurm, without Slurm."""

import os
import subprocess
from pathlib import Path

import pytest

SLURM = Path(__file__).parents[2] / "slurm"


@pytest.mark.parametrize("script", ["pretrain.sh", "sft.sh", "rlhf.sh"])
def test_a_script_that_trains_is_warned_before_its_time_is_up_requeued_and_keeps_its_log(script: str) -> None:
    head, _, _ = (SLURM / script).read_text().partition("\ncd ")  # Slurm reads none after the first command
    asked = [line.split()[1] for line in head.splitlines() if line.startswith("#SBATCH ")]
    assert {"--signal=B:USR1@300", "--requeue", "--open-mode=append"} <= {*asked}


@pytest.mark.parametrize("script", ["pretrain.sh", "sft.sh", "rlhf.sh"])
def test_a_node_that_does_not_see_the_checkout_is_named(script: str) -> None:
    environment = os.environ | {"SLURM_SUBMIT_DIR": "/nowhere", "SLURMD_NODENAME": "node7"}
    command = ["bash", str(SLURM / script)]
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "/nowhere: No such file" in done.stderr
    assert "--exclude=node7" in done.stderr
