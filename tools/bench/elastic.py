"""Does a checkpoint of any layout go on in any other? python tools/bench/elastic.py [--quick]

A layout is a ZeRO stage (0 to 3) on so many data ranks (1, 2) of so many tensor ranks (1, 2): sixteen. In
each a small model is pretrained in fp32 for eight steps, and its checkpoint of the third is continued in
every layout, by `pretrain` as a user starts it. A cell is the largest difference of a loss in those five
steps to that of an undisturbed process, as a share of it. A run that started over would come to the same
losses, so that is an error. The ranks are processes on the CPU that talk by gloo, the same ones for all that
is done on as many; everything is built anew in every cell.
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.connection import wait
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # of a script, only its own folder is there

from megachat.config import compose
from megachat.parallel.mesh import free_port
from megachat.run import Stage, perform

SAVED, STEPS = 3, 8
LIMIT = 1e-4
TINY = [
    "model=gpt_3m", "model.dim=32", "model.layers=2", "model.heads=4", "model.kv_heads=2", "model.head_dim=8",
    "model.hidden=64", "model.context=32", "context=16", "batch=8", "micro_batch=2", "optimizer.lr=1e-2",
    "schedule=constant", "schedule.warmup=0", f"tokens={STEPS * 8 * 16}", f"checkpoint_interval={SAVED}",
    "checkpoint_keep=9", "validation_interval=0", "validation_windows=1", "prompt=one", "log.interval=1",
    "parallel.precision=fp32",
]  # fmt: skip
PRELOAD = ["deepspeed", "torch._inductor.compile_fx", "grain", "megachat.train.pretrain"]
"""What a rank would take seconds to import, and is imported once for all of them."""


class Layout(NamedTuple):
    """How a model is spread."""

    zero: int
    data: int
    tensor: int

    def __str__(self) -> str:
        return f"{self.zero}/{self.data}x{self.tensor}"


Cells = dict[tuple[Layout, Layout], float]
"""The largest difference, by the layout that saved and the one that went on."""


def main() -> int:
    """Prints the table; 1 if a cell is empty or above the limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="ZeRO 0 and 3 on 1x1 and 2x2 alone: 16 cells")
    given = parser.parse_args()
    chosen = layouts((0, 3), ((1, 1), (2, 2))) if given.quick else layouts()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        cells = measure(Path(folder), chosen)
    print("\n".join(table(chosen, cells)))
    line, fine = summary(chosen, cells, time.monotonic() - begun)
    print(line)
    return 0 if fine else 1


def layouts(
    zeros: Iterable[int] = (0, 1, 2, 3), grids: Iterable[tuple[int, int]] = ((1, 1), (2, 1), (1, 2), (2, 2))
) -> list[Layout]:
    """Every ZeRO stage on every grid of data and tensor ranks."""
    return [Layout(zero, *grid) for grid in grids for zero in zeros]


def table(chosen: list[Layout], cells: Mapping[tuple[Layout, Layout], float]) -> list[str]:
    """A line for each layout that saved, a column for each that went on; `-` where nothing was measured."""

    def cell(saved: Layout, loaded: Layout) -> str:
        found = cells.get((saved, loaded))
        return f"{'-' if found is None else '0' if found == 0 else f'{found:.0e}':>6}"

    return [
        "ZeRO stage / data x tensor ranks: saved (lines), loaded (columns)",
        " " * 6 + "".join(f"{loaded!s:>6}" for loaded in chosen),
        *(f"{saved!s:<6}" + "".join(cell(saved, loaded) for loaded in chosen) for saved in chosen),
    ]


def summary(
    chosen: list[Layout], cells: Mapping[tuple[Layout, Layout], float], seconds: float
) -> tuple[str, bool]:
    """The last line, and whether all is as it should be."""
    most = largest(cells.values())
    line = (
        f"{len(cells)} of {len(chosen) ** 2} cells; over {STEPS - SAVED} steps a loss differs by at most "
        f"{most:.1e} (limit {LIMIT:g}); {seconds:,.0f} s"
    )
    return line, len(cells) == len(chosen) ** 2 and most <= LIMIT  # not a number is above it, too


def difference(found: list[float], expected: list[float]) -> float:
    """The largest difference of two curves' losses, as a share of the second's; NaN if one is shorter."""
    if len(found) != len(expected):
        return math.nan
    return largest(abs(one - other) / other for one, other in zip(found, expected, strict=True))


def largest(numbers: Iterable[float]) -> float:
    """As max(), which may lose a NaN; NaN if there are none."""
    found = [*numbers]
    return max(found, default=math.nan) if not any(map(math.isnan, found)) else math.nan


def measure(folder: Path, chosen: list[Layout]) -> Cells:
    """Saves in every layout, then goes on from everything in every one."""
    write_run(folder / "inputs")
    grids = list(dict.fromkeys((layout.data, layout.tensor) for layout in chosen))
    for grid in grids:
        own = [layout for layout in chosen if layout[1:] == grid]
        gang(*grid, train_and_save, folder, own)
        print(f"{grid[0]}x{grid[1]}: saved", file=sys.stderr)
    cells: Cells = {}
    for grid in grids:
        own = [layout for layout in chosen if layout[1:] == grid]
        gang(*grid, go_on, folder, own, chosen)
        cells |= told(folder, own, chosen)
        print(f"{grid[0]}x{grid[1]}: {len(cells)} cells", file=sys.stderr)
    return cells


def told(folder: Path, own: list[Layout], chosen: list[Layout]) -> Cells:
    """The cells of which there are losses."""
    expected = losses(folder / "saved" / name(chosen[0]))[SAVED:]
    return {
        (saved, loaded): difference(losses(path)[SAVED:], expected)
        for saved in chosen
        for loaded in own
        if (path := folder / "moved" / f"{name(saved)}-{name(loaded)}") and (path / "went_on").is_file()
    }


def name(layout: Layout) -> str:
    """As part of a path."""
    return f"{layout.zero}-{layout.data}-{layout.tensor}"


def losses(run: Path) -> list[float]:
    """Of all steps of a run."""
    lines = (run / "pretrain" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def write_run(run: Path) -> None:
    """A tokenizer and token shards of 120 documents of random number words."""
    words = "zero one two three four five six seven eight nine ten eleven twelve".split()
    draw = Random(0)
    run.mkdir(parents=True)
    source = run / "numbers.jsonl"
    texts = [" ".join(draw.choice(words) for _ in range(draw.randint(20, 60))) for _ in range(120)]
    source.write_text("".join(json.dumps({"text": f"{text}."}) + "\n" for text in texts), encoding="utf-8")
    corpus = ["corpus=[json_lines]", f"corpus.json_lines.paths=[{source}]", "filters=none", "dedup=exact"]
    settings = {
        "clean": corpus,
        "tokenizer": ["vocab=300", "threads=1"],
        "encode": ["validation=0.1", "executor.processes=1"],
    }
    for stage, overrides in settings.items():
        perform(Stage.of(compose(stage, [f"run={run}", "log.wandb=disabled", *overrides])))


def pretrain(folder: Path, run: Path, layout: Layout) -> None:
    """The stage, from its newest checkpoint or from the start."""
    spread = [f"parallel=zero{layout.zero}", f"parallel.tensor={layout.tensor}", "log.wandb=disabled"]
    places = [f"run={run}", f"inputs={folder / 'inputs'}"]
    perform(Stage.of(compose("pretrain", [*places, *TINY, *spread])))


def train_and_save(folder: Path, own: list[Layout]) -> None:
    """What a rank does in the first half."""
    for layout in own:
        pretrain(folder, folder / "saved" / name(layout), layout)


def go_on(folder: Path, own: list[Layout], chosen: list[Layout]) -> None:
    """What a rank does in the second half."""
    import torch.distributed as dist

    for loaded in own:
        for saved in chosen:
            run, origin = folder / "moved" / f"{name(saved)}-{name(loaded)}", folder / "saved" / name(saved)
            metrics, earlier = run / "pretrain" / "metrics.jsonl", ""
            if os.environ["RANK"] == "0":
                checkpoint = Path("pretrain", "checkpoints", f"step-{SAVED:08d}")
                shutil.copytree(origin / checkpoint, run / checkpoint, copy_function=os.link)
                earlier = marked(origin / "pretrain" / "metrics.jsonl")
                metrics.write_text(earlier, encoding="utf-8")
            if dist.is_initialized():  # no rank looks for the checkpoint before it is there
                dist.barrier()
            pretrain(folder, run, loaded)
            if os.environ["RANK"] == "0":
                if not metrics.read_text(encoding="utf-8").startswith(earlier):
                    raise RuntimeError(f"{loaded} started over; it was to go on from step {SAVED} of {saved}")
                shutil.rmtree(run / "pretrain" / "checkpoints")
                (run / "went_on").touch()


def marked(metrics: Path) -> str:
    """The rows up to the saved step with a mark, which no run writes: one that starts over drops them."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()[:SAVED]]
    return "".join(json.dumps(row | {"earlier": True}) + "\n" for row in rows)


def gang(data: int, tensor: int, work: Callable[..., None], folder: Path, *arguments: Any) -> None:
    """Ranks that do this work together; what they print is shown if one of them fails."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    world, port = data * tensor, free_port()
    logs = [folder / f"rank{rank}.log" for rank in range(world)]
    ranks = [
        context.Process(target=_rank, args=(rank, world, port, logs[rank], work, folder, *arguments))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    waiting = {process.sentinel: process for process in ranks}
    while waiting and not any(process.exitcode for process in ranks):
        for sentinel in wait(list(waiting)):
            del waiting[sentinel]  # type: ignore[arg-type]
    time.sleep(1.0 if waiting else 0.0)  # the others may have something to say, too
    for process in ranks:
        process.kill()
        process.join()
    for process, log in zip(ranks, logs, strict=True):
        if process.exitcode:
            tail = log.read_text(encoding="utf-8", errors="replace")[-3000:]
            print(f"--- {data}x{tensor}, {log.stem}, code {process.exitcode} ---\n{tail}", file=sys.stderr)


def _rank(
    rank: int, world: int, port: int, log: Path, work: Callable[..., None], folder: Path, *arguments: Any
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": "-1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    with log.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch
    from tqdm import tqdm

    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is shared with other processes, and would be left behind
    code = 0
    try:
        work(folder, *arguments)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # process groups that are still open would wait at exit for ranks that have gone


if __name__ == "__main__":
    sys.exit(main())
