"""The benchmark's arithmetic, its input, and a whole run of what needs no environment of its own."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench import dedup
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
    (tmp_path / "truth.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    texts, truth = dedup.corpus([tmp_path / "text.jsonl.gz"], 1e6, seed=0)
    assert texts == ["text a", "text b", "text c"]
    assert truth == [Copy(0, 2, "framed", 0.9)]  # z was not read


@pytest.mark.parametrize("line", ['{"id": "b"}', "[1]", "not JSON"])
def test_a_line_without_a_text_is_named(tmp_path: Path, line: str):
    path = tmp_path / "text.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"text\.jsonl:2: no object with a text"):
        dedup.corpus([path], 1e6, seed=0)


def test_a_missing_rival_asked_for_by_name_is_exit_code_3(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dedup, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["dedup.py", "--only", "datatrove", "--megabytes", "0.1"])
    assert dedup.main() == 3
    assert "datatrove         not installed: bash tools/bench/setup.sh datatrove" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["megachat (numpy)", "datasketch"])
def test_a_run_prints_speed_recall_and_precision(name: str):
    """Of ten copies or so that are much alike, not one is missed, and nothing else is removed."""
    command = [sys.executable, "tools/bench/dedup.py", "--only", name, "--megabytes", "0.4"]
    root = Path(dedup.__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    row = next(line for line in done.stdout.splitlines() if line.startswith(name))
    _, megabytes, seconds, peak, _, _, recall, precision, removed = row.removeprefix(name).split()
    assert float(recall) == float(precision) == 1.0
    assert int(removed) >= 3
    assert float(megabytes) * float(seconds) == pytest.approx(0.45, abs=0.15)
    assert 50 < float(peak) < 400
