"""Notices that a run stands still, says which rank and where, and ends it with code 87 instead of waiting on.

The loop says what it begins with `watch.at("forward")`. From that come three things:
- `heartbeat.json`, written by the training thread of rank 0 itself, so that whoever looks from outside (a
  supervisor, the launcher) knows it to be alive: a thread of its own would beat on while training hangs.
- A thread in every rank that publishes how far its rank is, and whether it waits in a collective. When this
  rank stands still, that tells who is waited for: the one that does not answer (frozen, killed, Python's lock
  held by a loop in C), else the one that is in no collective, else the one that is behind.
- How long each rank works without waiting for others; a rank that is slower than its peers is named. It is
  compared by the quickest of its last steps, and twice: others who use a machine slow down some steps only.

No clocks are compared: a rank is silent when its counter has stopped, and time in which this process itself
was frozen (Ctrl-Z, a paused container) does not count. A process that trains alone watches itself, but for a
loop in C that holds Python's lock; only somebody outside who reads `heartbeat.json` can see that.
"""

import faulthandler
import itertools
import json
import math
import os
import socket
import statistics
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import torch.distributed as dist
from pydantic import Field, NonNegativeFloat

from megachat.config import Config
from megachat.log import say
from megachat.parallel.mesh import FOREVER, HUNG, Mesh, meeting, place
from megachat.train.split import Split, listen

LONG = frozenset(
    ("load", "prepare", "going back", "save", "validation", "sample", "rollout", "profile", "finish")
)
"""Sections that may take long."""

HEARTBEAT = "heartbeat.json"

WINDOW = 10
"""Steps between two comparisons of the ranks."""
OWN = ("data", "forward")
"""Parts of a step in which a rank works by itself: collectives within them are apart."""
SURE = 2
"""So many comparisons in a row must find the same rank slow before it is named."""
NEGLIGIBLE = 0.005
"""Seconds by which a step may be slower without anybody being named."""
SPEAKERS = 5
"""So many ranks at a time ask for everybody's states: with thousands asking the store would not keep up."""


class Watching(Config):
    """How long a run may stand still; 0 is for ever: 24 days, the longest that collectives can wait."""

    start: NonNegativeFloat
    """Seconds for all ranks to meet (0: half an hour), then for each part of set-up and of the first step."""
    hang: NonNegativeFloat
    """Seconds for a part of a step: reading data, a forward or backward pass, the optimizer."""
    long: NonNegativeFloat
    """Seconds for saving, loading, a validation, a rollout."""
    slow: Annotated[float, Field(ge=0)]
    """A rank is named that reads data and computes so many times as long as the others; 0: none is. It is
    compared every ten steps, by its quickest, and named when it is slow twice in a row."""

    @property
    def patience(self) -> float:
        """The shortest of the limits, in seconds; infinite when there is none."""
        return min(filter(None, (self.start, self.hang, self.long)), default=math.inf)

    @property
    def timeout(self) -> timedelta:
        """What collectives may take: the watch comes first, for it can say more than they can."""
        limits = (self.start, self.hang, self.long)
        return timedelta(seconds=max(limits) + 60) if all(limits) else FOREVER


@dataclass
class State:
    """What a rank says of itself to the others."""

    rank: int
    host: str = "?"
    pid: int = 0
    beat: int = 0
    """Counts what its watching thread has published."""
    step: int = 0
    section: str = "start"
    moves: int = 0
    """Counts the sections its training thread has begun."""
    stood: float = 0.0
    """Seconds without a move."""
    limit: float = math.inf
    """How long it may stand in this section."""
    collective: str = ""
    """What it waits for others in, if it does."""
    where: str = ""
    """The line it stands at."""
    ended: str = ""
    """The error that ended it."""
    silent: float = 0.0
    """Seconds in which its counter has not moved, as the reader saw it."""

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"


class Watch:
    """The watch over one run of the loop. Without a mesh it only keeps the time."""

    runs = itertools.count()
    """Each run of a process has keys of its own in the store; the ranks count alike."""

    def __init__(self, settings: Watching | None = None, mesh: Mesh | None = None) -> None:
        self.settings = settings
        self.rank, self.world = (mesh.rank, mesh.world) if mesh else (0, 1)
        self.section, self.step, self.moves = "start", 0, 0
        self.settled = False
        """Whether the first step of this attempt is over."""
        self.since = time.monotonic()
        self.figures: dict[str, float] = {}
        """How the ranks compared at last, for the log."""
        self._mesh, self._steps, self._named = mesh, deque[float](maxlen=WINDOW), dict[int, int]()
        self.split = Split(mesh.device if mesh else None)
        """Where the time goes."""
        self._own, self._suspect = 0.0, (-1, 0)
        self.host, self.pid = socket.gethostname(), os.getpid()
        self.folder: Path | None = None
        self.attempt: int | None = None
        self._beaten, self._beaten_long = -math.inf, False
        self._complained, self._mine_ended = False, ""
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    # What the training thread calls.

    def at(self, section: str, step: int | None = None) -> None:
        """The training thread begins a part of a step; called often, so it does next to nothing."""
        now = time.monotonic()
        self.split.begin(section)
        self.section, self.since = section, now
        if step is not None:
            self.settled = self.settled or self.step > 0
            self.step = step
        self.moves += 1
        if self.folder is not None and (now - self._beaten >= 1.0 or self._beaten_long != (section in LONG)):
            self._beat(now)

    def follow(self, folder: Path) -> None:
        """From now on `heartbeat.json` in this folder tells how the run goes."""
        if self.rank == 0 and self.settings is not None:
            self.folder = folder
            self._beat(time.monotonic())

    def limit(self) -> float:
        """How long the training thread may stand where it is."""
        if self.settings is None:
            return math.inf
        settings, long = self.settings, self.section in LONG
        limits = [settings.long if long else settings.hang] if self.settled else [settings.start]
        if long and not self.settled:  # the first of them is not done sooner than later ones
            limits.append(settings.long)
        return max(seconds or math.inf for seconds in limits)

    def stepped(self, step: int) -> None:
        """The end of a step. Now and then all ranks compare how long each has worked for itself."""
        self.split.read()
        before, self._own = self._own, sum(self.split.total.get(part, 0.0) for part in OWN)
        self._steps.append(self._own - before)
        if (
            self._mesh is None
            or self.world == 1
            or step % WINDOW
            or not (self.settings and self.settings.slow)
        ):
            return
        # The quickest: on a busy machine any step may take long, but a slow rank has no quick one.
        rank, seconds, usual = slowest(self._mesh.each(min(self._steps)))
        ratio = seconds / max(usual, 1e-9)
        self.figures = {"watch/slowest_rank": rank, "watch/slowest_ratio": ratio}
        late = ratio >= self.settings.slow and seconds - usual >= NEGLIGIBLE
        suspect, times = self._suspect
        self._suspect = (rank, times + 1 if rank == suspect else 1) if late else (-1, 0)
        if self._suspect[1] >= SURE and step - self._named.get(rank, -math.inf) >= 100 * WINDOW:
            self._named[rank] = step
            if self.rank == 0:
                say(
                    f"SLOW: rank {rank} ({place(rank)}) takes {ratio:.1f}x the others' time to read and "
                    f"compute: {seconds:.3g} s against {usual:.3g} s in the quickest of {WINDOW} steps, "
                    f"as of step {step}; they wait"
                )

    def _beat(self, now: float) -> None:
        self._beaten, self._beaten_long = now, self.section in LONG
        assert self.folder is not None
        limit = self.limit()
        try:
            if self.attempt is None and (attempt := self.folder / "attempt.json").is_file():
                self.attempt = int(json.loads(attempt.read_text())["attempt"])
            text = json.dumps(
                {
                    "step": self.step, "section": self.section, "time": time.time(),
                    "limit": limit if math.isfinite(limit) else None,
                    "long": self._beaten_long, "settled": self.settled,
                    "attempt": self.attempt or 0, "pid": self.pid, "host": self.host,
                }
            )  # fmt: skip
            temporary = self.folder / f"{HEARTBEAT}.tmp"
            temporary.write_text(text)
            os.replace(temporary, self.folder / HEARTBEAT)
        except FileNotFoundError:
            pass  # nothing has been made yet
        except (
            OSError,
            ValueError,
        ) as error:  # a full disk must not end a run that only wants to say it lives
            if not self._complained:
                say(f"{self.folder / HEARTBEAT} cannot be written: {error}")
            self._complained = True

    # The threads.

    def __enter__(self) -> "Watch":
        if self.world > 1:
            listen(self.split)
        patience = self.settings.patience if self.settings else math.inf
        number = next(Watch.runs)
        if not math.isfinite(patience):
            return self
        self.patience = patience
        # With thousands of ranks the store has enough to do.
        self.tick = min(1.0, patience / 8) * max(1.0, self.world / 2000)
        self.grace = max(min(10.0, patience / 2), 3 * self.tick)
        self._keys = [f"watch/{number}/{rank}" for rank in range(self.world)]
        self._verdict_key = f"watch/{number}/verdict"
        self._mine = State(self.rank, self.host, self.pid)
        self._others: list[State] = []
        self._suspicious, self._rounds, self._verdict = False, 0, ""
        self._main = threading.get_ident()
        self._meeting = meeting() if self.world > 1 else None
        self._start(self._judge)
        if self._meeting is not None:
            self._start(self._talk)
        return self

    def _start(self, work: Any) -> None:
        # Two threads: a call to a store whose process is frozen never returns, whatever its timeout says.
        thread = threading.Thread(target=work, name=f"watch{work.__name__}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        listen(None)
        if self._threads and self.world > 1 and isinstance(error, RuntimeError):
            # A collective fails when another rank ends; that rank may have ended because of a verdict.
            if self._mine.stood > self.patience / 2:
                time.sleep(3 * self.tick)
            if self._verdict:
                self._end("", dump=False)
        self._mine_ended = f"{kind.__name__}: {error}" if kind else ""
        self._over.set()
        for thread in self._threads:
            # Where all is well it is waited for, also when rank 0 has gone and it tries to connect: Python's
            # end would kill it within C++, and that the process. Else it may hang in the store for ever.
            thread.join(1.0 if kind else 10.0)
        if self.folder is not None:
            self.section = "failed" if kind else "ended"
            with suppress(BaseException):
                self._beat(time.monotonic())

    def _judge(self) -> None:
        """Sees whether the training thread moves, and if it does not, whose fault that is."""
        seen, rounds, unanswered = -1, -1, 0.0
        before = time.monotonic()
        while not self._over.wait(self.tick):
            now = time.monotonic()
            passed, before = min(now - before, 2 * self.tick), now
            mine = self._mine
            if self.moves != seen:
                seen, mine.stood = self.moves, 0.0
            else:
                mine.stood += passed
            mine.step, mine.section, mine.moves, mine.limit = self.step, self.section, seen, self.limit()
            mine.collective, mine.where = self._look() if mine.stood > 2 * self.tick else ("", "")
            unanswered = unanswered + passed if self._rounds == rounds else 0.0
            rounds = self._rounds
            if self._verdict:
                self._over.wait(2 * self.tick)  # rank 0 holds the store: the others must have read it
                self._end("", dump=False)
            # The first ranks see to it. Should they all be dead, the next ones do, a few after the others.
            turn = self.rank // SPEAKERS
            begin = max(self.patience, mine.limit) + 2 * self.grace * turn if turn else self.patience
            self._suspicious = mine.stood > begin - self.grace
            # The lowest rank that is alive speaks: each waits a little longer than the one before.
            if mine.stood <= self.patience + 2 * self.tick * min(self.rank, SPEAKERS - 1):
                continue
            if self._meeting is not None and unanswered > self.grace:
                if mine.stood > mine.limit:
                    self._end(
                        f"{mine} has stood still in `{mine.section}` of step {mine.step} for "
                        f"{mine.stood:.0f} s{_in(mine)}; rank 0 ({self._meeting.leader}), where all "
                        "ranks meet, does not answer: it is frozen, or dead, or cut off",
                        dump=self.rank == 1,
                    )
                continue
            if self._meeting is not None and not self._others:
                continue  # it has not asked, or not heard yet; nobody is judged by silence alone
            culprits = who(self._others or [mine], mine, self.grace)
            if culprits:
                self._pronounce(culprits)

    def _look(self) -> tuple[str, str]:
        """Which collective the training thread waits in, if any, and the line it stands at."""
        frames = sys._current_frames()
        frame = frames.get(self._main)
        collective, where = read_stack(frame)
        if not collective and frame is not None and frame.f_code.co_name == "_engine_run_backward":
            # On a GPU autograd's own threads run the hooks that reduce gradients.
            for other in frames.values():
                collective = collective or read_stack(other)[0]
        return collective, where

    def _talk(self) -> None:
        """Publishes this rank's state, reads the verdict and, when something is wrong, everybody's state."""
        assert self._meeting is not None
        over = False
        while not over:
            # A store that is slow once must not make this rank deaf and dumb, and so a suspect, for ever.
            # When rank 0's process has gone for good, and training stands still, the judge will say so.
            with suppress(RuntimeError):
                store = self._meeting.connect(timedelta(seconds=5))
                store.set_timeout(timedelta(seconds=30))
                self._converse(store)
            over = self._over.wait(self.tick)

    def _converse(self, store: dist.Store) -> None:
        """Until the run is over, or the store does not answer."""
        counters: dict[int, int] = {}
        silent: dict[int, float] = {}
        before = time.monotonic()
        over = False
        if self.rank == 0:  # multi_get waits for keys that nobody has set
            for key in self._keys:
                store.compare_set(key, "", "{}")
        while not over:
            over = self._over.wait(self.tick)
            self._mine.beat += 1
            self._mine.ended = self._mine_ended if over else ""
            store.set(self._keys[self.rank], json.dumps(asdict(self._mine)))
            if not self._verdict and store.check([self._verdict_key]):
                self._verdict = store.get(self._verdict_key).decode()
            now = time.monotonic()
            passed, before = min(now - before, 2 * self.tick), now
            if not self._suspicious:
                self._others, counters, silent = [], {}, {}
                self._rounds += 1
                continue
            states = []
            for rank, value in enumerate(store.multi_get(self._keys)):
                state = State(**{"rank": rank, **json.loads(value)})
                moved = counters.get(rank) != state.beat
                silent[rank] = 0.0 if moved else silent.get(rank, 0.0) + passed
                counters[rank], state.silent = state.beat, silent[rank]
                states.append(state)
            self._others = states
            self._rounds += 1

    def _pronounce(self, culprits: list[State]) -> None:
        """Says whose fault it is, unless another rank has, and ends."""
        text = verdict(culprits, self._others or [self._mine])
        guilty = any(state.rank == self.rank for state in culprits)
        if self._meeting is not None:
            signed = f"{text}; said by rank {self.rank}"  # two ranks may find the same words
            first = True
            with suppress(RuntimeError):  # rank 0's process has just gone: said twice is better than never
                store = self._meeting.connect(timedelta(seconds=5))
                first = store.compare_set(self._verdict_key, "", signed).decode() == signed
            if not first:
                self._verdict = self._verdict or "said"
            text = text if first else ""
        if text:
            _write(text)
        if self._meeting is not None:
            self._over.wait(3 * self.tick)
        self._end("", dump=guilty or bool(text))

    def _end(self, text: str, dump: bool) -> None:
        """Ends this process, whatever its training thread is doing."""
        last = threading.Timer(10.0, os._exit, (HUNG,))  # what is written below may block, too
        last.daemon = True
        last.start()
        if text:
            _write(text)
        guilty = self._verdict and f"rank {self.rank} (" in self._verdict.partition(";")[0]
        if dump or guilty:
            faulthandler.dump_traceback(2)
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(HUNG)


def _write(text: str) -> None:
    """To stderr, past Python's own locks: the training thread may hold them."""
    with suppress(OSError):
        os.write(2, f"HUNG: {text}; ending with code {HUNG}\n".encode())


def read_stack(frame: FrameType | None) -> tuple[str, str]:
    """The collective that a thread waits in, or "", and the innermost line of it that is megachat's."""
    collective = where = ""
    while frame is not None and not where:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if not collective and path.endswith("distributed/distributed_c10d.py"):
            collective = name
        if "/megachat/" in path and not path.endswith(("train/watch.py", "train/split.py")):
            where = f"{path.rpartition('/')[2]}:{frame.f_lineno} in {name}"
        frame = frame.f_back
    return collective, where


def slowest(seconds: list[float]) -> tuple[int, float, float]:
    """The slowest rank, its time, and the median of the others'. Example: [1, 2, 9] -> (2, 9, 1.5)"""
    rank = max(range(len(seconds)), key=seconds.__getitem__)
    others = seconds[:rank] + seconds[rank + 1 :]
    return rank, seconds[rank], statistics.median(others)


def who(states: list[State], reader: State, grace: float) -> list[State]:
    """The ranks that hold up the others, or [] while they are within their limits.

    A rank that does not answer comes first, then one that is in no collective, then the one that is behind.
    One that does not answer has stood for as long as the reader at least, whatever it last said of itself.
    """

    def order(state: State) -> tuple[int, ...]:
        if state.silent > grace:
            return (0,)
        return (1, bool(state.collective), state.step, state.moves)

    def late(state: State) -> bool:
        one = reader if state.silent > grace else state
        return one.stood > one.limit

    first = min(order(state) for state in states)
    found = [state for state in states if order(state) == first]
    return found if all(late(state) for state in found) else []


def verdict(culprits: list[State], states: list[State]) -> str:
    """What stands still and who waits for it, in words."""
    first, guilty = culprits[0], {state.rank for state in culprits}
    if first.ended:
        told = f"{first} has ended ({first.ended})"
    elif first.silent:
        # It may have come further since: its training thread goes on for as long as nobody waits for it.
        told = f"{first}, last heard of in `{first.section}` of step {first.step}, does not answer any more"
        told += ": it is frozen, or dead, or holds Python's lock"
    else:
        told = f"{first} stands still in `{first.section}` of step {first.step} for {first.stood:.0f} s"
        told += _in(first)
    if len(culprits) > 1:
        told += f", and so {'do' if len(culprits) > 2 else 'does'} {ranks(sorted(guilty - {first.rank}))}"
    waiting: dict[str, list[int]] = {}
    for state in states:
        if state.rank not in guilty:
            place = f"{state.collective or 'no collective'} (`{state.section}` of step {state.step})"
            waiting.setdefault(place, []).append(state.rank)
    for place, numbers in waiting.items():
        told += f"; {ranks(numbers)} wait{'s' if len(numbers) == 1 else ''} in {place}"
    return told


def _in(state: State) -> str:
    places = [*filter(None, (state.collective and f"waiting in {state.collective}", state.where))]
    return f" ({', '.join(places)})" if places else ""


def ranks(numbers: list[int]) -> str:
    """Example: ranks([0, 1, 2, 5]) -> 'ranks 0-2, 5'"""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    told = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank{'s' if len(numbers) > 1 else ''} {told}"
