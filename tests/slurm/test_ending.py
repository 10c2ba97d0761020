"""What the supervisor of a job decides, without Slurm."""

import pytest

from megachat.slurm.ending import Done, Facts, GiveUp, Requeue, ending

CRASHED = {"code": 137, "culprit": "rank 1 on node2: killed"}


@pytest.mark.parametrize(
    ("facts", "what"),
    [
        (Facts(code=0, done=True), Done()),
        (Facts(code=139, done=True), Done()),  # a crash on the way out
        (Facts(code=0, asked="SIGUSR1"), Requeue("asked to stop by SIGUSR1", failed=False)),
        # A rank that is asked before it can answer dies of it.
        (Facts(**CRASHED, asked="SIGUSR1"), Requeue("asked to stop by SIGUSR1", failed=False)),
        (Facts(**CRASHED), Requeue("rank 1 on node2: killed", failed=True)),
        (Facts(code=0), Requeue("the ranks were asked to stop", failed=False)),  # not through the supervisor
        (Facts(code=2, unfit=("a",)), Requeue("unfit for training: a", failed=True)),  # no program to start
        (Facts(code=1), Requeue("srun ended with status 1", failed=True)),
        (Facts(**CRASHED, hung="no sign of life for 9 s"), Requeue("no sign of life for 9 s", failed=True)),
        (Facts(code=143, unfit=("a", "b")), Requeue("unfit for training: a, b", failed=True)),
    ],
)
def test_it_ends_so(facts: Facts, what: object) -> None:
    assert ending(facts) == what


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (Facts(code=1, refused="batch=7 cannot be shared"), "batch=7 cannot be shared"),
        (Facts(code=2), "the settings are refused"),
        (Facts(**CRASHED, asked="SIGTERM", running=False), "Slurm ends this job"),  # scancel
        (Facts(code=1, refused="superseded", taken="12"), "the run belongs to job 12 now"),
        (Facts(**CRASHED, fruitless=3), "rank 1 on node2: killed; 3 restarts in a row"),
        (Facts(code=0, asked="SIGUSR1", stops=10), "does the time limit (--time) leave enough"),
        (Facts(code=0, stops=10), "10 restarts in a row were asked to stop"),
    ],
)
def test_it_is_given_up(facts: Facts, reason: str) -> None:
    what = ending(facts)
    assert isinstance(what, GiveUp)
    assert what.reason.startswith(reason) or reason in what.reason


def test_failures_do_not_count_against_a_job_that_is_asked_to_stop() -> None:
    assert isinstance(ending(Facts(code=0, asked="SIGUSR1", stops=9, fruitless=99)), Requeue)
