"""The scripts in `slurm/` on a real Slurm: three nodes in a box, of which most jobs use two, a CPU on each.

Its nodes, daemons and ranks are broken in every way that one machine allows; what became of the job is
recorded for the table of faults.
"""

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from megachat.config import compose
from megachat.parallel.checkpoint import load_model
from megachat.run import Stage, perform
from megachat.slurm.history import Attempt, History
from tests.fault_table import NODE, record
from tests.slurm_box import Slurm, cluster, idle, missing
from tests.spawn import on_ranks
from tests.tiny_run import TINY, make, pretrain, rows

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[1]
LIMIT = 300.0
"""Seconds that no job here takes, on a machine that does other things, too."""
STEPS = 12
NO_OTHER_SAVE = ("checkpoint_interval=100",)
"""Whoever goes on from the step at which a job was asked to stop can only do so by what was saved then."""
LOST = 4
"""Steps that a kill may cost: since a checkpoint every two, the newest of which is still being written."""


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    if why := missing():
        if os.environ.get("MEGACHAT_REQUIRE_SLURM") == "1":
            pytest.fail(f"{why}, but MEGACHAT_REQUIRE_SLURM=1", pytrace=False)
        pytest.skip(why)
    with cluster(3) as started:
        yield started


@on_ranks(1)
def trained(run: Path) -> None:
    perform(pretrain(run))


TRAINING = ["--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=10"]
"""Nodes without GPUs."""
TWO = [*TRAINING, "-N", "2"]


def submit(slurm: Slurm, log: Path, script: str, options: list[str], *overrides: str, **settings: str) -> str:
    """The number of a job of a script in `slurm/`, with the Python that runs this test."""
    files = [f"--chdir={ROOT}", f"--output={log}"]
    command = ["sbatch", "--parsable", *options, *files, str(ROOT / "slurm" / script), *overrides]
    return slurm.call(*command, environment=at_home() | settings).strip()


def at_home() -> dict[str, str]:
    """The shell in which jobs are submitted."""
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "VIRTUAL_ENV": sys.prefix,
        "CUDA_VISIBLE_DEVICES": "",
        "RANK": "0",  # typed inside another job
        "WORLD_SIZE": "1",
    }


class Step(NamedTuple):
    """One that a rank has taken."""

    time: float
    restart: int
    rank: int
    number: int


@dataclass
class Trial:
    """A pretraining job of slow steps, to be broken."""

    slurm: Slurm
    run: Path
    inputs: Path
    job: str = ""

    def start(self, *options: str, overrides: tuple[str, ...] = (), **settings: str) -> "Trial":
        """Submits it."""
        layout = ["parallel=zero2", "parallel.precision=fp32", "checkpoint_interval=2"]
        paced = {
            "PYTHONPATH": str(ROOT / "tests" / "slurm_pace"),
            "PACE": "0.3",
            "PACE_LOG": f"{self.run}.steps",
        }
        self.run.parent.mkdir(parents=True, exist_ok=True)
        self.job = submit(
            self.slurm, self.log, "pretrain.sh", [*TRAINING, *(options or ("-N", "2"))],
            f"run={self.run}", f"inputs={self.inputs}", "model=gpt_3m", *TINY, *layout, *overrides,
            **(paced | settings),
        )  # fmt: skip
        return self

    def nodes(self) -> list[str]:
        """Where it runs now, rank 0 on the first; as `tools/slurm_cluster.sh` numbers them."""
        names = self.slurm.call("scontrol", "show", "hostnames", self.slurm.about(self.job)["NodeList"])
        return [name.rpartition(".")[2] for name in names.split()]

    @property
    def log(self) -> Path:
        return self.run.with_suffix(".log")

    def said(self) -> str:
        """The job's log."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def steps(self, restart: int | None = None) -> list[Step]:
        """What one attempt has taken, or all, by all ranks."""
        try:
            lines = Path(f"{self.run}.steps").read_text().split("\n")[:-1]
        except FileNotFoundError:
            return []
        found = [line.split() for line in lines]
        steps = [Step(float(when), *map(int, more)) for when, *more in found]
        return [step for step in steps if restart in (None, step.restart)]

    def until(self, number: int, restart: int = 0) -> float:
        """Waits until a step has been taken; the time now."""
        deadline = time.monotonic() + LIMIT
        while not any(step.number >= number for step in self.steps(restart)):
            state = self.slurm.about(self.job)["JobState"]
            if time.monotonic() > deadline or state in ("FAILED", "COMPLETED", "CANCELLED"):
                raise TimeoutError(f"job {self.job} is {state} before step {number}\n{self.said()}")
            time.sleep(0.05)
        return time.time()

    def until_said(self, words: str) -> float:
        """Waits until the log has them; the time now."""
        deadline = time.monotonic() + LIMIT
        while words not in self.said():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)
        return time.time()

    def ended(self) -> str:
        """The state in which it ends."""
        return self.slurm.wait(self.job, LIMIT)

    def survived(
        self,
        fault: str,
        since: float,
        undisturbed: "Trial",
        *,
        lost: int = LOST,
        restarts: Container[int] = (1,),
        alike: "Callable[[Trial, Trial], bool] | None" = None,
        limit: float | None = None,
    ) -> None:
        """It has finished after being restarted, with what an undisturbed one learns. Records that."""
        state = self.ended()
        before = max((step.number for step in self.steps(0)), default=0)
        news = [step.time for step in self.steps() if step.restart > 0 and step.number > before]
        again = len({(step.restart, step.number) for step in self.steps()}) - STEPS
        survived = False
        try:
            assert state == "COMPLETED", self.said()
            assert int(self.slurm.about(self.job)["Restarts"]) in restarts, self.said()
            assert self.losses().keys() == set(range(1, STEPS + 1))
            assert again <= lost
            assert (alike or same_weights)(self, undisturbed)
            survived = True
        finally:
            seconds = min(news) - since if news else None
            record(fault, survived=survived, lost=again, seconds=seconds, limit=limit)

    def attempts(self) -> list[Attempt]:
        """What its supervisors have written down."""
        return History.read(self.run / "pretrain" / "restarts.json", self.job).attempts

    def losses(self) -> dict[int, float]:
        """By step."""
        return {int(row["step"]): row["loss"] for row in rows(self.run)}

    def weights(self) -> dict[str, torch.Tensor]:
        """What has been learnt."""
        return load_model(self.run / "pretrain").model.state_dict()


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("inputs") / "runs" / "test")


@pytest.fixture(scope="session")
def undisturbed(slurm: Slurm, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """Two nodes that nobody breaks. Another job has the port on which its ranks would meet."""
    trial = Trial(slurm, tmp_path_factory.mktemp("undisturbed") / "run", inputs)
    with ExitStack() as taken:
        with suppress(OSError):  # somebody else has it: as good
            taken.enter_context(socket.create_server(("127.0.0.9", preferred_port(next_job(slurm)))))
        trial.start(PACE="0")
        assert trial.ended() == "COMPLETED", trial.said()
    return trial


@pytest.fixture
def trial(slurm: Slurm, inputs: Path, tmp_path: Path) -> Iterator[Trial]:
    trial = Trial(slurm, tmp_path / "run", inputs)
    yield trial
    if trial.job:
        with suppress(Exception):
            slurm.call("scancel", "--quiet", trial.job)


@pytest.fixture
def mended(slurm: Slurm) -> Iterator[None]:
    """Before and after a test that breaks nodes, all are there and idle."""
    idle_nodes(slurm)
    yield
    for node in (1, 2, 3):
        if slurm.call("sinfo", "-h", "-p", "main", "-n", f"127.0.0.{node}", "-o", "%t").strip() not in (
            "idle",
            "mix",
        ):
            slurm.box("restart-node", str(node))
    idle_nodes(slurm)


def idle_nodes(slurm: Slurm) -> None:
    """Waits for them: a job that may have one node or two takes what there is."""
    deadline = time.monotonic() + 60
    while idle(slurm) < 3:
        assert time.monotonic() < deadline, slurm.call("sinfo", "-N", "-l")
        time.sleep(0.2)


def next_job(slurm: Slurm) -> int:
    """The number that Slurm gives to the next one."""
    number = re.search(r"^NEXT_JOB_ID\s*= (\d+)", slurm.call("scontrol", "show", "config"), re.MULTILINE)
    assert number
    return int(number[1])


def preferred_port(job: int) -> int:
    """Where the ranks of its first start meet if the port is free."""
    return 20000 + job % 12000


def same_weights(one: Trial, two: Trial) -> bool:
    """To the last bit."""
    first, second = one.weights(), two.weights()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def same_losses(one: Trial, two: Trial) -> bool:
    """As near as two layouts come."""
    return one.losses() == pytest.approx(two.losses(), rel=1e-4)


def test_sbatch_on_two_nodes_gives_the_losses_of_one_process_though_another_job_has_its_port(
    undisturbed: Trial, inputs: Path
) -> None:
    trained(run=inputs)
    assert len(undisturbed.losses()) == STEPS
    one = {int(row["step"]): row["loss"] for row in rows(inputs)}
    assert undisturbed.losses() == pytest.approx(one, rel=1e-4)
    restarts = undisturbed.slurm.about(undisturbed.job)["Restarts"]
    meet = re.search(r"the ranks meet at 127\.0\.0\.\d:(\d+)", undisturbed.said())
    moved = meet is not None and int(meet[1]) != preferred_port(int(undisturbed.job))
    record("20 the port is taken", survived=restarts == "0" and moved)
    assert restarts == "0"
    assert moved, undisturbed.said()


def test_a_job_that_nears_its_time_limit_loses_no_step(undisturbed: Trial, trial: Trial) -> None:
    # Slurm looks every 30 s, and warns at the last look that is not too late: 20 to 50 s after the start.
    limit = ("-N", "2", "--time=1", "--signal=B:USR1@10")
    slow = "restart == 0 and time.sleep(5)"
    trial.start(*limit, overrides=NO_OTHER_SAVE, PACE="0", FAULT=slow)
    since = trial.until_said("SIGUSR1: the ranks save and stop")
    # A busy machine may be so slow that it is warned again.
    restarts = range(1, 4)
    trial.survived("9 the time limit is near", since, undisturbed, lost=0, restarts=restarts, limit=NODE)
    assert trial.steps(0)
    assert "saved at step" in trial.said()


def test_scontrol_requeue_costs_no_step(undisturbed: Trial, trial: Trial) -> None:
    since = trial.start(overrides=NO_OTHER_SAVE).until(4)
    trial.slurm.call("scontrol", "requeue", trial.job)
    trial.survived("9 scontrol requeue", since, undisturbed, lost=0)
    assert trial.attempts()[0].reason == "asked to stop by SIGTERM"
    assert "saved at step" in trial.said()


def test_a_job_makes_way_for_an_urgent_one_and_goes_on_after_it_without_losing_a_step(
    undisturbed: Trial, trial: Trial
) -> None:
    since = trial.start(overrides=NO_OTHER_SAVE).until(4)
    whole = ["--partition=urgent", "-N", "3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    urgent = trial.slurm.call("sbatch", "--parsable", *whole).strip()
    assert trial.slurm.wait(urgent, LIMIT) == "COMPLETED"
    assert len({step.restart for step in trial.steps()}) == 1
    trial.survived("9 preempted by a job of higher priority", since, undisturbed, lost=0, limit=NODE)
    assert "asked to stop" in trial.attempts()[0].reason  # the ranks alone, as Slurm signals them first


def test_a_killed_rank_ends_the_others_and_the_job_starts_again(undisturbed: Trial, trial: Trial) -> None:
    since = trial.start().until(5)
    os.kill(trial.slurm.ranks(trial.job)[1], signal.SIGKILL)
    trial.survived("1 a rank killed, under Slurm", since, undisturbed)
    assert "goes back into the queue, with a checkpoint of step" in trial.said()
    assert re.search(r"rank 1 on 127.0.0.\d: killed", trial.said())


def test_ranks_that_are_all_frozen_are_noticed_from_outside(undisturbed: Trial, trial: Trial) -> None:
    # By themselves, at the start of a step: the end of a save may take longer than a step.
    freeze = "restart == 0 and step == 6 and os.kill(os.getpid(), 19)"
    since = trial.start(MEGACHAT_HANG_SECONDS="8", FAULT=freeze).until(5)
    trial.survived("2 all ranks frozen, under Slurm", since, undisturbed)
    assert "no sign of life for 8 s" in trial.said()


def test_a_job_that_fails_again_and_again_is_given_up_and_says_why(trial: Trial) -> None:
    trial.start(FAULT="rank == 1 and os.abort()")
    state = trial.ended()
    record("19 a crash loop", survived=state == "FAILED")
    assert state == "FAILED"
    assert trial.slurm.about(trial.job)["Restarts"] == "3"
    assert re.search(
        r"ends here, without a checkpoint: rank 1 on 127.0.0.\d: aborted.*; "
        "3 restarts in a row have brought no newer checkpoint",
        trial.said(),
    )
    suspect = re.search(r"(127.0.0.\d) has ended two attempts in a row", trial.said())
    assert suspect
    assert [one.culprit for one in trial.attempts()[:2]] == [suspect[1]] * 2
    assert suspect[1] not in trial.attempts()[2].nodes


def test_mistakes_end_at_once(slurm: Slurm, inputs: Path, tmp_path: Path) -> None:
    typo = Trial(slurm, tmp_path / "typo", inputs).start(overrides=("btch=8",))
    absent = Trial(slurm, tmp_path / "absent", tmp_path / "nowhere").start()
    for trial, said in ((typo, "btch"), (absent, "reads the output of `tokenizer`")):
        assert trial.ended() == "FAILED"
        assert trial.slurm.about(trial.job)["Restarts"] == "0"
        assert "ends here, without a checkpoint" in trial.said()
        assert said in trial.said()


def test_a_job_that_may_not_be_requeued_says_what_to_do(trial: Trial) -> None:
    trial.start("-N", "2", "--no-requeue", FAULT="rank == 1 and os.abort()")
    assert trial.ended() == "FAILED"
    assert "Slurm does not requeue it" in trial.said()
    assert "submit the same line again" in trial.said()


def test_a_cancelled_job_stays_cancelled(trial: Trial) -> None:
    trial.start().until(2)
    trial.slurm.call("scancel", trial.job)
    assert trial.ended() == "CANCELLED"
    time.sleep(2)
    assert trial.slurm.about(trial.job)["JobState"] == "CANCELLED"


def test_without_its_controller_a_job_goes_on(undisturbed: Trial, trial: Trial) -> None:
    trial.start().until(2)
    trial.slurm.box("kill-controller")
    time.sleep(2)
    trial.slurm.box("start-controller")
    state = trial.ended()
    record("8 the controller killed", survived=state == "COMPLETED")
    assert state == "COMPLETED", trial.said()
    assert trial.slurm.about(trial.job)["Restarts"] == "0"
    assert same_weights(trial, undisturbed)


@pytest.mark.usefixtures("mended")
def test_a_dead_node_leaves_a_job_on_the_other_with_the_same_losses(undisturbed: Trial, trial: Trial) -> None:
    since = trial.start("-N", "2", "--exclude=127.0.0.3", MEGACHAT_MIN_NODES="1").until(5)
    trial.slurm.box("kill-node", trial.nodes()[1])
    trial.survived("5 a node dies, one is left", since, undisturbed, alike=same_losses)
    assert {step.rank for step in trial.steps(0)} == {0, 1}
    assert {step.rank for step in trial.steps(1)} == {0}


@pytest.mark.usefixtures("mended")
def test_when_the_node_of_the_batch_script_dies_another_takes_its_place(
    undisturbed: Trial, trial: Trial
) -> None:
    since = trial.start().until(5)
    trial.slurm.box("kill-node", trial.nodes()[0])
    trial.survived("5 the first node dies, a spare is there", since, undisturbed)


@pytest.mark.usefixtures("mended")
def test_a_node_that_reboots_before_slurm_notices_ends_the_attempt(undisturbed: Trial, trial: Trial) -> None:
    since = trial.start(MEGACHAT_END_SECONDS="8").until(5)
    trial.slurm.box("restart-node", trial.nodes()[1])  # of the first, that of the batch script, Slurm learns
    trial.survived("5 a node reboots at once", since, undisturbed)
    assert "srun does not end in 8 s after a rank has" in trial.said()


@pytest.mark.usefixtures("mended")
def test_a_rank_that_outlives_its_node_daemon_trains_beside_the_new_one_and_saves_nothing(
    undisturbed: Trial, trial: Trial
) -> None:
    # Alone, for others on nodes that live would be ended, and it would miss them in the next all-reduce.
    # It waits for the new start's step 7, to train beside it.
    waits = f"""
while step == 6 and restart == 0 and " 1 0 7\\n" not in open({f"{trial.run}.steps"!r}).read():
    time.sleep(0.05)
"""
    since = trial.start("-N", "1", FAULT=waits).until(5)
    trial.slurm.box("kill-slurmd", trial.nodes()[0])  # its supervisor lives on, too
    trial.survived("7 slurmd dies, its rank lives on", since, undisturbed, alike=same_losses)
    # Its first start was still taking steps when its second was.
    assert max(step.time for step in trial.steps(0)) > min(step.time for step in trial.steps(1))
    assert max(step.number for step in trial.steps(0)) == 6  # which is to be saved


@pytest.mark.usefixtures("mended")
def test_a_node_that_freezes_and_thaws_beside_its_successor_costs_one_more_restart_at_most(
    undisturbed: Trial, trial: Trial
) -> None:
    since = trial.start("-N", "1", PACE="0.5").until(5)
    frozen = trial.nodes()[0]
    trial.slurm.box("hang-node", frozen)
    trial.until(6, restart=1)
    trial.slurm.box("thaw-node", frozen)  # its srun aborts step 0 of the job: to Slurm, that of the new start
    thawed = time.time()
    fault = "6 a node freezes, and thaws"
    trial.survived(fault, since, undisturbed, lost=2 * LOST, restarts=(1, 2), alike=same_losses)
    # Whether the thawed one takes one more step, and its successor ends with it, is luck.
    assert max(step.time for step in trial.steps()) > thawed
    assert trial.attempts()[-1].reason == "done"


@pytest.mark.usefixtures("mended")
def test_an_unfit_node_is_left_out(undisturbed: Trial, trial: Trial) -> None:
    trial.start(FAULT="rank == 1 and restart == 0 and os._exit(70)")
    trial.survived("5 a node is unfit", trial.until_said("exit code 70"), undisturbed, lost=0)
    unfit = re.search(r"unfit for training: (127.0.0.\d)", trial.said())
    assert unfit
    assert f"leaves out {unfit[1]} from now on" in trial.said()
    assert unfit[1] not in trial.said().partition("(restart 1)")[2].partition("\n")[0]


def chain(slurm: Slurm, folder: Path, stages: str, *overrides: str) -> dict[str, str]:
    """The jobs that `slurm/chain.sh` submits: {stage: number}."""
    small = f"--output={folder}/%x.log --cpus-per-task=1 --time=10"
    found = {
        "CPU": f"{small} --mem-per-cpu=0",
        "ONE_GPU": f"{small} --mem-per-cpu=0",
        "TRAIN": f"{small} --gpus-per-node=0 --ntasks-per-node=1 --nodes=2",
        "STAGES": stages,
    }
    common = ["log.wandb=disabled", *overrides]
    said = slurm.call(str(ROOT / "slurm" / "chain.sh"), *common, environment=at_home() | found)
    return dict(line.split() for line in said.splitlines())


def test_a_chain_of_jobs_goes_from_text_to_a_model(slurm: Slurm, inputs: Path, tmp_path: Path) -> None:
    paths = f"clean.corpus.json_lines.paths=[{inputs.parent / 'numbers.jsonl'}]"
    settings = ["clean.corpus=[json_lines]", paths, "clean.filters=none", "clean.dedup=exact"]
    settings += ["clean.executor.processes=1", "tokenizer.vocab=300", "tokenizer.threads=1"]
    settings += ["encode.validation=0.1", "encode.executor.processes=1", "pretrain.model=gpt_3m"]
    tiny = [f"pretrain.{text}" for text in TINY]
    stages = "clean tokenizer encode pretrain"
    jobs = chain(slurm, tmp_path, stages, f"run={tmp_path / 'run'}", *settings, *tiny)
    assert [*jobs] == stages.split()
    logs = "".join(path.read_text() for path in sorted(tmp_path.glob("*.log")))
    assert slurm.wait(jobs["pretrain"], LIMIT) == "COMPLETED", logs
    assert len(rows(tmp_path / "run")) == STEPS


def test_what_waits_for_a_job_that_fails_is_cancelled(slurm: Slurm, tmp_path: Path) -> None:
    settings = ["clean.corpus=[json_lines]", "clean.corpus.json_lines.paths=[/nowhere/*.jsonl]"]
    jobs = chain(slurm, tmp_path, "", f"run={tmp_path / 'run'}", *settings)
    assert [*jobs] == "clean tokenizer encode pretrain sft rm ppo dpo grpo evaluate report".split()
    ends = {stage: slurm.wait(number, LIMIT) for stage, number in jobs.items()}
    assert ends.pop("clean") == "FAILED"
    assert {*ends.values()} == {"CANCELLED"}


def test_arrays_of_jobs_clean_to_the_bytes_of_one_process(slurm: Slurm, run: Path, tmp_path: Path) -> None:
    make(run)
    lines = (run.parent / "numbers.jsonl").read_text().splitlines(keepends=True)
    for name, part in {"a": lines[:70], "b": lines[50:]}.items():  # 20 of them twice
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    paths = f"corpus.json_lines.paths=[{tmp_path / '*.jsonl'}]"
    settings = ["corpus=[json_lines]", paths, "filters=none", "shards=2"]
    settings += ["log.wandb=disabled", "executor.processes=1"]
    perform(Stage.of(compose("clean", [f"run={tmp_path / 'one'}", *settings])))

    log, job = tmp_path / "jobs.log", ""
    # As the first lines of slurm/data.sh have it.
    for step in "collect select sign exact alive join verify components settle filter".split():
        after = [f"--dependency=afterok:{job}"] if job else []
        options = ["--array=0-1", "--cpus-per-task=1", "--mem-per-cpu=0", "--time=10", *after]
        job = submit(slurm, log, "data.sh", options, f"stage={step}", f"run={tmp_path / 'two'}", *settings)
    last = ["--cpus-per-task=1", "--mem-per-cpu=0", "--time=10", f"--dependency=afterok:{job}"]
    job = submit(slurm, log, "data.sh", last, f"run={tmp_path / 'two'}", *settings)
    assert slurm.wait(job, timeout=600) == "COMPLETED", log.read_text()
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "clean").glob("text-*")}
        for name in ("one", "two")
    )
    assert len(one) == 2
    assert two == one
