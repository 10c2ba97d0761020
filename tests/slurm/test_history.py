"""How many restarts have come to nothing."""

from pathlib import Path

import pytest

from megachat.slurm.history import KEPT, History, newest_step


def after(*attempts: tuple[int, bool]) -> History:
    """A job's attempts: the step that each began at, and whether it failed."""
    history = History("7")
    for restart, (step, failed) in enumerate(attempts):
        history.begin(restart, ["node1"], step)
        history.end("because", failed)
    return history


FAILED, ASKED = True, False


@pytest.mark.parametrize(
    ("attempts", "step", "count"),
    [
        ([(-1, FAILED)], -1, 0),  # the first attempt is no restart
        ([(-1, FAILED)] * 4, -1, 3),
        ([(-1, FAILED), (10, FAILED), (10, FAILED)], 10, 2),  # the first has brought a checkpoint
        ([(-1, FAILED), (10, FAILED), (10, FAILED)], 20, 0),  # the last has
        ([(-1, FAILED), (-1, FAILED), (10, FAILED)], 10, 1),
        (
            [(10, ASKED), (10, FAILED), (10, ASKED), (10, FAILED)],
            10,
            2,
        ),  # to be asked neither counts nor helps
        ([(10, FAILED), (10, ASKED), (12, FAILED)], 12, 1),  # unless it has brought one
    ],
)
def test_restarts_that_came_to_nothing(attempts: list[tuple[int, bool]], step: int, count: int) -> None:
    assert after(*attempts).fruitless(step) == count


def test_restarts_that_were_asked_to_stop_too_early_are_counted_apart() -> None:
    attempts = after((-1, FAILED), (-1, ASKED), (-1, FAILED), (-1, ASKED))
    assert attempts.fruitless(-1, failed=False) == 2
    assert attempts.fruitless(4, failed=False) == 0


def test_an_attempt_that_never_said_how_it_ended_has_failed(tmp_path: Path) -> None:
    path = tmp_path / "restarts.json"
    for restart in range(3):
        history = History.read(path, "7")
        history.begin(restart, ["node1"], -1)
        history.write(path)
    assert history.fruitless(-1) == 2
    assert history.attempts[0].reason == "ended without a word: its node failed, or it was killed"


def test_every_fruitless_restart_counts_however_many_there_are(tmp_path: Path) -> None:
    path = tmp_path / "restarts.json"
    for restart in range(50):
        history = History.read(path, "7")
        history.begin(restart, ["node1"], -1).last_lines = ["Traceback"]
        history.end("because", failed=True)
        history.write(path)
    assert History.read(path, "7").fruitless(-1) == 49
    assert path.read_text().count("Traceback") == KEPT


@pytest.mark.parametrize(
    ("attempts", "suspect"),
    [
        ([("b", FAILED)], ""),
        ([("b", FAILED), ("b", FAILED)], "b"),
        ([("a", FAILED), ("b", FAILED), ("b", FAILED)], "b"),
        ([("b", FAILED), ("a", FAILED)], ""),
        ([("b", FAILED), ("b", ASKED), ("b", FAILED)], ""),
        ([("", FAILED), ("", FAILED)], ""),  # rank 0, or several at once
    ],
)
def test_a_node_that_ends_two_attempts_in_a_row_is_suspect(
    attempts: list[tuple[str, bool]], suspect: str
) -> None:
    history = after(*((-1, failed) for _, failed in attempts))
    for one, (node, _) in zip(history.attempts, attempts, strict=True):
        one.culprit = node
    assert history.suspect() == suspect


def test_attempts_of_another_job_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "restarts.json"
    after((-1, FAILED), (-1, FAILED)).write(path)
    assert len(History.read(path, "7").attempts) == 2
    assert History.read(path, "8") == History("8")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"job": "7", "attempts": [{"step": 1}]}'])
def test_a_file_that_cannot_be_read_tells_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "restarts.json").write_text(text)
    assert History.read(tmp_path / "restarts.json", "7") == History("7")


def test_the_newest_checkpoint_is_the_newest_with_a_manifest(tmp_path: Path) -> None:
    assert newest_step(tmp_path) == -1
    for name in ("step-00000004", "step-00000012", "step-00000020.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "manifest.json").touch()
    (tmp_path / "checkpoints" / "step-00000016").mkdir()
    assert newest_step(tmp_path) == 12
