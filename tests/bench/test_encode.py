"""The encoding benchmark: what it prepares, what it counts, and a whole run of what needs no environment."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megachat.data.conversations import share
from megachat.data.document import read_documents
from tools.bench import clock, encode

ROOT = Path(encode.__file__).parents[2]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> encode.Prepared:
    """Half a megabyte, in files of 4 MB."""
    return encode.prepare(tmp_path_factory.mktemp("bench"), [], 500_000, 1000)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("tokenizers", "bash tools/bench/setup.sh tokenizers"),
        ("gigatoken", "bash tools/bench/setup.sh gigatoken"),
        ("megachat (gigatoken)", "pip install 'megachat[fast]'"),
    ],
)
def test_what_is_missing_and_asked_for_by_name_is_exit_code_3(
    name: str,
    remedy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(clock, "VENVS", tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    monkeypatch.setattr(sys, "argv", ["encode.py", "--only", name])
    assert encode.main() == 3
    assert capsys.readouterr().out == f"{name:<26}not installed: {remedy}\n"


def test_what_is_missing_takes_a_line_and_the_others_are_measured(
    prepared: encode.Prepared, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = {"tokenizers": "bash tools/bench/setup.sh tokenizers"}
    encode.table(encode.LINES[:2], absent, prepared, 1)
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.split()[0] == "sentencepiece"
    assert first.split()[-1] == "1.00"
    assert second.split(maxsplit=1) == ["tokenizers", "not installed: bash tools/bench/setup.sh tokenizers"]


def test_a_rate_is_for_each_core_and_times_are_those_of_the_clock() -> None:
    base = {"wall": 8.0, "seconds": 8.0, "tokens": 10_000_000, "digests": ["a", "b"]}
    told = {"wall": 2.0, "seconds": 3.5, "start": 1.0, "digests": ["a", "b"], "fallen": 0}
    assert encode.figures(told, base, 40_000_000, cores=2).split() == [
        "2.00",
        "3.50",
        "10.00",
        "2.500",
        "4.00",
        "1.00",
        "8.00",
    ]
    fallen = told | {"fallen": 3}
    assert encode.figures(fallen, base, 40_000_000, cores=2).endswith("  3 files fell back")


def test_other_ids_are_not_counted() -> None:
    base: dict[str, Any] = {"wall": 1.0, "seconds": 1.0, "tokens": 2, "digests": ["a", "b"]}
    line = encode.figures(base | {"digests": ["a", "c"]}, base, 2, cores=1)
    assert line == "  not counted: 1 of 2 texts have other ids"


def test_files_are_as_large_as_clean_cuts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "PER_SHARD", 10)
    documents = [encode.Document(str(number), "words", "text") for number in range(5)]
    assert [len(shard) for shard in encode.shards(documents)] == [2, 2, 1]


def test_every_text_is_in_the_run_that_is_prepared_and_some_are_for_validation(
    prepared: encode.Prepared,
) -> None:
    assert list(read_documents(prepared.folder / "all" / "clean")) == prepared.documents
    rows = [json.loads(line) for line in prepared.text.read_text(encoding="utf-8").splitlines()]
    assert [row["text"] for row in rows] == [document.text for document in prepared.documents]
    for folder in ("all", "few"):
        documents = list(read_documents(prepared.folder / folder / "clean"))
        held = sum(share(document.id) < prepared.validation for document in documents)
        assert 0 < held < len(documents)


def test_a_text_with_sentencepieces_own_space_is_given_to_nobody(tmp_path: Path) -> None:
    rows = ["a plain text of a few words " * 50, "a \u2581 in it"]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    (document,) = encode.prepare(tmp_path / "out", [path], 1e6, 300).documents
    assert document.text == rows[0]


@pytest.mark.slow
def test_the_stage_writes_sentencepieces_ids_and_its_start_is_told(
    prepared: encode.Prepared, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [line for line in encode.LINES if line.name in ("sentencepiece", "megachat (sentencepiece)")]
    encode.table(lines[:2], {}, prepared, 1)
    _, base, stage = capsys.readouterr().out.splitlines()
    assert stage.startswith("megachat (sentencepiece)       1")
    assert float(base.split()[-1]) == 1.0
    *_, times, start, _ = stage.split()
    assert 0 < float(times) < 1  # half a megabyte takes less time than Python's start
    assert float(start) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokenizers", "gigatoken"])
def test_other_programs_have_the_same_ids(name: str, prepared: encode.Prepared) -> None:
    if remedy := clock.missing(name):
        pytest.skip(f"{name} is not installed: {remedy}")
    base, other = (
        clock.run(who, where, prepared.tokenizer, prepared.text)
        for who, where in (("sentencepiece", ""), (name, name))
    )
    assert other["digests"] == base["digests"]
    assert other["tokens"] == base["tokens"]


@pytest.mark.slow
def test_it_is_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "tools/bench/encode.py", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "megachat (gigatoken)" in done.stdout
