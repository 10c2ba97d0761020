"""How everyone's time and memory is taken: one process each, on one core, the same text, the same clock.

A runner is a script in `runners/` that ends with `serve` or `serve_encoder`. It runs in the environment of
what it runs, so only Python's own library may be imported here.
"""

import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

S = TypeVar("S")
T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
VENVS = ROOT / ".venv-bench"
"""Where setup.sh makes the environments."""
ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS"),
    "1",
)
"""Environment variables that a runner is started with."""
WARM_UP = 20
"""Documents of each language worked through before the clock starts: imports, compilation, dictionaries."""
ROUNDS, ENOUGH = 5, 10.0
"""Work is repeated until it has taken so many seconds, but not more often than that; the median counts."""
BATCH = 1 << 20
"""Characters of text given to an encoder at a time."""

Result = dict[str, Any]
"""What a runner wrote: `seconds` of the processor, `wall`, and whatever else it tells."""


def missing(environment: str) -> str:
    """How to make an environment of `VENVS` that is not there; "" if it is, and for the one called ""."""
    there = not environment or (VENVS / environment / "ready").exists()
    return "" if there else f"bash tools/bench/setup.sh {environment}"


def run(
    module: str, environment: str, *arguments: str | Path, settings: Mapping[str, str] | None = None
) -> Result:
    """Starts a runner in its environment, with `settings` as environment variables; what it measured."""
    python = str(VENVS / environment / "bin" / "python") if environment else sys.executable
    with tempfile.TemporaryDirectory(prefix="bench.") as folder:
        result = Path(folder) / "result.json"
        done = subprocess.run(
            [python, "-m", f"tools.bench.runners.{module}", *arguments, result],
            cwd=folder,
            env=os.environ
            | ONE_THREAD
            | {"PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
            | dict(settings or {}),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{module} failed:\n{done.stderr[-4000:]}")
        told: Result = json.loads(result.read_text())
        return told


def serve(
    removed: Callable[[Path], tuple[list[int], int]],
    signatures: Callable[[list[str]], object],
) -> None:
    """`RUNNER.py removed|signatures TEXT.jsonl RESULT.json`: does the job and writes what it took.

    `removed` reads the file itself, and says which lines, counted from 0, it would remove, and how many
    bytes of signatures it had on disk. `signatures` gets the texts: reading is in everybody's time in the
    first job, and in nobody's in the second.
    """
    job, text, result = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    one_core()
    work: Callable[[Any], Any] = {"removed": removed, "signatures": signatures}[job]
    given: Callable[[Path], Any] = Path if job == "removed" else texts
    with text.open(encoding="utf-8") as file, tempfile.TemporaryDirectory() as folder:
        few = Path(folder) / "few.jsonl"
        few.write_text("".join(first_of_each_language(file)), encoding="utf-8")
        work(given(few))
    argument = given(text)
    answer, told = rounds(work, lambda: argument)
    if job == "removed":
        told |= {"removed": sorted(map(int, answer[0])), "disk": answer[1]}
    result.write_text(json.dumps(told), encoding="utf-8")


def serve_encoder(
    make: Callable[[Path], Callable[[list[str]], T]], ids: Callable[[T], Iterable[Sequence[int]]]
) -> None:
    """`RUNNER.py TOKENIZER TEXT.jsonl RESULT.json`: encodes; writes what it took, and digests of the ids.

    `make` reads the tokenizer, for each round anew, lest one knows the words of the round before. What it
    returns is timed; `ids` is not, and gives the ids of each text out of what encoding returned.
    """
    tokenizer, text, result = map(Path, sys.argv[1:4])
    one_core()
    groups = list(batches(texts(text)))
    first = make(tokenizer)
    found = [array("i", one) for group in groups for one in ids(first(group))]

    def work(encode: Callable[[list[str]], T]) -> None:
        for group in groups:
            encode(group)

    _, told = rounds(work, lambda: make(tokenizer))
    told |= {"tokens": sum(map(len, found)), "digests": [*map(digest, found)]}
    result.write_text(json.dumps(told), encoding="utf-8")


def rounds(work: Callable[[S], T], given: Callable[[], S]) -> tuple[T, Result]:
    """What the first of some rounds returned, the medians of their times, and the peak after the first.

    Each works with what `given` returns, which is not timed.
    """
    seconds: list[float] = []
    wall: list[float] = []
    answers: list[T] = []
    most = 0
    while not wall or (len(wall) < ROUNDS and sum(wall) < ENOUGH):
        argument = given()
        before, started = processor_time(), time.perf_counter()
        answer = work(argument)
        wall.append(time.perf_counter() - started)
        seconds.append(processor_time() - before)
        if not answers:
            answers, most = [answer], peak()
        del answer, argument
    told = {"seconds": median(seconds), "wall": median(wall), "rounds": len(wall), "peak": most}
    return answers[0], told


def one_core() -> None:
    """Holds this process, and what it starts, to one core."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def first_of_each_language(lines: Iterable[str]) -> Iterator[str]:
    """The lines of the warm-up."""
    seen = Counter[str]()
    for line in lines:
        language = json.loads(line)["language"]
        seen[language] += 1
        if seen[language] <= WARM_UP:
            yield line


def texts(path: Path) -> list[str]:
    """The texts of a JSON Lines file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts of `BATCH` characters together, as megachat's encode stage takes them."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def digest(ids: Sequence[int]) -> str:
    """The same for the same ids."""
    return hashlib.sha256(array("i", ids)).hexdigest()[:16]


def processor_time() -> float:
    """Seconds that a core has worked for this process and for those it has started and waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def peak() -> int:
    """The most bytes this process has held, with Python and all that is imported.

    Not ru_maxrss, which begins with what the parent held when it started this process.
    """
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
