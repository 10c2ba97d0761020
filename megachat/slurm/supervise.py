"""`python -m megachat.slurm.supervise STAGE [key=value ...]`: what a job's batch script becomes.

It starts the ranks by srun, passes on the request to stop, watches their heartbeat, and when they have ended
decides between done, once more, and giving up (`ending.py`). It imports nothing heavy: a job of a thousand
nodes has one, and it has to answer signals from its first second on.
"""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from megachat.slurm import meet
from megachat.slurm.ending import HUNG, MISTAKE, UNFIT, Done, Facts, GiveUp, Requeue, ending, spent
from megachat.slurm.heartbeat import Limits, Watch, identity
from megachat.slurm.history import History, newest_step

LAST_LINES = 40
"""What is kept of the ranks' words when they fail."""
REFUSALS = re.compile(
    "Invalid job id|[Pp]ermission denied|disabled|already completing|pending execution|no longer pending"
)
"""Answers of Slurm's controller that would be the same the next time."""
UNREADABLE = (errno.ENOENT, errno.EIO, errno.EACCES, errno.ESTALE)
"""Exit codes of a task whose program Slurm could not start, because the node does not see the environment."""


class Job:
    """This job, and what Slurm can be asked and told about it."""

    def __init__(self) -> None:
        self.number = os.environ["SLURM_JOB_ID"]
        self.restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.nodes = self.expand(os.environ["SLURM_JOB_NODELIST"])

    def expand(self, names: str) -> list[str]:
        """Slurm's short form of several nodes in full. Example: node[1-2] -> [node1, node2]"""
        return patiently("scontrol", "show", "hostnames", names)[1].split() or [names]

    def about(self) -> dict[str, str]:
        """What Slurm knows of it, as `scontrol show job` has it."""
        status, text = patiently("scontrol", "show", "job", "--oneliner", self.number, refusals=REFUSALS)
        pairs = (word.partition("=") for word in text.split())
        return {} if status else {name: value for name, _, value in pairs}

    def current(self) -> bool:
        """Whether this is its newest start: one on a node that Slurm has given up may live on beside it."""
        return self.about().get("Restarts", str(self.restart)) == str(self.restart)

    def running(self) -> bool:
        """Whether this start of it runs to Slurm, too, and is not being ended."""
        about = self.about()
        return (about.get("JobState"), about.get("Restarts")) == ("RUNNING", str(self.restart))

    def signal_ranks(self, name: str) -> bool:
        """Sends a signal to every rank; False while there is none.

        Step 0 is the first that srun starts, in every start of the job: the ranks may be those of a newer.
        """
        return self.current() and command("scancel", f"--signal={name}", f"{self.number}.0")[0] == 0

    def requeue(self) -> str:
        """Back into the queue; why Slurm refuses, if it does."""
        status, text = patiently("scontrol", "requeue", self.number, refusals=REFUSALS)
        return text.strip() if status and self.running() else ""

    def avoid(self, nodes: Sequence[str]) -> str:
        """Has Slurm start it on other nodes, if enough are left, and says so. Only for a job that waits."""
        about = self.about()
        excluded = about.get("ExcNodeList", "(null)")
        avoided = {*nodes} | ({*self.expand(excluded)} if excluded != "(null)" else set())
        needed = int(about.get("NumNodes", "1").partition("-")[0])
        up = ["-t", "idle,mix,alloc,comp", "-p", about.get("Partition", "")]
        left = {*patiently("sinfo", "--noheader", "-N", "-o", "%N", *up)[1].split()} - avoided
        if len(left) < needed:
            others = f"{len(left)} other nodes are up, and the job needs {needed}"
            return f"keeps {', '.join(nodes)}: only {others}"
        names = ",".join(sorted(avoided))
        status, text = patiently("scontrol", "update", f"JobId={self.number}", f"ExcNodeList={names}")
        return f"cannot leave out {names}: {text.strip()}" if status else f"leaves out {names} from now on"

    def lost_node(self) -> bool:
        """Whether it waits because a node of its has failed: a requeue or a preemption leaves them all."""
        if self.about().get("JobState") not in ("PENDING", "COMPLETING", "REQUEUED"):
            return False
        states = patiently("sinfo", "--noheader", "-N", "-n", ",".join(self.nodes), "-o", "%t")[1].split()
        return any(re.match(r"down|fail|unk|.*\*$", state) for state in states)

    def fewer(self, nodes: int, most: int) -> str:
        """Lets it start on fewer nodes than it has had, and says so. Only for a job that waits.

        Slurm remembers how many tasks it had, and would wait until there are nodes for as many.
        """
        tasks = nodes * int(os.environ.get("SLURM_NTASKS_PER_NODE", "1"))
        most = max(nodes, most)
        size = (f"NumNodes={nodes}-{most}", f"NumTasks={tasks}")
        status, text = patiently("scontrol", "update", f"JobId={self.number}", *size)
        return (
            f"cannot do with fewer nodes: {text.strip()}"
            if status
            else f"may start on {nodes} to {most} nodes"
        )


class Ranks:
    """srun, and the words of the ranks that pass through here."""

    FAILED = re.compile(r"srun: error: (\S+): tasks? (\S+): (.+)")

    def __init__(self, arguments: Sequence[str]) -> None:
        self.lines: deque[str] = deque(maxlen=LAST_LINES)
        self.failures: list[tuple[str, str, str]] = []
        """Nodes, ranks, and how they ended, in the order in which srun tells of them."""
        self.unreadable = False
        """Whether Slurm could not start the program on some node."""
        self.process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
        self.reader = threading.Thread(target=self._pass_on, daemon=True)
        self.reader.start()

    def _pass_on(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as said:
            for raw in said:
                put(raw)
                line = raw.decode(errors="replace").rstrip()
                self.lines.append(line)
                self.unreadable |= "execve()" in line
                if found := self.FAILED.match(line):
                    self.failures.append((found[1], found[2], found[3]))

    def culprit(self) -> str:
        """The first rank that ended badly: the others were ended because of it."""
        if not self.failures:
            return ""
        nodes, ranks, how = self.failures[0]
        return f"rank {ranks} on {nodes}: {how[0].lower()}{how[1:]}"

    def culprits_node(self) -> str:
        """Where it ran; empty for rank 0, which makes mistakes of its own, for several, and after a hang."""
        nodes, ranks, _ = self.failures[0] if self.failures else ("", "", "")
        return nodes if ranks.isdigit() and ranks != "0" and not self.ended_with(HUNG) else ""

    def ended_with(self, *codes: int) -> list[str]:
        """Nodes on which a rank ended with one of these exit statuses, in Slurm's short form."""
        ends = tuple(f"exit code {code}" for code in codes)
        return [nodes for nodes, _, how in self.failures if how.endswith(ends)]

    def unfit(self) -> list[str]:
        """Nodes that have not passed the tests, or do not see the program, in Slurm's short form."""
        return self.ended_with(UNFIT, *(UNREADABLE if self.unreadable else ()))

    def end(self, job: Job) -> int:
        """Kills the ranks, however they do, and srun, too, if a node no longer answers it."""
        job.signal_ranks("KILL")
        for wait in (20.0, 5.0):
            try:
                return self.process.wait(wait)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.process.wait()


def main() -> None:
    """The command line."""
    asked: list[str] = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, _: asked.append(signal.Signals(number).name))
    stage, *overrides = sys.argv[1:]
    job = Job()
    folder = stage_folder(job, stage, overrides)
    path = folder / "restarts.json"
    history = History.read(path, job.number)
    before, claimed = finished(folder), claim(folder)
    with suppress(OSError):
        (folder / "refused.json").unlink()
    stop_if_spent(job, stage, history, path, budget())
    history.begin(job.restart, job.nodes, newest_step(folder))
    keep(history, path)

    os.environ |= {
        "MASTER_ADDR": meet.address(job.nodes),
        "MASTER_PORT": str(meet.port(int(job.number), job.restart)),
        "SLURM_RESTART_COUNT": str(job.restart),
    }
    where = "{MASTER_ADDR}:{MASTER_PORT}".format_map(os.environ)
    stands = step_in_words(newest_step(folder))
    say(job, f"{stage} in {folder} on {', '.join(job.nodes)}, {stands}; the ranks meet at {where}")
    ranks = Ranks(srun(stage, overrides))
    hung = watch_over(job, ranks, folder, asked, lambda: keep(stopping(history, asked), path))
    code = ranks.process.wait()
    ranks.reader.join(5)

    now = finished(folder)
    unfit = [node for names in ranks.unfit() for node in job.expand(names)]
    step = newest_step(folder)
    if asked or (code == 0 and not hung):
        history.attempts[-1].failed = False
    facts = Facts(
        code=MISTAKE if ranks.ended_with(MISTAKE) else code,
        done=bool(now) and (code == 0 or now != before),
        refused=refused(folder, job),
        taken="" if claim(folder) in (claimed, None) else taken_by(folder, job),
        running=job.running(),
        asked=asked[0] if asked else "",
        hung=hung,
        culprit=ranks.culprit(),
        unfit=tuple(unfit),
        stops=history.fruitless(step, failed=False),
        fruitless=history.fruitless(step),
        limit=budget(),
    )
    what = ending(facts)
    last = history.attempts[-1]
    last.unfit, last.last_lines = unfit, [] if isinstance(what, Done) else list(ranks.lines)
    last.culprit = "" if hung else ranks.culprits_node()
    history.end("done" if isinstance(what, Done) else what.reason, isinstance(what, Requeue) and what.failed)
    if job.current() and not facts.taken:
        keep(history, path)
    if isinstance(what, Done):
        say(job, f"{stage} is finished")
        sys.exit(0)
    if isinstance(what, GiveUp):
        fewest = os.environ.get("MEGACHAT_MIN_NODES")
        if fewest and not job.current() and job.lost_node():
            most = max(len(one.nodes) for one in history.attempts)  # it may grow again
            say(job, f"{stage} {job.fewer(int(fewest), most)}")
        say(job, f"{stage} ends here, {step_in_words(step)}: {what.reason}")
        sys.exit(code if 0 < code < 128 else 1)
    if not unfit and (suspect := history.suspect()):
        say(job, f"{suspect} has ended two attempts in a row, and is taken for unfit")
        unfit = [suspect]
    requeue(job, stage, f"{step_in_words(step)}: {what.reason}", unfit)


def stop_if_spent(job: Job, stage: str, history: History, path: Path, limit: int) -> None:
    """Ends a job whose attempts take the node of their batch script down: none of them could say so."""
    step = newest_step(path.parent)
    restarts = history.fruitless(step)
    if restarts < limit or not history.attempts or history.attempts[-1].ended:
        return
    why = f"its last attempt ended without a word; {spent(restarts)}"
    history.end(why, failed=True)
    keep(history, path)
    say(job, f"{stage} ends here, {step_in_words(step)}: {why}")
    sys.exit(1)


def requeue(job: Job, stage: str, why: str, unfit: Sequence[str]) -> NoReturn:
    """Back into the queue, and waits to be ended for it."""
    say(job, f"{stage} goes back into the queue, {why}")
    if refusal := job.requeue():
        say(
            job,
            f"Slurm does not requeue it ({refusal}); submit the same line again, and it goes on from there. "
            "A job can be requeued when it was submitted with --requeue, as the scripts in slurm/ say",
        )
        sys.exit(1)
    if unfit:
        say(job, f"{stage} {job.avoid(unfit)}")
    sys.exit(0)


def watch_over(job: Job, ranks: Ranks, folder: Path, asked: list[str], on_request: Callable[[], None]) -> str:
    """Until the ranks have ended. Where they stood still, if they had to be killed for that."""
    patience, grace = seconds("STOP") or 240.0, seconds("END") or 120.0
    watch = Watch(folder / "heartbeat.json", Limits(seconds("START") or 3600.0, seconds("HANG")))
    told = False
    until = over = float("inf")
    while True:
        try:
            ranks.process.wait(0.5)
            return ""
        except subprocess.TimeoutExpired:
            pass
        if asked and until == float("inf"):
            until = time.monotonic() + patience
            say(job, f"{asked[0]}: the ranks save and stop")
            on_request()
        if asked and not told:
            told = job.signal_ranks("USR1")
        hung = watch.hung()
        if not hung and time.monotonic() > until:
            hung = f"asked to stop by {asked[0]}, and not stopped in {patience:g} s"
        if hung:
            say(job, f"{hung}: its ranks are killed")
            ranks.end(job)
            return hung
        # Of a rank whose node has rebooted before Slurm noticed, srun waits for news for ever.
        if ranks.failures:
            over = min(over, time.monotonic() + grace)
        if time.monotonic() > over:
            say(job, f"srun does not end in {grace:g} s after a rank has: it is killed")
            ranks.end(job)
            return ""


def budget() -> int:
    """How many restarts in a row may fail and leave no newer checkpoint."""
    return int(os.environ.get("MEGACHAT_RESTARTS", "3"))


def seconds(name: str) -> float | None:
    """A setting of `slurm/env.sh`."""
    text = os.environ.get(f"MEGACHAT_{name}_SECONDS")
    return float(text) if text else None


def stopping(history: History, asked: Sequence[str]) -> History:
    """Known before the ranks have ended: Slurm may not leave the time to say more."""
    history.end(f"asked to stop by {asked[0]}", failed=False)
    return history


def srun(stage: str, overrides: Sequence[str]) -> list[str]:
    """The command that starts one rank for each task of the job."""
    names = ("SLURM_JOB_NUM_NODES", "SLURM_NTASKS_PER_NODE", "SLURM_NTASKS")
    nodes, each, tasks = (int(os.environ.get(name) or 0) for name in names)
    # With fewer tasks than its nodes could take it was submitted so, unless it has more nodes than it needs:
    # those of a job on 2 to 4 nodes are counted for 2.
    count = tasks if (nodes - 1) * each < tasks < nodes * each else nodes * each
    return [
        "srun",
        # Else, after `sbatch --export=NONE`, ranks would know neither port nor threads nor networks.
        "--export=ALL",
        # As many as it has got, which may be fewer than it had; of tasks Slurm would start as many as before.
        f"--nodes={nodes}",
        *([f"--ntasks={count}"] if each else []),
        # Since Slurm 22.05 srun does not inherit it from sbatch.
        f"--cpus-per-task={os.environ.get('SLURM_CPUS_PER_TASK', '1')}",
        # One dead rank ends the others, which would wait for it in an all-reduce.
        "--kill-on-bad-exit=1",
        # One that has ended well does not: rank 0 may still have figures to upload.
        "--wait=0",
        *(sys.executable, "-m", "megachat", stage, *overrides),
    ]


def stage_folder(job: Job, stage: str, overrides: Sequence[str]) -> Path:
    """Where the stage writes: by `run=...`, or by the settings, which are composed in a process apart.

    On a node that does not see the environment that fails. Nothing is remembered before the folder is known:
    there, every restart of the job counts as one that came to nothing.
    """
    named = [text.removeprefix("run=") for text in overrides if text.startswith("run=")]
    if named and re.fullmatch(r"[\w./-]+", named[-1]):
        return Path(named[-1]) / stage
    done = subprocess.run(
        [sys.executable, "-c", COMPOSE, stage, *overrides], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode == 0:
        return Path(done.stdout.splitlines()[-1]) / stage
    why = f"the settings cannot be composed on {job.nodes[0]} (status {done.returncode})"
    what = ending(Facts(code=done.returncode, culprit=why, fruitless=job.restart, limit=budget()))
    if isinstance(what, Requeue):
        requeue(job, stage, what.reason, job.nodes[:1])
    assert isinstance(what, GiveUp)
    say(job, f"{stage} ends here: {what.reason}")
    sys.exit(done.returncode if 0 < done.returncode < 128 else 1)


COMPOSE = """
import sys
from megachat.config import ConfigError, compose
try:
    print(compose(sys.argv[1], sys.argv[2:])["run"])
except ConfigError as mistakes:
    print(mistakes, file=sys.stderr)
    sys.exit(2)
"""


def finished(folder: Path) -> tuple[int, int] | None:
    """Which `done.json` a stage has."""
    return identity(folder / "done.json")


def claim(folder: Path) -> tuple[int, int] | None:
    """Which `attempt.json` it has."""
    return identity(folder / "attempt.json")


def refused(folder: Path, job: Job) -> str:
    """What a rank of this attempt said before it ended with a mistake of the user's."""
    path = folder / "refused.json"
    ours = (said(path, "job"), said(path, "restart")) == (job.number, str(job.restart))
    return said(path, "error") if ours else ""


def taken_by(folder: Path, job: Job) -> str:
    """The other job whose ranks have claimed the run after this one's."""
    owner = said(folder / "attempt.json", "job")
    return owner if owner != job.number else ""


def said(path: Path, what: str) -> str:
    """One entry of a JSON file, as text; empty if there is none."""
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))[what])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def step_in_words(step: int) -> str:
    """Where it stands."""
    return "without a checkpoint" if step < 0 else f"with a checkpoint of step {step}"


def keep(history: History, path: Path) -> None:
    """Writes it down, unless a newer start of the job has; a full disk is no reason to stop."""
    try:
        if not history.outlived(path):
            history.write(path)
    except OSError as error:
        put(f"{path}: {error}\n".encode())


def say(job: Job, text: str) -> None:
    """One line in the job's log."""
    restart = f" (restart {job.restart})" if job.restart else ""
    put(f"{time.strftime('%H:%M:%S')} job {job.number}{restart}: {text}\n".encode())


def put(raw: bytes) -> None:
    """Into the job's log, if that can be written: ranks that nobody reads would come to stand still."""
    with suppress(OSError):
        os.write(2, raw)


def command(*words: str) -> tuple[int, str]:
    """The exit status of a command, and what it says."""
    try:
        done: subprocess.CompletedProcess[str] = subprocess.run(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False
        )
    except subprocess.TimeoutExpired:
        return 1, f"{words[0]} timed out"
    return done.returncode, done.stdout


def patiently(*words: str, refusals: re.Pattern[str] | None = None) -> tuple[int, str]:
    """The same, again and again as long as Slurm's controller does not answer; or gives none of `refusals`.

    When Slurm ends the processes of a job that is requeued, the command may be one of them.
    """
    for _ in range(30):
        status, text = command(*words)
        if status == -signal.SIGTERM:
            continue
        unanswered = (
            not refusals.search(text) if refusals else re.search("[Uu]nable to contact|timed out", text)
        )
        if not (status and unanswered):
            break
        time.sleep(10)
    return status, text


if __name__ == "__main__":
    main()
