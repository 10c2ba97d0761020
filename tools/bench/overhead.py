"""What DeepSpeed and the training loop add to a bare loop, and where: python tools/bench/overhead.py

Every line is a layout (`2/1x2`: ZeRO 2, one data rank of two tensor ranks) that trains the 14 M-parameter
model of `pretrain.py` by `megachat pretrain`, or the bare loop, once alone and once twice side by side, each
of the two with half of the batch and half of the cores, as two ranks have. Columns are milliseconds a step,
of the innermost of the functions in `runners/parts.py`, the mean of the ranks, the median of the rounds.
With `--processor` every rank has one thread and the time is the processor's: what waits does not count, so
it means something on a machine that others use, too.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # of a script, only its own folder is there

from tools.bench.pretrain import CPU, SKIPPED, Megachat, Prepared, prepare, running, said
from tools.bench.runners.parts import OTHER, PARTS

COLUMNS = [*PARTS, OTHER]

Layout = tuple[str, int]
"""A ZeRO stage and tensor ranks, as in `2/1x2`, or `bare`; and how many processes."""

LAYOUTS: list[Layout] = [
    ("bare", 1), ("0/1x1", 1), ("1/1x1", 1), ("2/1x1", 1), ("3/1x1", 1),
    ("bare", 2), ("0/2x1", 2), ("1/2x1", 2), ("2/2x1", 2), ("3/2x1", 2),
    ("1/1x2", 2),
]  # fmt: skip


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=6, help="timed ones (default: 6)")
    parser.add_argument("--repeat", type=int, default=3, help="rounds; medians count (default: 3)")
    parser.add_argument("--only", nargs="+", default=[], metavar="LAYOUT", help="such as bare 1/1x1 2/2x1")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="SETTING", help="of megachat, for all its lines"
    )
    parser.add_argument("--skip", type=int, default=SKIPPED, help=f"steps before (default: {SKIPPED})")
    parser.add_argument(
        "--processor", action="store_true", help="the processor's time, with one thread a rank"
    )
    given = parser.parse_args()
    own = {"BENCH_CLOCK": "processor", "OMP_NUM_THREADS": "1"} if given.processor else {}
    chosen = [layout for layout in LAYOUTS if not given.only or layout[0] in given.only]
    took: dict[Layout, list[dict[str, float]]] = {layout: [] for layout in chosen}
    with tempfile.TemporaryDirectory(prefix="bench-overhead.") as folder:
        prepared = prepare(Path(folder), CPU, given.skip + given.steps + 1, "cpu")
        for number in range(given.repeat):
            for layout in chosen:
                print(f"round {number + 1}: {layout[0]} on {layout[1]}", file=sys.stderr, flush=True)
                place = Path(folder) / f"{layout[0].replace('/', '-')}-{layout[1]}-{number}"
                took[layout].append(measure(layout, prepared, place, given.steps, given.set, own))
    print("\n".join(table(took)))
    return 0


def measure(
    layout: Layout,
    prepared: Prepared,
    place: Path,
    steps: int,
    settings: Sequence[str] = (),
    own: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Milliseconds a step by part, the mean of the ranks, over the last `steps` but one of the job.

    `own` are environment variables.
    """
    place.mkdir()
    name, ranks = layout
    if name == "bare":
        half = replace(prepared.job, batch=prepared.job.batch // ranks, marks=str(place / "marks.jsonl"))
        half.write(place / "job.json")
        threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // ranks))} if ranks > 1 else {}
        command, variables = (
            [str(place / "job.json"), "bf16"],
            [threads | {"RANK": str(n)} for n in range(ranks)],
        )
    else:
        zero, _, grid = name.partition("/")
        spread = (f"parallel=zero{zero}", f"parallel.tensor={grid.partition('x')[2]}")
        line = Megachat(key="", name="", ranks=ranks, settings=(*spread, *settings))
        whole, variables, _ = line.command(prepared, place)
        command = whole[whole.index("megachat") + 1 :]
    kind = "bare" if name == "bare" else "megachat"
    start = [
        sys.executable,
        "-m",
        "tools.bench.runners.parts",
        str(place),
        str(prepared.job.steps - steps - 1),
        str(steps),
        kind,
    ]
    with running([*start, *command], [one | dict(own or {}) for one in variables], place) as processes:
        for rank, process in enumerate(processes):
            if process.wait(timeout=1800):
                raise RuntimeError(f"{name} failed:\n{said(place, rank)}")
    told = [json.loads(path.read_text(encoding="utf-8")) for path in place.glob("parts-*.json")]
    assert len(told) == ranks, f"{len(told)} of {ranks} ranks have told"
    return {part: 1000 * mean(one[part] for one in told) for part in COLUMNS}


def table(took: Mapping[Layout, Sequence[Mapping[str, float]]]) -> Iterator[str]:
    """A line for each layout; `x bare` is of the bare loop in as many processes."""
    yield f"{'ms a step':<10}{'ranks':>6}{'all':>8}{'x bare':>8}" + "".join(f"{part:>14}" for part in COLUMNS)
    base: dict[int, float] = {}
    for (name, ranks), rounds in took.items():
        whole = median(sum(one.values()) for one in rounds)
        if name == "bare":
            base[ranks] = whole
        ratio = f"{whole / base[ranks]:>8.2f}" if ranks in base else f"{'-':>8}"
        parts = "".join(f"{median(one[part] for one in rounds):>14.1f}" for part in COLUMNS)
        yield f"{name:<10}{ranks:>6}{whole:>8.0f}{ratio}{parts}"


if __name__ == "__main__":
    sys.exit(main())
