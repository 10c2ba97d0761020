"""How the ranks are started, and what their ends are taken for, without Slurm."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megachat.slurm import supervise
from megachat.slurm.history import History
from megachat.slurm.supervise import REFUSALS, Job, Ranks, keep, patiently, srun, stop_if_spent, stopping

ROOT = Path(__file__).parents[2]


def ended(*lines: str) -> Ranks:
    """Ranks of which srun has said this."""
    said = "; ".join(f"echo {shlex.quote(line)} >&2" for line in lines)
    ranks = Ranks(["bash", "-c", said])
    ranks.process.wait()
    ranks.reader.join()
    return ranks


EXIT_2 = "srun: error: node2: task 1: Exited with exit code 2"


def test_a_node_that_does_not_see_the_program_is_unfit() -> None:
    absent = "slurmstepd: error: execve(): /venv/bin/python: No such file or directory"
    assert ended(absent, EXIT_2).unfit() == ["node2"]
    assert ended("batch: no such setting", EXIT_2).unfit() == []


@pytest.mark.parametrize(
    ("first", "node"),
    [
        ("task 3: Killed", "node2"),
        ("task 0: Killed", ""),
        ("tasks 0-3: Killed", ""),
        ("task 3: Exited with exit code 87", ""),  # it stood still, perhaps waiting for another
    ],
)
def test_one_rank_that_ends_first_points_to_its_node_unless_it_is_rank_0(first: str, node: str) -> None:
    later = "srun: error: node1: task 5: Exited with exit code 1"
    assert ended(f"srun: error: node2: {first}", later).culprits_node() == node


@pytest.mark.parametrize(
    ("nodes", "tasks", "count"),
    [
        (1, "4", 4),  # sbatch --ntasks=4
        (2, "16", 16),
        (3, "16", 24),  # sbatch --nodes=2-4
        (1, "16", 8),  # one of the two nodes has died
        (2, "", 16),
    ],
)
def test_srun_starts_as_many_ranks_as_were_asked_for(
    nodes: int, tasks: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", str(nodes))
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "8")
    monkeypatch.setenv("SLURM_NTASKS", tasks)
    assert f"--ntasks={count}" in srun("pretrain", [])
    assert "--export=ALL" in srun("pretrain", [])


def test_an_answer_that_would_be_the_same_again_is_taken_at_once() -> None:
    said = "Invalid job id specified"
    assert patiently(sys.executable, "-c", f"print({said!r}); exit(1)", refusals=REFUSALS) == (1, said + "\n")


def job(restart: int) -> Job:
    """One on two nodes, of which Slurm is not asked."""
    made = object.__new__(Job)
    made.number, made.restart, made.nodes = "7", restart, ["node1", "node2"]
    return made


def test_a_job_that_takes_its_node_down_each_time_ends_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "restarts.json"
    history = History("7")
    for restart in range(4):
        stop_if_spent(job(restart), "pretrain", history, path, 3)
        history.begin(restart, ["node1"], -1)
    with pytest.raises(SystemExit):
        stop_if_spent(job(4), "pretrain", history, path, 3)
    assert "3 restarts in a row" in path.read_text()
    stop_if_spent(job(5), "pretrain", history, path, 3)  # somebody has requeued it by hand


def test_a_start_that_slurm_has_given_up_leaves_the_history_to_the_newer(tmp_path: Path) -> None:
    path = tmp_path / "restarts.json"
    old = History("7")
    old.begin(0, ["node1"], -1)
    keep(stopping(old, ["SIGUSR1"]), path)
    assert History.read(path, "7").attempts[0].reason == "asked to stop by SIGUSR1"
    new = History.read(path, "7")
    new.begin(1, ["node2"], -1)
    keep(new, path)
    keep(stopping(old, ["SIGTERM"]), path)
    assert History.read(path, "7") == new


def test_ranks_of_a_newer_start_are_not_signalled(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(supervise, "command", lambda *words: (told.extend(words) or 0, ""))
    monkeypatch.setattr(Job, "about", lambda _: {"Restarts": "1"})
    assert not job(0).signal_ranks("KILL")
    assert not told
    assert job(1).signal_ranks("KILL")
    assert told == ["scancel", "--signal=KILL", "7.0"]


def test_srun_is_not_waited_for_for_ever_after_a_rank_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEGACHAT_END_SECONDS", "1")
    ranks = Ranks(["bash", "-c", "echo srun: error: node1: task 0: Killed >&2; exec sleep 100"])
    monkeypatch.setattr(Job, "signal_ranks", lambda *_: ranks.process.kill())
    assert supervise.watch_over(job(0), ranks, tmp_path, [], lambda: None) == ""
    assert ranks.process.returncode == -9
    assert "srun does not end in 1 s" in capfd.readouterr().err


@pytest.fixture
def requeued(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Nodes that jobs have left out when they were requeued."""
    found: list[str] = []
    monkeypatch.setattr(Job, "requeue", lambda _: "")
    monkeypatch.setattr(Job, "avoid", lambda _, nodes: found.extend(nodes) or "leaves them out")
    return found


@pytest.mark.parametrize(
    ("python", "restart", "left_out", "said"),
    [
        (sys.executable, 0, [], "ends here: the settings are refused"),
        ("false", 0, ["node1"], "goes back into the queue, the settings cannot be composed on node1"),
        ("false", 3, [], "ends here: the settings cannot be composed on node1 (status 1); 3 restarts"),
    ],
)
def test_a_first_node_that_cannot_compose_settings_is_left_out(
    python: str,
    restart: int,
    left_out: list[str],
    said: str,
    requeued: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "executable", python)
    with pytest.raises(SystemExit):
        supervise.stage_folder(job(restart), "pretrain", ["model=none_such"])
    assert requeued == left_out
    assert said in capfd.readouterr().err


FULL = """
from megachat.slurm.supervise import Ranks
ranks = Ranks(["bash", "-c", "for i in {1..9}; do echo $i >&2; done"])
ranks.process.wait()
ranks.reader.join()
print(len(ranks.lines))
"""


def test_ranks_are_read_though_the_log_cannot_be_written() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", FULL], stdout=subprocess.PIPE, stderr=full, check=True)
    assert done.stdout.strip() == b"9"


def test_a_job_array_is_refused() -> None:
    command = ["bash", "slurm/launch.sh", "pretrain"]
    environment = os.environ | {"SLURM_ARRAY_JOB_ID": "5"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert "--dependency" in done.stderr
