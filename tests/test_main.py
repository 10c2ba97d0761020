"""The command line as a user meets it: help, mistakes, errors, sweeps, and its exit codes."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from megachat.__main__ import main
from megachat.stages import ORDER
from tests.tiny_run import TINY, environment, make, rows


def megachat(*arguments: str, cwd: Path, code: int = 0) -> str:
    """Runs the command; returns what it printed on both streams."""
    variables = environment() | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "megachat", *arguments]
    done = subprocess.run(
        command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def test_help_lists_every_stage_and_imports_nothing_heavy(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    main(["--help"])
    printed = capsys.readouterr().out
    for stage in ORDER:
        assert f"\n  {stage} " in printed
    begun = time.monotonic()
    listed = megachat("--help", cwd=tmp_path)
    assert "pretrain" in listed
    code = (
        "import sys, megachat.__main__ as m; m.main(['--help']); "
        "print([n for n in ('torch', 'hydra') if n in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert out.stdout.endswith("[]\n")
    assert time.monotonic() - begun < 30


def test_a_stages_help_shows_each_setting_with_its_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    main(["pretrain", "--help"])
    printed = capsys.readouterr().out
    assert "model.kv_heads=" in printed
    assert "Key and value heads of each block" in printed
    assert "parallel=...  one of zero0, zero1" in printed
    assert "\n    gpt_125m_1gpu: 125 M on one H100" in printed


def test_every_mistake_is_printed_at_once_and_the_exit_code_is_2(tmp_path: Path) -> None:
    printed = megachat(
        "pretrain", "model.headz=3", "optimizer.lr=abc", "parallel.tensor=3", cwd=tmp_path, code=2
    )
    assert printed.splitlines() == [
        "3 mistakes in the config",
        "  model.headz: GPTConfig has no such setting; did you mean 'heads'?",
        "  optimizer.lr: input should be a valid number, unable to parse string as a number, got 'abc'",
        "  parallel: tensor=3 does not divide the 1 processes of this job; use one of [1]",
    ]


def test_an_unknown_stage_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["pretrian"])
    assert stopped.value.code == 2
    assert "did you mean 'pretrain'?" in capsys.readouterr().err


def test_a_missing_input_names_the_command_that_makes_it(tmp_path: Path) -> None:
    printed = megachat("tokenizer", "run=runs/none", "log.wandb=disabled", cwd=tmp_path, code=1)
    assert (
        "reads the output of `clean`, which has not finished in runs/none; run `megachat clean run=runs/none`"
        in printed
    )
    assert not (tmp_path / "runs" / "none" / "tokenizer").exists()


def test_cfg_job_prints_the_composed_config(tmp_path: Path) -> None:
    printed = megachat("pretrain", "--cfg", "job", "experiment=quickstart", "run=runs/中文", cwd=tmp_path)
    assert "run: runs/中文" in printed
    assert "dim: 320" in printed
    assert "inputs: runs/中文" in printed  # which follows from another


@pytest.mark.slow
def test_a_sweep_gives_each_job_a_run_of_its_own_that_reads_the_shared_inputs(tmp_path: Path) -> None:
    run = make(tmp_path / "runs" / "base")
    settings = ["model=gpt_3m", *TINY, "tokens=512", f"run={run}"]
    megachat("pretrain", "-m", *settings, "optimizer.lr=1e-3,1e-2", cwd=tmp_path)
    first, second = (rows(run / f"optimizer.lr={rate}") for rate in ("0.001", "0.01"))
    assert first[0]["loss"] == second[0]["loss"]  # the same start and data
    assert first[1]["loss"] != second[1]["loss"]  # another learning rate
