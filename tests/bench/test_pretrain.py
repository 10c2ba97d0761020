"""The benchmark of pretraining: what it prepares, what it counts, and that all train on the same rows."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megachat.data.shards import Shard
from megachat.tokenizer.tokenizer import Tokenizer
from tests.tiny_run import environment
from tools.bench import clock, pretrain
from tools.bench.job import IGNORE, Job, labels_of

TINY = pretrain.Shape(
    "tiny",
    pretrain.LLAMA
    | {"dim": 32, "layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 16, "hidden": 64, "context": 32},
    vocab=512, context=32, micro_batch=2, batch=4,
)  # fmt: skip
STEPS = pretrain.SKIPPED + 2 * pretrain.INTERVAL + 1


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> pretrain.Prepared:
    """Rows of a small text for a tiny model."""
    return pretrain.prepare(tmp_path_factory.mktemp("bench"), TINY, STEPS, "cpu", most=200_000)


def took(speed: float) -> pretrain.Took:
    """A run of this speed in 2 GiB."""
    return pretrain.Took(speed, 2 * 2**30, 7.0, 6.0, None)


def test_speed_is_tokens_between_two_marks() -> None:
    seen = {3: (10.0, {"tokens": 300}), 6: (12.0, {"tokens": 600}), 9: (15.0, {"tokens": 900})}
    assert pretrain.speed(seen, 3, 9) == 120.0


def test_a_line_has_the_median_of_its_rounds_and_its_share_of_the_peak() -> None:
    lines = [line for line in pretrain.LINES if line.key in ("bare", "megachat")]
    rounds = {"bare": [took(90.0), took(110.0), took(100.0)], "megachat": [took(80.0)]}
    _, bare, ours = pretrain.rows(lines, {}, rounds, flops=5e9, peak=1e12)
    # 100 tokens/s of 5 GFLOP are half of 1 TFLOP/s; 90 to 110 is a fifth of 100.
    values = bare.removeprefix("bare loop, bf16 weights").split()
    assert values == ["100", "20.0%", "1.25", "50.0%", "2.00", "7.000", "->", "6.000"]
    assert ours.split()[1:5] == ["80", "0.0%", "1.00", "40.0%"]


def test_its_own_account_of_its_speed_has_a_line() -> None:
    lines = [line for line in pretrain.LINES if line.key == "megachat"]
    rounds = {"megachat": [replace(took(80.0), own=82.0), replace(took(90.0), own=92.0)]}
    *_, last = pretrain.rows(lines, {}, rounds, 1.0, 1.0)
    assert last == "megachat, by its own account: 87 tokens/s"


@pytest.mark.parametrize("key", ["trainer", "litgpt"])
def test_what_is_missing_and_asked_for_by_name_is_exit_code_3(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(clock, "VENVS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--only", "bare", key])
    assert pretrain.main() == 3
    name = {"trainer": "transformers"}.get(key, key)
    assert capsys.readouterr().out == f"{key:<32}not installed: bash tools/bench/setup.sh {name}\n"


def test_what_is_missing_takes_a_line() -> None:
    lines = [line for line in pretrain.LINES if line.key == "litgpt"]
    _, line = pretrain.rows(lines, {"litgpt": "bash tools/bench/setup.sh litgpt"}, {}, 1.0, 1.0)
    assert line == f"{'LitGPT':<32}not installed: bash tools/bench/setup.sh litgpt"


def test_a_stretched_tokenizer_has_more_tokens_and_writes_the_same(prepared: pretrain.Prepared) -> None:
    learnt = Tokenizer.load(prepared.folder / "tokenizer")
    larger = pretrain.stretched(learnt, learnt.vocab + 100)
    assert larger.vocab == learnt.vocab + 100
    text = "def test(): return <none512>"
    assert larger.encode(text) == learnt.encode(text)


def test_a_row_is_a_document_and_its_last_token_has_no_label(prepared: pretrain.Prepared) -> None:
    shard = Shard(prepared.folder / "encode" / "train" / "text")
    assert np.diff(shard.documents).tolist() == [TINY.context] * len(shard)
    rows = np.load(prepared.job.rows)
    assert rows.shape == (STEPS * TINY.batch, TINY.context)
    assert {row.tobytes() for row in rows} <= {row.tobytes() for row in shard.tokens.reshape(len(shard), -1)}
    assert labels_of(np.array([[5, 6, 7]])).tolist() == [[6, 7, IGNORE]]


def test_the_peak_is_what_no_product_of_that_size_exceeds() -> None:
    assert pretrain.matrix_peak("cpu") > 1e9


def test_a_mark_counts_once_its_line_is_whole(tmp_path: Path) -> None:
    marks = tmp_path / "marks.jsonl"
    write = f"""
import time
with open({str(marks)!r}, "w") as file:
    for text in ('{{"step": 1, ', '"tokens": 8}}\\n{{"step": 2, "tokens": 16}}\\n'):
        print(text, end="", file=file, flush=True)
        time.sleep(0.3)
"""
    with pretrain.running([sys.executable, "-c", write], [{}], tmp_path) as processes:
        seen = pretrain.follow(marks, 2, processes, tmp_path)
    assert {step: row["tokens"] for step, (_, row) in seen.items()} == {1: 8, 2: 16}


def test_a_program_that_ends_too_early_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('out of paper')"]
    with (
        pretrain.running(command, [{}], tmp_path) as processes,
        pytest.raises(RuntimeError, match="before its step 3:\nout of paper"),
    ):
        pretrain.follow(tmp_path / "marks.jsonl", 3, processes, tmp_path)


def test_the_most_a_process_has_held_is_what_it_filled(tmp_path: Path) -> None:
    fill = "import sys; held = bytearray(100_000_000); print('full', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", fill], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert 100e6 < pretrain.peak_of(process) < 200e6


@pytest.mark.slow
def test_the_bare_loop_learns_what_megachat_learns(prepared: pretrain.Prepared) -> None:
    lines = {line.key: line for line in pretrain.LINES}
    names = ("megachat", "zero1x2", "bare", "autocast")
    megachat, two, bare, autocast = (pretrain.run(lines[name], prepared, name) for name in names)
    assert megachat.own is not None
    for other in (two, bare, autocast):
        # The same rows in the same order, from the same weights: all that differs is where bf16 rounds.
        assert (other.first, other.loss) == pytest.approx((megachat.first, megachat.loss), abs=2e-3)
        assert other.speed > 0
        assert other.memory > 50e6
    assert megachat.loss < megachat.first


@pytest.mark.slow
@pytest.mark.parametrize("key", ["trainer", "litgpt-eager"])
def test_others_learn_as_well(key: str, prepared: pretrain.Prepared) -> None:
    line = next(line for line in pretrain.LINES if line.key == key)
    if remedy := line.missing():
        pytest.skip(f"{line.name} is not installed: {remedy}")
    took = pretrain.run(line, prepared, key)
    # From weights of their own: at first a token costs some log(512) = 6.2.
    assert 5.0 < took.loss < took.first < 6.5


def test_a_job_is_read_as_it_was_written(prepared: pretrain.Prepared, tmp_path: Path) -> None:
    prepared.job.write(tmp_path / "job.json")
    again = Job.read(tmp_path / "job.json")
    assert again.model == TINY.model
    first, second = again.micro_batches(1)
    rows = np.load(again.rows)[TINY.batch : 2 * TINY.batch]
    assert np.concatenate([first[0], second[0]]).tolist() == rows.tolist()


def test_what_bf16_loses_in_one_micro_batch_is_not_lost_in_the_sum() -> None:
    from tools.bench.runners import bare

    linear = torch.nn.Linear(2, 1, bias=False)
    masters = bare.copies(linear)
    for size in (1.0, 2.0**-9):  # their sum is not a number of bf16
        linear.weight.grad = torch.full_like(linear.weight, size)
        bare.add_up(linear, masters)
    assert masters[0].grad is not None
    assert masters[0].grad.tolist() == [[1 + 2.0**-9] * 2]
    assert linear.weight.grad is None
