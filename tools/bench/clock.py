"""How everyone's time and memory is taken: one process each, on one core, the same text, the same clock.

A runner is a script with functions `removed` and `signatures` that ends with `serve(removed, signatures)`. It
runs in the environment of what it runs, so only Python's own library may be imported here.
"""

import json
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS"),
    "1",
)
"""Environment variables that a runner is started with."""
WARM_UP = 20
"""Documents of each language worked through before the clock starts: imports, compilation, dictionaries."""


def serve(
    removed: Callable[[Path], list[int]],
    signatures: Callable[[list[str]], object],
) -> None:
    """`RUNNER.py removed|signatures TEXT.jsonl RESULT.json`: does the job and writes what it took.

    `removed` reads the file itself, and says which lines, counted from 0, it would remove. `signatures` gets
    the texts: reading is in everybody's time in the first job, and in nobody's in the second.
    """
    job, text, result = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    work: Callable[[Any], Any] = {"removed": removed, "signatures": signatures}[job]
    given: Callable[[Path], Any] = Path if job == "removed" else texts
    with text.open(encoding="utf-8") as file, tempfile.TemporaryDirectory() as folder:
        few = Path(folder) / "few.jsonl"
        few.write_text("".join(first_of_each_language(file)), encoding="utf-8")
        work(given(few))
    argument = given(text)
    started = processor_time()
    answer = work(argument)
    told: dict[str, Any] = {"seconds": processor_time() - started, "peak": peak()}
    if job == "removed":
        told["removed"] = sorted(map(int, answer))
    result.write_text(json.dumps(told), encoding="utf-8")


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
