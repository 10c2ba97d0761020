"""How an attempt to run a stage has ended, and what is to be done about it.

Slurm by itself starts a job again when a node has failed or a more urgent job takes its place, and for no
other reason: after a crashed or hanging rank somebody has to decide.
"""

from dataclasses import dataclass

MISTAKE = 2
"""The exit status of settings that do not decode."""
STOPS = 10
"""How many restarts in a row may be asked to stop before they have left a newer checkpoint."""
HUNG = 87
"""The exit status of a rank that stood still, whoever it waited for."""
UNFIT = 70
"""The exit status of a rank whose node has not passed the tests before training."""


@dataclass(frozen=True)
class Facts:
    """What is known when the ranks have ended."""

    code: int
    """srun's exit status: the highest of the ranks', or 128 and the number of a signal."""
    done: bool = False
    """Whether the stage has finished."""
    refused: str = ""
    """What a rank said of a mistake that every attempt would repeat."""
    taken: str = ""
    """The other job that the run folder belongs to by now, if one does."""
    running: bool = True
    """Whether to Slurm the job still runs: not when it has been cancelled, or requeued already."""
    asked: str = ""
    """The signal that asked it to stop: the time limit is near, or another job takes its place."""
    hung: str = ""
    """Where it stood still, if it was killed for that."""
    culprit: str = ""
    """The first rank that ended badly, its node, and how."""
    unfit: tuple[str, ...] = ()
    """Nodes that have not passed the tests before training."""
    stops: int = 0
    """Restarts in a row, this one among them, that were asked to stop before they left a newer checkpoint."""
    fruitless: int = 0
    """Restarts in a row, this one among them, that failed and left no newer checkpoint."""
    limit: int = 3
    """How many of those there may be."""


@dataclass(frozen=True)
class Done:
    """The stage has finished."""


@dataclass(frozen=True)
class Requeue:
    """Start it again, from its newest checkpoint."""

    reason: str
    failed: bool
    """Whether something is wrong with it; not when it was only asked to stop."""


@dataclass(frozen=True)
class GiveUp:
    """Starting it again is of no use, or not for us to do."""

    reason: str


def ending(facts: Facts) -> Done | Requeue | GiveUp:
    """What to do, by what is known."""
    if facts.done:
        return Done()
    if facts.taken:
        return GiveUp(f"the run belongs to job {facts.taken} now")
    if facts.refused:
        return GiveUp(facts.refused)
    if facts.code == MISTAKE and not facts.unfit:
        return GiveUp("the settings are refused; what is wrong with them is said above")
    if not facts.running:
        return GiveUp("Slurm ends this job, or has requeued it already")
    if facts.asked or (facts.code == 0 and not facts.hung):  # Slurm can signal the ranks alone
        why = f"asked to stop by {facts.asked}" if facts.asked else "the ranks were asked to stop"
        if facts.stops < STOPS:
            return Requeue(why, failed=False)
        return GiveUp(
            f"{why}; {facts.stops} restarts in a row were asked to stop before a newer checkpoint: "
            "does the time limit (--time) leave enough for loading and the first step?"
        )
    why = _why(facts)
    if facts.fruitless >= facts.limit:
        return GiveUp(f"{why}; {spent(facts.fruitless)}")
    return Requeue(why, failed=True)


def spent(restarts: int) -> str:
    """Why there is not another."""
    return f"{restarts} restarts in a row have brought no newer checkpoint"


def _why(facts: Facts) -> str:
    if facts.hung:
        return facts.hung
    if facts.unfit:
        return f"unfit for training: {', '.join(facts.unfit)}"
    if facts.culprit:
        return facts.culprit
    return f"srun ended with status {facts.code}"
