"""Asked to stop, a run saves what it has and loses no step, whenever it is asked."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from megachat.run import perform
from megachat.train.pretrain import Pretrain
from tests.spawn import on_ranks
from tests.tiny_run import make, pretrain, rows

EVERY = ["validation_interval=5"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make(tmp_path_factory.mktemp("stopping") / "runs" / "tiny")
    straight(run=run)
    return run


@on_ranks(1)
def straight(run: Path) -> None:
    perform(pretrain(run, *EVERY))


def told(run: Path) -> dict[float, dict[str, float]]:
    """The losses and validations of each step; a resumed run may tell of a step in two rows."""
    found: dict[float, dict[str, float]] = {}
    for row in rows(run):
        kept = {name: row[name] for name in row if name == "loss" or name.startswith("validation/")}
        found.setdefault(row["step"], {}).update(kept)
    return found


@pytest.mark.slow
@on_ranks(1)
def test_no_step_and_no_validation_is_lost_whenever_a_signal_comes(tiny: Path, tmp_path: Path) -> None:
    expected = told(tiny)
    whole_loss, whole_prepare, whole_measure = Pretrain.loss, Pretrain.prepare, Pretrain.measure
    measured: list[int] = []
    asked: list[int] = []
    # While data are prepared, in an early step, in one that a validation follows, in the last one; and in
    # a validation, which is not waited for: at -5 and at -12.
    for at in (None, 2, 4, 11, -5, -12):
        run = tmp_path / f"at-{at}"

        def prepare(task: Any, state: Any, at: int | None = at) -> int:
            if at is None:
                os.kill(os.getpid(), signal.SIGTERM)
            return whole_prepare(task, state)

        def loss(task: Any, state: Any, batch: Any, at: int | None = at) -> Any:
            if state.progress.step == at:
                os.kill(os.getpid(), signal.SIGUSR1)
                os.kill(os.getpid(), signal.SIGTERM)  # a second one does no harm
            return whole_loss(task, state, batch)

        def measure(task: Any, state: Any, at: int | None = at) -> dict[str, float]:
            if at == -state.progress.step and at not in asked:
                asked.append(at)
                os.kill(os.getpid(), signal.SIGUSR1)
            figures = whole_measure(task, state)
            measured.append(state.progress.step)
            return figures

        Pretrain.prepare, Pretrain.loss, Pretrain.measure = prepare, loss, measure  # type: ignore[method-assign]
        perform(pretrain(run, *EVERY, f"inputs={tiny}"))
        steps = 0 if at is None else -at if at < 0 else at + 1
        assert len(rows(run)) == steps
        saved = [path.name for path in (run / "pretrain").glob("checkpoints/step-*")]
        assert saved == ([f"step-{steps:08d}"] if steps else [])
        assert not (run / "pretrain" / "done.json").exists()
        Pretrain.prepare, Pretrain.loss = whole_prepare, whole_loss  # type: ignore[method-assign]
        perform(pretrain(run, *EVERY, f"inputs={tiny}"))
        assert (run / "pretrain" / "done.json").exists()
        assert told(run) == expected, at
    run = tmp_path / "at-4"
    (run / "pretrain" / "done.json").unlink()  # as if it had been killed between its last checkpoint and this
    perform(pretrain(run, *EVERY, f"inputs={tiny}"))
    assert (run / "pretrain" / "done.json").exists()
    assert told(run) == expected
    assert measured == [5, 10, 12] * 6  # each validation once
