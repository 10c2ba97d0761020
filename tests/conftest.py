"""What every test finds: a CPU, one thread, no account, no network, and a run folder of its own.

The environment is set on import, before anything imports torch or DeepSpeed.
A test marked `gpu` is skipped without a GPU; with MEGACHAT_REQUIRE_GPU=1 it fails instead. One marked `vllm`
is skipped where vLLM has no environment.
A test that is not marked sees no GPU even where there is one: its numbers are the CPU's.
DeepSpeed is set to the CPU for good in this process: a GPU test that trains is `@on_ranks(1, device="cuda")`.
"""

import os
import sys
from pathlib import Path

import pytest

QUIET = {
    "OMP_NUM_THREADS": "1",  # tests and their ranks share few cores
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "NETRC": os.devnull,  # a developer who is logged in to W&B must not upload test runs
    "MPLBACKEND": "agg",
}
os.environ.update(QUIET)
os.environ.setdefault("DS_ACCELERATOR", "cpu")
for name in ("WANDB_API_KEY", "RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS"):
    os.environ.pop(name, None)


VLLM = Path(__file__).parents[1] / ".venv-bench" / "vllm" / "bin" / "python"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what needs more GPUs than there are, or vLLM."""
    if item.get_closest_marker("vllm") and not VLLM.is_file():
        pytest.skip("needs vLLM in an environment of its own: bash tools/bench/setup.sh vllm")
    needed = 2 if item.get_closest_marker("multigpu") else 1 if item.get_closest_marker("gpu") else 0
    if not needed:
        return
    import torch

    found = torch.cuda.device_count()
    if found < needed:
        why = f"needs {needed} NVIDIA GPU{'s' if needed > 1 else ''}, and torch sees {found}"
        if os.environ.get("MEGACHAT_REQUIRE_GPU") == "1":
            pytest.fail(f"{why}, but MEGACHAT_REQUIRE_GPU=1", pytrace=False)
        pytest.skip(why)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which faults were injected, and what they cost."""
    from tests import fault_table

    if table := fault_table.lines():
        terminalreporter.write_sep("=", "faults")
        for line in table:
            terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def _no_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    marked = request.node.get_closest_marker("gpu") or request.node.get_closest_marker("multigpu")
    if not marked and "torch" in sys.modules:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The path of a run folder that does not exist yet."""
    return tmp_path / "runs" / "test"
