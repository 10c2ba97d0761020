"""Data that every faulty run reads, and the runs that nobody disturbed."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.ranks import Job
from tests.tiny_run import make

Start = Callable[..., Job]
Straight = Callable[..., Job]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a tokenizer and token shards."""
    return make(tmp_path_factory.mktemp("faults") / "runs" / "shards")


@pytest.fixture
def start(shards: Path, tmp_path: Path) -> Start:
    """`start("batch=8", ranks=2)`: a job to break."""

    def make_job(*settings: str, name: str = "job", **more: object) -> Job:
        return Job(tmp_path / name, shards, settings, **more)  # type: ignore[arg-type]

    return make_job


@pytest.fixture(scope="session")
def straight(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """`straight("batch=8", ranks=2)`: the finished job of these settings that nothing happened to."""
    done: dict[tuple[int, tuple[str, ...]], Job] = {}

    def get(*settings: str, ranks: int = 2, patience: float = 120.0) -> Job:
        if (ranks, settings) not in done:
            job = Job(tmp_path_factory.mktemp("straight"), shards, settings, ranks, patience)
            (attempt,) = job.go().attempts
            assert attempt.codes == [0] * ranks, attempt.said
            done[ranks, settings] = job
        return done[ranks, settings]

    return get
