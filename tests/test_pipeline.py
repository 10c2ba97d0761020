"""The pipeline: what reaches its stages, and what is refused before the first one starts."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megachat.config import ConfigError, compose, decode
from megachat.pipeline import Pipeline
from megachat.run import Stage
from tests.tiny_run import TINY, environment, make


def pipeline(*overrides: str) -> Pipeline:
    made = Stage.of(compose("pipeline", overrides))
    assert isinstance(made, Pipeline)
    return made


def test_an_experiment_and_what_all_stages_share_reach_every_stage() -> None:
    made = pipeline("experiment=quickstart", "run=runs/x", "seed=3", "log.project=p", "log.wandb=disabled")
    sft = compose("sft", made._overrides("sft"))
    assert (sft["run"], sft["seed"], sft["log"]["project"]) == ("runs/x", 3, "p")
    assert sft["conversations"] == compose("sft", ["experiment=quickstart"])["conversations"]


def test_overrides_of_a_stage_that_does_not_run_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"overrides\.pretrian: no such stage .*did you mean 'pretrain'\?"):
        decode(compose("pipeline", ["overrides.pretrian=[model=gpt_1b]"]))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("[cleen,report]", r"stages: no stage 'cleen'; did you mean 'clean'\?"),
        ("[]", "stages: no stage to run"),
    ],
)
def test_a_stage_that_is_none_is_refused(stages: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decode(compose("pipeline", [f"stages={stages}"]))


def test_mistakes_in_several_stages_are_all_listed_each_with_its_stage(run: Path) -> None:
    made = pipeline(f"run={run}", "overrides.sft=['epochs=no']", "overrides.rm=['batch=0','epochz=1']")
    with pytest.raises(ConfigError) as refused:
        made.execute()
    text = str(refused.value)
    assert "sft: 1 mistake" in text
    assert "rm: 2 mistakes" in text
    assert not run.exists()


@pytest.mark.slow
def test_a_stopped_pipeline_stops_its_stage_which_saves_and_goes_on_later(run: Path) -> None:
    make(run)
    settings = ["model=gpt_3m", *TINY, "tokens=10240000"]
    command = [
        sys.executable, "-m", "megachat", "pipeline", f"run={run}", "log.wandb=disabled",
        "stages=[pretrain]", f"overrides.pretrain=[{','.join(settings)}]",
    ]  # fmt: skip
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    metrics, deadline = run / "pretrain" / "metrics.jsonl", time.monotonic() + 600
    while not (metrics.is_file() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.2)  # until the first step's row is there
    process.send_signal(signal.SIGTERM)
    _, printed = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "pretrain: asked to stop; saved at step" in printed
    assert "pretrain was stopped before its end" in printed
    assert not (run / "pretrain" / "done.json").exists()
