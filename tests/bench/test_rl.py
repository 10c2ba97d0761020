"""The benchmark of reinforcement learning: what it asks, what it counts, and that all do the same work."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tools.bench import clock, rl
from tools.bench.ask import Ask, until

LINES = {line.key: line for line in rl.LINES}
TRAINERS = {line.key: line for line in rl.TRAINERS}
TINY = rl.Shape(
    "tiny",
    rl.COMMON | {"dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "hidden": 48, "qk_norm": True},
    300,
)
FEW = rl.Work("few", prompts=5, shortest=2, longest=9, new=7, ends=0.0)


def ask(folder: Path, work: rl.Work = FEW, temperature: float = 0.0) -> Ask:
    """Of a tiny model."""
    return rl.asked(folder, TINY, work, "float32", rounds=2, temperature=temperature)


def test_a_line_has_the_median_of_its_rounds_and_how_many_times_transformers_speed_it_is() -> None:
    told = {
        "transformers": {"seconds": [2.0, 1.0, 4.0], "tokens": [400, 400, 400], "peak": 2**30},
        "megachat": {"seconds": [0.5], "tokens": [300], "peak": 2**29},
    }
    *_, theirs, ours = rl.table(rl.LINES, told, "a title")
    # 200, 400 and 100 tokens/s; 600 / 200.
    assert theirs.split() == ["transformers", "generate", "200", "150.0%", "1.00", "1.00", "400"]
    assert ours.split() == ["megachat", "600", "0.0%", "3.00", "0.50", "300"]


def test_what_is_missing_takes_a_line_and_asked_for_by_name_is_exit_code_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(clock, "VENVS", tmp_path)
    *_, line = rl.table([LINES["transformers"]], {}, "a title")
    assert line == f"{'transformers generate':<32}not installed: bash tools/bench/setup.sh transformers"
    monkeypatch.setattr(sys, "argv", ["rl.py", "--only", "transformers"])
    assert rl.main() == 3
    assert "not installed: bash tools/bench/setup.sh transformers" in capsys.readouterr().out


def test_an_answer_is_cut_after_the_token_that_ends_it() -> None:
    assert until([5, 6, 7, 6], [6, 7]) == [5, 6]
    assert until([5, 6], []) == [5, 6]


def test_megachat_is_asked_for_answers_that_differ_from_round_to_round(tmp_path: Path) -> None:
    told = rl.run(LINES["megachat"], ask(tmp_path, replace(FEW, ends=0.2), 1.0), tmp_path)
    assert all(1 <= len(answer) <= 7 for answer in told["answers"])
    assert all(token >= 60 for answer in told["answers"] for token in answer[:-1])
    some, others = told["tokens"]
    assert some != others
    assert len(told["seconds"]) == 2
    assert told["peak"] > 50e6


@pytest.mark.slow
def test_transformers_writes_the_same_greedy_answers_from_the_same_weights(tmp_path: Path) -> None:
    line = LINES["transformers"]
    if remedy := clock.missing(line.environment):
        pytest.skip(f"{line.name} is not installed: {remedy}")
    same = ask(tmp_path, replace(FEW, ends=0.2))
    theirs, ours = (rl.run(LINES[key], same, tmp_path) for key in ("transformers", "megachat"))
    assert theirs["answers"] == ours["answers"]
    assert len({len(answer) for answer in ours["answers"]}) > 1


def test_a_trainers_line_has_the_median_of_its_steps_and_how_many_times_trls_speed_it_is() -> None:
    told = {
        "trl": {"seconds": [3.0, 2.0, 7.0], "peak": 2**30},
        "megachat": {"seconds": [0.5, 2.0], "peak": 2**29},
    }
    *_, theirs, ours = rl.steps_table(rl.TRAINERS, told, "a title")
    assert theirs.split() == ["TRL", "3.00", "2.00", "7.00", "1.00", "1.00"]
    assert ours.split() == ["megachat", "1.25", "0.50", "2.00", "2.40", "0.50"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["grpo", "dpo"])
def test_trl_starts_from_the_loss_that_megachat_starts_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    few = replace(
        rl.TRAININGS[stage], batch=8, micro_batch=4, group=rl.TRAININGS[stage].group // 2 or 1, new=8
    )
    monkeypatch.setitem(rl.TRAININGS, stage, few)
    lesson = rl.prepared(tmp_path, replace(TINY, vocab=1024), stage, "float32", count=1)
    ours = rl.teach(TRAINERS["megachat"], stage, lesson, tmp_path)
    assert len(ours["seconds"]) == 1
    assert ours["losses"][0] == pytest.approx(math.log(2) if stage == "dpo" else 0.0, abs=1e-5)
    if remedy := clock.missing(TRAINERS["trl"].environment):
        pytest.skip(f"TRL is not installed: {remedy}")
    theirs = rl.teach(TRAINERS["trl"], stage, lesson, tmp_path)
    assert theirs["losses"][0] == pytest.approx(ours["losses"][0], abs=1e-5)
