"""A checkpoint is whole or absent, has no layout in it, and never goes unnoticed when damaged."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megachat.parallel import checkpoint
from megachat.run import perform
from tests.tiny_run import TINY, environment, make, pretrain, rows

STEPS = 12


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupts."""
    run = make(tmp_path_factory.mktemp("checkpoint") / "runs" / "straight")
    start(run)()
    return run


def start(run: Path, *overrides: str, ranks: int = 1, inputs: Path | None = None) -> Any:
    """Starts `megachat pretrain` as a user would; returns a function that waits for its end."""
    places = [f"run={run}", f"inputs={inputs or run}"]
    command = ["-m", "megachat", "pretrain", "model=gpt_3m", *TINY, *places, *overrides]
    if ranks > 1:
        command = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", *command]
    process = subprocess.Popen(
        [sys.executable, *command], stderr=subprocess.PIPE, text=True, env=environment()
    )

    def wait(code: int = 0) -> str:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == code, errors
        return errors

    wait.process = process  # type: ignore[attr-defined]
    return wait


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in rows(run)]


def wait_for_rows(run: Path, count: int) -> None:
    deadline = time.monotonic() + 600
    path = run / "pretrain" / "metrics.jsonl"
    while not (path.is_file() and len(path.read_text().splitlines()) >= count):
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_run_repeats_the_losses_of_an_uninterrupted_one_bit_for_bit(
    straight: Path, tmp_path: Path
) -> None:
    run = tmp_path / "killed"
    for kill_at in (3, 8):
        wait = start(run, "checkpoint_interval=2", inputs=straight)
        wait_for_rows(run, kill_at)
        wait.process.send_signal(signal.SIGKILL)
        wait(-signal.SIGKILL)
    errors = start(run, "checkpoint_interval=2", inputs=straight)()
    assert "goes on from step" in errors
    assert losses(run) == losses(straight)
    assert len(losses(run)) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_and_exits_cleanly(straight: Path, tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "stopped"
    wait = start(run, inputs=straight)
    wait_for_rows(run, 2)
    wait.process.send_signal(number)
    errors = wait(0)
    assert "asked to stop; saved at step" in errors
    assert not (run / "pretrain" / "done.json").exists()
    start(run, inputs=straight)()
    assert losses(run) == losses(straight)


@pytest.mark.slow
def test_a_run_saved_on_two_tensor_ranks_goes_on_alone_at_zero_3(straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "moved"
    wait = start(
        run,
        "checkpoint_interval=2",
        "parallel=zero1_tp2",
        "parallel.precision=fp32",
        ranks=2,
        inputs=straight,
    )
    wait_for_rows(run, 4)
    wait.process.send_signal(signal.SIGTERM)
    wait.process.communicate(timeout=600)
    stopped_at = rows(run)[-1]["step"]
    assert 0 < stopped_at < STEPS
    errors = start(run, "parallel=zero3", "parallel.precision=fp32", inputs=straight)()
    assert "goes on from step" in errors
    assert losses(run) == pytest.approx(losses(straight), rel=1e-4)


def test_a_finished_stage_is_not_run_again(straight: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (straight / "pretrain" / "done.json").read_text()
    perform(pretrain(straight))
    assert "already finished" in capsys.readouterr().err
    assert (straight / "pretrain" / "done.json").read_text() == before


def copy_of(straight: Path, tmp_path: Path) -> Path:
    stage = tmp_path / "copy" / "pretrain"
    subprocess.run(["cp", "-r", str(straight / "pretrain"), str(tmp_path / "copy-parent")], check=True)
    stage.parent.mkdir()
    (tmp_path / "copy-parent").rename(stage)
    return stage


def only_tensor_file(stage: Path) -> Path:
    (file,) = stage.glob("checkpoints/*/*.safetensors")
    return file


def test_one_flipped_bit_is_named(straight: Path, tmp_path: Path) -> None:
    stage = copy_of(straight, tmp_path)
    file = only_tensor_file(stage)
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{file.name} is damaged: its sha256 differs"):
        checkpoint.load_model(stage)


def test_a_truncated_file_is_named_with_both_sizes(straight: Path, tmp_path: Path) -> None:
    stage = copy_of(straight, tmp_path)
    file = only_tensor_file(stage)
    size = file.stat().st_size
    os.truncate(file, 100)
    with pytest.raises(ValueError, match=rf"has 100 bytes, its manifest says {size:,}"):
        checkpoint.load_model(stage)


def test_another_tokenizer_is_refused(straight: Path, tmp_path: Path) -> None:
    stage = copy_of(straight, tmp_path)
    manifest = next(stage.glob("checkpoints/*/manifest.json"))
    checkpoint.write_manifest(manifest.parent, json.loads(manifest.read_text()) | {"tokenizer": "0" * 64})
    with pytest.raises(ValueError, match=r"was trained with tokenizer 000000000000, but this run's is"):
        checkpoint.load_model(stage)


def test_a_loaded_model_has_the_weights_that_were_trained(straight: Path) -> None:
    loaded = checkpoint.load_model(straight / "pretrain")
    again = checkpoint.load_model(straight / "pretrain")
    assert loaded.step == STEPS
    tokens = torch.tensor([[loaded.tokenizer.bos, *loaded.tokenizer.encode("one two three")]])
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(tokens), again.model(tokens), rtol=0, atol=0)
        nats = torch.nn.functional.cross_entropy(loaded.model(tokens)[0, :-1], tokens[0, 1:])
    assert nats < 4.5  # log(300) = 5.7 untrained
