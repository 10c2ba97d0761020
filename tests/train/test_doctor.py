"""What `megachat doctor` says of a run before it is run, and its exit code."""

import shutil
from pathlib import Path

import pytest

from megachat.__main__ import main
from megachat.config import compose
from megachat.parallel.link import measure
from megachat.run import Stage, perform
from megachat.train.doctor import duration, file_system, write_speed
from tests.tiny_run import TINY, make

LARGE = ["model=gpt_7b", "parallel=zero1_tp8", "gpus=256", "device=H100", "tokens=142000000000", "batch=512"]


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("doctor") / "runs" / "made")


def doctor(capsys: pytest.CaptureFixture[str], *overrides: str) -> tuple[int, str]:
    """The exit code, and what is printed."""
    try:
        main(["doctor", "probe=false", *overrides])
        code = 0
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    return code, capsys.readouterr().out


def test_a_cluster_is_planned_where_there_is_none(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = doctor(capsys, f"run={run}", *LARGE, "micro_batch=1", "price=2", "mfu=0.5")
    assert code == 0
    assert "A 7.11 B model on 256 x H100" in said
    # 142e9 tokens x 47.5 GFLOP / (256 x 989 TFLOP/s x 0.5) = 53,300 s, times 256 GPUs 3,790 hours.
    assert "14.8 hours, 2.66 M tokens a second" in said
    assert "GPU-hours" in said
    assert not run.exists()


def test_what_does_not_fit_is_a_problem_and_the_exit_code_is_1(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = doctor(capsys, f"run={run}", *LARGE, "device=RTX 3090", "micro_batch=8")
    assert code == 1
    assert "PROBLEM  memory" in said
    assert said.endswith("1 problem, 0 warnings\n")


def test_before_encode_it_says_what_it_could_not_look_at(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = doctor(capsys, f"run={run}", "model=gpt_3m", "vocab=4096")
    assert code == 0
    assert "`encode` has not finished" in said
    assert "4,096 words are assumed" in said
    assert "A 3.52 M model on 1 x this CPU" in said  # as conf/model/gpt_3m.yaml says


def test_the_corpus_is_compared_with_the_budget(encoded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = doctor(capsys, f"run={encoded}", "model=gpt_3m", *TINY, "tokens=3000000")
    assert code == 0
    assert "ok       tokenizer: 300 words" in said
    assert "WARNING  corpus" in said
    code, said = doctor(capsys, f"run={encoded}", "model=gpt_3m", *TINY, "tokens=null", "epochs=1")
    assert "which are read 1 times" in said


def test_shards_of_another_tokenizer_and_a_source_that_is_not_there_are_problems(
    encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "other"
    shutil.copytree(encoded, run)
    perform(Stage.of(compose("tokenizer", [f"run={run}", "vocab=301", "threads=1", "log.wandb=disabled"])))
    weights = ["mixture=weighted", "mixture.weights={wiki: 1}"]
    code, said = doctor(capsys, f"run={run}", "model=gpt_3m", *TINY, *weights)
    assert code == 1
    assert "was encoded with another tokenizer" in said
    assert "the mixture names wiki" in said


def test_an_experiments_settings_are_those_of_pretraining() -> None:
    ours, theirs = (compose(stage, ["experiment=quickstart"]) for stage in ("doctor", "pretrain"))
    assert {key: ours[key] for key in theirs if key != "_target_"} == {
        key: theirs[key] for key in theirs if key != "_target_"
    }
    assert ours["vocab"] == 4096  # of conf/experiment/quickstart/doctor.yaml, for there is no tokenizer yet


@pytest.mark.slow
def test_two_ranks_of_this_machine_sum_a_tensor_and_a_timebox_ends_it() -> None:
    speed, wrong = measure(2, 60.0)
    assert (speed > 0, wrong) == (True, "")
    assert measure(2, 0.1) == (0.0, "no answer in 0.1 s")


def test_the_disk_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    assert write_speed(tmp_path) > 0
    assert list(tmp_path.iterdir()) == []
    assert file_system(Path("/proc/self")) == "proc"


def test_durations_are_in_the_unit_that_one_would_use() -> None:
    assert [duration(seconds) for seconds in (30.0, 90.0, 7200.0, 100_000.0)] == [
        "30 seconds", "1.5 minutes", "2.0 hours", "1.2 days",
    ]  # fmt: skip
