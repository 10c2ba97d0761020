"""What is recorded: rows that survive a kill, text with any character, and where W&B records."""

import errno
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megachat import log
from megachat.config import compose
from megachat.log import Recorder, chosen_mode
from megachat.run import Stage
from tests.tiny_run import rows


@pytest.fixture
def stage(run: Path) -> Stage:
    (run / "pretrain").mkdir(parents=True)
    return Stage.of(compose("pretrain", [f"run={run}", "log.wandb=disabled"]))


def test_a_run_that_goes_on_drops_later_rows_and_half_a_line(stage: Stage, run: Path) -> None:
    with Recorder(stage) as recorder:
        for step in (1, 2, 3):
            recorder.row({"step": step, "loss": 4.0 - step})
    with (run / "pretrain" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed here
    with Recorder(stage, step=2) as recorder:
        recorder.row({"step": 3, "loss": 0.5})
    assert rows(run) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 0.5}]


def test_what_a_lost_power_supply_has_left_in_the_log_does_not_stop_a_run(stage: Stage, run: Path) -> None:
    path = run / "pretrain" / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 3.0}\n' + bytes(20) + b'\n[1]\n\xff\n{"step": 2, "loss": 2.0}\n')
    Recorder(stage, step=2)
    assert rows(run) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]


def test_a_sample_may_hold_what_looks_like_the_end_of_a_line(stage: Stage, run: Path) -> None:
    odd = "a\u2028b\u0085c\nd"
    with Recorder(stage) as recorder:
        recorder.sample(1, odd)
    Recorder(stage, step=1)  # reads it
    assert odd.replace("\n", "\\n") in (run / "pretrain" / "samples.jsonl").read_text(encoding="utf-8")


def test_a_slow_disk_holds_up_no_step_and_loses_no_row(
    stage: Stage, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free, write = threading.Event(), log.append

    def slow(path: Path, row: Mapping[str, Any]) -> None:
        assert free.wait(60)
        write(path, row)

    monkeypatch.setattr(log, "append", slow)
    with Recorder(stage) as recorder:
        for step in (1, 2, 3):
            recorder.row({"step": step})  # none has been written, and the run goes on
        assert not (run / "pretrain" / "metrics.jsonl").read_text()
        free.set()
        recorder.rewind(2)
        recorder.row({"step": 3, "loss": 0.5})
    assert rows(run) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5}]
    assert not any(thread.name.startswith("recorder") for thread in threading.enumerate())


def test_a_mistake_of_ours_in_the_thread_ends_the_run(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "append", lambda path, row: row["loss"])
    with pytest.raises(KeyError, match="loss"), Recorder(stage) as recorder:
        recorder.row({"step": 1})


def test_a_full_disk_and_a_failing_wandb_do_not_end_a_run(
    stage: Stage, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Recorder(stage) as recorder:
        recorder.row({"step": 1})
        recorder.written()
        recorder.wandb = SimpleNamespace(log=full)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", full)
            patch.setattr("os.replace", full)
            recorder.row({"step": 2})
            recorder.rewind(0)
            recorder.row({"step": 3})
            recorder.written()
        recorder.row({"step": 4})
    assert rows(run) == [{"step": 1}, {"step": 4}]
    said = capsys.readouterr().err
    assert said.count("metrics.jsonl cannot be written") == 1
    assert said.count("W&B fails (OSError(28") == 1


def test_answers_are_a_table_and_those_behind_the_step_of_a_run_that_goes_on_are_dropped(
    stage: Stage, run: Path
) -> None:
    told: list[dict[str, Any]] = []
    answers = [{"prompt": "6 * 7", "reward": 1.0}, {"prompt": "1 + 1", "tokens": 3}]
    with Recorder(stage) as recorder:
        recorder.wandb = SimpleNamespace(log=lambda row, step: told.append(row | {"step": step}))
        recorder.answers(4, answers)
        recorder.answers(8, answers)
        recorder.answers(9, [])
        recorder.written()
        recorder.rewind(4)
        recorder.wandb = None
    lines = (run / "pretrain" / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 4, **answer} for answer in answers]
    assert [row["step"] for row in told] == [4, 8]
    assert told[0]["answers"].columns == ["prompt", "reward", "tokens"]
    assert told[0]["answers"].data == [["6 * 7", 1.0, None], ["1 + 1", None, 3]]


@pytest.mark.parametrize(("said", "mode"), [("offline", "offline"), ("disabled", "disabled"), ("", "online")])
def test_the_environment_decides_where_wandb_records_before_the_login_does(
    said: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_MODE", said)
    assert chosen_mode() == mode
