"""Run folders: what counts as finished, what is done again, and what is never lost."""

import json
import os
import socket
from pathlib import Path

import pytest
import yaml

from megachat.config import compose, redact
from megachat.files import replacing
from megachat.run import Stage, begin, external, finished, perform, put_back
from tests.tiny_model import finish


def clean(run: Path, *overrides: str) -> Stage:
    corpus = ["corpus=[plain_text]", f"corpus.plain_text.paths=[{run.parent}/*.txt]", "filters=none"]
    return Stage.of(compose("clean", [f"run={run}", "dedup=exact", *corpus, *overrides]))


@pytest.fixture
def text(run: Path) -> Path:
    path = run.parent / "a.txt"
    path.parent.mkdir(parents=True)
    path.write_text("Some text.")
    return path


def test_a_finished_stage_is_done_again_when_a_setting_or_a_file_has_changed(run: Path, text: Path) -> None:
    perform(clean(run))
    assert not begin(clean(run))
    assert not begin(clean(run, "executor.processes=1"))  # changes nothing in what is made
    assert begin(clean(run, "shards=7"))
    perform(clean(run))
    (text.parent / "b.txt").write_text("More text.")
    assert begin(clean(run))


def test_a_finished_stage_that_has_lost_a_file_says_how_to_make_it_again(run: Path, text: Path) -> None:
    perform(clean(run))
    lost = next(run.glob("clean/text-*"))
    lost.unlink()
    with pytest.raises(
        ValueError, match=rf"`clean` has finished, and {lost} is missing; .* delete {run}.clean"
    ):
        begin(clean(run))


def test_what_other_settings_made_is_set_aside(
    run: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    perform(clean(run))
    before = finished(run / "clean")
    perform(clean(run, "shards=7"))
    assert "\n  shards: 0 -> 7\n" in capsys.readouterr().err
    (aside,) = (run / "replaced").iterdir()
    assert finished(aside) == before
    assert yaml.safe_load((aside / "config.yaml").read_text())["shards"] == 0


def test_what_was_set_aside_returns_when_nothing_could_be_made_in_its_place(run: Path, text: Path) -> None:
    perform(clean(run))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="no file matches"):
        perform(clean(run, f"corpus.plain_text.paths=[{text.parent}/*.typo]"))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert not begin(clean(run))


def test_what_was_set_aside_does_not_replace_what_another_start_makes_or_a_checkpoint(
    run: Path, text: Path
) -> None:
    perform(clean(run))
    stage = clean(run, "shards=7")
    assert begin(stage)
    stage.folder.mkdir()
    attempt = stage.folder / "attempt.json"
    attempt.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid() + 1}))
    put_back(stage)
    assert attempt.exists()
    attempt.unlink()
    saved = stage.folder / "checkpoints" / "step-00000001"
    saved.mkdir(parents=True)
    put_back(stage)
    assert saved.exists()
    saved.rmdir()
    attempt.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
    put_back(stage)
    assert finished(stage.folder)


@pytest.mark.parametrize("pattern", ["{}/*.txt", "{}/**/*.txt", "{}/a.txt"])
def test_files_are_noticed_however_they_are_named(text: Path, pattern: str) -> None:
    named = {"block": {"paths": [pattern.format(text.parent)]}}
    before = external(named)
    text.write_text("Other text, longer.")
    assert len(before) == 1
    assert external(named) != before


def test_a_stage_reads_its_own_run_first_and_what_that_lacks_from_inputs(run: Path) -> None:
    lender = run.parent / "lender"
    for folder in (lender / "clean", lender / "tokenizer", run / "tokenizer"):
        folder.mkdir(parents=True)
        finish(folder)
    stage = Stage.of(compose("encode", [f"run={run}", f"inputs={lender}"]))
    assert stage.input("clean") == lender / "clean"
    assert stage.input("tokenizer") == run / "tokenizer"


def test_a_stage_that_was_begun_here_is_not_read_from_inputs_without_a_word(run: Path) -> None:
    other = run.parent / "other"
    finish(other / "tokenizer")
    stage = Stage.of(compose("encode", [f"run={run}", f"inputs={other}"]))
    assert stage.input("tokenizer") == other / "tokenizer"
    (run / "tokenizer").mkdir(parents=True)
    (run / "tokenizer" / "config.yaml").touch()
    with pytest.raises(
        ValueError, match=r"was begun in .* and has not finished; run `megachat tokenizer run="
    ):
        stage.input("tokenizer")
    finish(run / "tokenizer")
    assert stage.input("tokenizer") == run / "tokenizer"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("1")

    def write() -> None:
        with replacing(path) as temporary:
            temporary.write_text("2")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        write()
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.json", "1")]


def test_secrets_are_not_written_down() -> None:
    hidden = redact({"judge": {"api_key": "s", "url": "u"}, "password": "p", "monkey": 1})
    assert hidden == {"judge": {"api_key": "(redacted)", "url": "u"}, "password": "(redacted)", "monkey": 1}
