"""The benchmark's arithmetic, its input, and a whole run of what needs no environment of its own."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench import clock, dedup
from tools.bench.planted import Copy

TRUTH = [Copy(0, 1, "replaced", 0.95), Copy(2, 3, "replaced", 0.85), Copy(4, 5, "replaced", 0.75)]


@pytest.mark.parametrize(("threshold", "expected"), [(0.7, 2 / 3), (0.8, 1 / 2), (0.9, 1.0)])
def test_a_pair_is_recalled_if_either_of_it_is_removed(threshold: float, expected: float):
    assert dedup.recall(TRUTH, {0, 5}, threshold) == pytest.approx(expected)


def test_a_removal_is_right_if_a_document_like_it_stays():
    near = {1: {0}, 2: {3}, 3: {2}, 4: set()}
    assert dedup.precision(near, {1, 2, 3, 4}) == 1 / 4  # 2 and 3 took each other along, 4 was like none


def test_where_there_is_nothing_to_find_there_is_no_share():
    assert dedup.recall([], {1}, 0.8) is None
    assert dedup.precision({}, set()) is None
    assert dedup.share(None) == "-"


def test_the_truth_beside_the_files_is_taken_and_nothing_planted(tmp_path: Path):
    rows = [{"id": name, "text": f"text {name}"} for name in "abc"]
    with gzip.open(tmp_path / "text.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    pairs = [
        {"id": "c", "of": "a", "kind": "framed", "jaccard": 0.9},
        {"id": "z", "of": "a", "kind": "", "jaccard": 1},
    ]
    (tmp_path / "_truth.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    texts, truth = dedup.corpus([tmp_path / "text.jsonl.gz"], 1e6, seed=0)
    assert texts == ["text a", "text b", "text c"]
    assert truth == [Copy(0, 2, "framed", 0.9)]  # z was not read


@pytest.mark.parametrize("line", ['{"id": "b"}', "[1]", "not JSON"])
def test_a_line_without_a_text_is_named(tmp_path: Path, line: str):
    path = tmp_path / "text.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"text\.jsonl:2: no object with a text"):
        dedup.corpus([path], 1e6, seed=0)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("megachat (numba)", "pip install 'megachat[fast]'"),
        ("text-dedup", "bash tools/bench/setup.sh text-dedup"),
        ("datatrove", "bash tools/bench/setup.sh datatrove"),
    ],
)
def test_a_missing_rival_asked_for_by_name_is_exit_code_3(
    name: str, remedy: str, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(clock, "VENVS", tmp_path)
    monkeypatch.setattr(dedup, "available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["dedup.py", "--only", name, "--megabytes", "0.1"])
    assert dedup.main() == 3
    assert f"{name:<18}not installed: {remedy}" in capsys.readouterr().out


def test_time_by_the_clock_is_shown_where_it_is_not_the_processors():
    assert dedup.apart({"seconds": 1.0, "wall": 1.04}) == ""
    assert dedup.apart({"seconds": 1.0, "wall": 1.5}) == "1.50"
    assert dedup.rate({"seconds": 0.5, "wall": 0.51}, 50) == "100.00 (50.0 MB)"
    assert dedup.rate({"seconds": 0.5, "wall": 1.0}, 50) == "100.00 (wall 50.00, 50.0 MB)"


def test_room_on_disk_is_for_each_document():
    assert dedup.per_document(3000, 10) == "300"
    assert dedup.per_document(0, 10) == "memory"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["megachat (numpy)", "datasketch"])
def test_a_run_prints_speed_recall_and_precision(name: str):
    """Of ten copies or so that are much alike, not one is missed, and nothing else is removed."""
    command = [sys.executable, "tools/bench/dedup.py", "--only", name, "--megabytes", "0.4"]
    root = Path(dedup.__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    row = next(line for line in done.stdout.splitlines() if line.startswith(name))
    found = row.removeprefix(name).split()
    _, megabytes, seconds = found[:3]
    peak, disk, _, _, recall, precision, removed = found[-7:]  # the time by the clock may stand before them
    assert float(recall) == float(precision) == 1.0
    assert int(removed) >= 3
    assert float(megabytes) * float(seconds) == pytest.approx(0.45, abs=0.15)
    assert 50 < float(peak) < 400
    assert disk == "memory" if name == "datasketch" else 290 < int(disk) < 400  # of few documents
