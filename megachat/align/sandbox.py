"""Python that a model has written, run in a process of its own, within limits of time and memory.

The process has an empty folder, no environment, a session of its own, and limits of the operating system on
processor time, memory and files; where the kernel lets anybody have them, also a network that leads nowhere
and a tree of processes that ends with it. That holds a program that runs wild. It is no prison for one that
attacks: for that, run the whole stage in a container.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

from pydantic import PositiveFloat, PositiveInt

from megachat.config import Config

T = TypeVar("T")
R = TypeVar("R")

LONGEST = 100_000
"""Bytes of output that are kept."""


@dataclass(frozen=True)
class Outcome:
    """What came of a program."""

    output: str
    """What it wrote, errors included."""
    ended: bool
    """Whether it came to its end, without an error and in time."""
    late: bool = False
    """Whether it was killed for its time."""


class Limits(Config):
    """What a program may take."""

    seconds: PositiveFloat
    """Until it is killed."""
    megabytes: PositiveInt
    """Of memory; Python itself takes some 30."""

    def run(self, program: str) -> Outcome:
        """The program's output, and whether it came to its end.

        Its last line is told by a word that the program cannot know beforehand: one that leaves by `exit(0)`
        has not come to its end.
        """
        word = secrets.token_hex(16)
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as written:
            child = subprocess.Popen(
                [*_apart(), sys.executable, "-s", "-P", "-S", "-c", RUNNER, *self._arguments()],
                stdin=subprocess.PIPE,
                stdout=written,
                stderr=subprocess.STDOUT,
                cwd=folder,
                # The same program prints a set in the same order, whoever runs it.
                env={"PYTHONIOENCODING": "utf-8", "PYTHONHASHSEED": "0"},
                start_new_session=True,
            )
            late = False
            try:
                child.communicate(f"{word}\n{program}".encode("utf-8", "replace"), timeout=self.seconds)
            except subprocess.TimeoutExpired:
                late = True
            _end(child)
            written.seek(0)
            output = written.read(LONGEST).decode("utf-8", "replace")
        before, found, _ = output.partition(word)
        return Outcome(before, bool(found), late)

    def _arguments(self) -> list[str]:
        limits = {
            "CPU": int(self.seconds) + 1,
            "AS": self.megabytes * 2**20,
            "FSIZE": 10 * 2**20,
            "NOFILE": 64,
            "CORE": 0,
        }
        return [f"{name}={limit}" for name, limit in limits.items()]


RUNNER = """
import resource, sys
for limit in sys.argv[1:]:
    name, _, value = limit.partition("=")
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (int(value), int(value)))
word, _, program = sys.stdin.read().partition("\\n")
def end(word=word, write=sys.stdout.write, flush=sys.stdout.flush):
    write(word)
    flush()
sys.stdin = None
del word
try:
    exec(compile(program, "answer", "exec"), {"__name__": "__main__"})
except BaseException:
    sys.stdout.flush()  # what it has printed stands before its error
    raise
end()
"""
"""What limits itself, runs the program, and says that it has come to its end."""


def _end(child: "subprocess.Popen[bytes]") -> None:
    """Ends it and whatever it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


@cache
def _apart() -> list[str]:
    """A command that takes network and other processes away, where the kernel lets anybody do so."""
    command = ["unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child"]
    try:
        allowed = subprocess.run([*command, "true"], capture_output=True, timeout=10).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        allowed = False
    return command if allowed else []


def side_by_side(act: Callable[[T], R], items: Sequence[T], at_once: int) -> list[R]:
    """`act` on each item, so many at a time, in threads: it waits for another process, or another machine."""
    with ThreadPoolExecutor(at_once) as pool:
        return [*pool.map(act, items)]
