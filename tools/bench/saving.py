"""What a checkpoint costs: python tools/bench/saving.py [--model gpt_125m] [--rounds 3]

The first table is the time that training waits for a checkpoint of the same fp32 weights and Adam moments,
and the time until all of it is on the disk, each writer in turn, in one process, on the CPU: megachat's own,
DeepSpeed's `save_checkpoint`, and torch.distributed.checkpoint. All are fsynced: DeepSpeed, which leaves its
files to the page cache, after it has returned. Nothing trains meanwhile, so a writer in the background has
the cores to itself. `share` is of an interval of ten minutes.

The second is a run that is killed, all its ranks at once by SIGKILL, and started again by the same command:
seconds from there to the first new step, by what it does. Its tokenizer is a small one, so layers take the
place of the embedding's rows.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # of a script, only its own folder is there

INTERVAL = 600.0
"""Seconds between two checkpoints, for the share."""
VOCAB = 65_536
"""Rows of the embedding, for the stall: with them gpt_125m has 125.8 M parameters."""


@dataclass(frozen=True)
class Took:
    """One checkpoint."""

    stall: float
    """Seconds that training waited."""
    total: float
    """Seconds until it was on the disk."""


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="gpt_125m")
    parser.add_argument("--layers", type=int, default=20, help="of the run that is killed: 127 M with 20")
    parser.add_argument("--zero", type=int, default=1, choices=[0, 1, 2, 3])
    parser.add_argument("--rounds", type=int, default=3, help="checkpoints of each after its first")
    parser.add_argument("--ranks", type=int, default=1, help="of the run that is killed")
    parser.add_argument("--folder", type=Path, help="on the disk to write to; it is deleted")
    parser.add_argument("--writers", default="", help="of the first table: those with this in their name")
    parser.add_argument("--only", choices=["stall", "recovery"])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="bench-saving.") as name:
        if given.only != "recovery":
            stalls(Path(name), given.model, given.zero, given.rounds, given.writers)
        if given.only != "stall":
            recovery(Path(name), given.model, given.layers, given.ranks)


# The stall.


def stalls(folder: Path, model: str, zero: int, rounds: int, which: str) -> None:
    """Measures each writer in turn, and prints the table."""
    writers, size = programs(folder, model, zero)
    print(f"{size / 1e9:.2f} GB of weights and moments, ZeRO {zero} on one process")
    print(f"{'':<40}{'first s':>9}{'stall s':>9}{'GB/s':>7}{'share':>8}{'on disk s':>11}")
    for name, write in writers.items():
        if which not in name:
            continue
        took = []
        for number in range(rounds + 1):
            place = folder / "checkpoints"
            took.append(write(place, number + 1))
            shutil.rmtree(place)
        print(line(name, took, size), flush=True)


def line(name: str, took: Sequence[Took], size: int) -> str:
    """The first apart, for it is the one that touches memory first, and the median of the others."""
    stall, total = (median(getattr(one, which) for one in took[1:]) for which in ("stall", "total"))
    return (
        f"{name:<40}{took[0].stall:>9.2f}{stall:>9.2f}{size / stall / 1e9:>7.2f}"
        f"{stall / INTERVAL:>8.2%}{total:>11.2f}"
    )


Write = Callable[[Path, int], Took]
"""Writes a checkpoint of the step of this number into a folder that is not there yet."""


def programs(folder: Path, model_name: str, zero: int) -> tuple[dict[str, Write], int]:
    """The writers, of one engine that has taken a step, and the bytes that each has to write."""
    import torch
    from torch.distributed import checkpoint as torch_checkpoint

    from megachat.config import compose, decode
    from megachat.files import fsync
    from megachat.parallel import attempt, checkpoint
    from megachat.parallel.engine import Engine
    from megachat.parallel.mesh import start
    from megachat.parallel.saving import Saver

    tree = compose("pretrain", [f"model={model_name}", f"parallel=zero{zero}", "parallel.precision=fp32"])
    task = decode({**tree, "run": str(folder)})
    mesh = start(1)
    model = task.model.build(VOCAB)
    about = {
        "fingerprint": "", "tokenizer": "", "architecture": {"model": checkpoint.architecture(model)},
    }  # fmt: skip
    engine = Engine(model, task.optimizer.build, task.optimizer.groups(model), task.parallel, task.clip, mesh)
    engine.backward(engine(torch.arange(32)[None]).float().logsumexp(-1).sum(), last=True)
    engine.step(1e-4)
    tensors = {name: tensor.clone() for name, tensor in engine.logical()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    mine = attempt.claim(folder, mesh)

    def ours(background: bool) -> Write:
        # One for all rounds, as a run has.
        saver = Saver(
            folder / "checkpoints", {"model": engine}, about, mesh, mine,
            interval=1, keep=1, keep_every=0, background=background, step=None,
        )  # fmt: skip

        def write(_: Path, step: int) -> Took:
            begun = time.perf_counter()
            saver.save({"step": step})
            stall = time.perf_counter() - begun
            while (
                saver.step != step
            ):  # as the loop does after every step; what is waited for then counts as well
                time.sleep(0.01)
                polled = time.perf_counter()
                if saver.ready():
                    saver.finish()
                stall += time.perf_counter() - polled
            return Took(stall, time.perf_counter() - begun)

        return write

    def deepspeed(place: Path, step: int) -> Took:
        begun = time.perf_counter()
        engine._engine.save_checkpoint(str(place), tag=str(step))
        for path in place.rglob("*"):
            if path.is_file():
                fsync(path)
        took = time.perf_counter() - begun
        return Took(took, took)

    def torch_save(place: Path, _: int) -> Took:
        begun = time.perf_counter()
        torch_checkpoint.save(tensors, checkpoint_id=place)  # its files are fsynced unless told not to
        took = time.perf_counter() - begun
        return Took(took, took)

    def torch_async(place: Path, _: int) -> Took:
        begun = time.perf_counter()
        future: Any = torch_checkpoint.async_save(tensors, checkpoint_id=place)
        stall = time.perf_counter() - begun
        future.result()
        return Took(stall, time.perf_counter() - begun)

    return {
        "megachat, in the background": ours(True),
        "megachat, in the foreground": ours(False),
        "DeepSpeed, save_checkpoint": deepspeed,
        "torch.distributed.checkpoint, async_save": torch_async,
        "torch.distributed.checkpoint, save": torch_save,
    }, size


# The recovery.

MARKS = {
    "started": "python, imports, settings",
    "verify": "process group, model, engine",
    "verified": "verifying",
    "restored": "loading",
    "stepped": "data, first step",
}
"""What ends at each mark, and what has taken the time until there."""


def recovery(folder: Path, model: str, layers: int, ranks: int) -> None:
    """Kills a run, starts it again, and prints what the time went to."""
    run = prepared(folder / "runs" / "killed")
    settings = [
        f"run={run}", f"model={model}", f"model.layers={layers}", "context=64", "batch=1", "micro_batch=1",
        "tokens=1000000", "parallel.precision=fp32", "checkpoint_interval=1", "log.interval=1",
        "validation_interval=0", "log.wandb=disabled",
    ]  # fmt: skip
    with running(run, settings, ranks, folder / "first.json") as processes:
        wait_for((run / "pretrain" / "checkpoints" / "latest.json").exists, processes, run.parent)
        for process in processes:
            process.send_signal(signal.SIGKILL)
        killed = time.time()
    marks = folder / "again.json"
    with running(run, settings, ranks, marks) as processes:
        wait_for(marks.exists, processes, run.parent)
    told = json.loads(marks.read_text())
    checkpoints = run / "pretrain" / "checkpoints"
    newest = checkpoints / json.loads((checkpoints / "latest.json").read_text())["checkpoint"]
    size = sum(path.stat().st_size for path in newest.glob("*.safetensors"))
    print(f"\nSIGKILL of all ranks ({ranks}), with a checkpoint of {size / 1e9:.2f} GB")
    for row in recovered(told, killed):
        print(row)


def recovered(marks: Mapping[str, float], killed: float) -> list[str]:
    """A row for each part, and the sums up to the checkpoint and to the first new step."""
    rows, before = [], killed
    for mark, what in MARKS.items():
        rows.append(f"{what:<40}{marks[mark] - before:>9.2f} s")
        before = marks[mark]
    return [
        *rows,
        f"{'from the kill to the checkpoint back':<40}{marks['restored'] - killed:>9.2f} s",
        f"{'from the kill to the first new step':<40}{marks['stepped'] - killed:>9.2f} s",
    ]


def prepared(run: Path) -> Path:
    """A run with a tokenizer and shards of made-up numbers in words."""
    words = "zero one two three four five six seven eight nine ten eleven twelve".split()
    draw = random.Random(0)
    run.parent.mkdir(parents=True)
    source = run.parent / "numbers.jsonl"
    documents = [" ".join(draw.choices(words, k=60)) + "." for _ in range(400)]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    corpus = ["corpus=[json_lines]", f"corpus.json_lines.paths=[{source}]", "filters=none", "dedup=exact"]
    for command in (["clean", *corpus], ["tokenizer", "vocab=300"], ["encode", "executor.processes=1"]):
        done = subprocess.run(
            [sys.executable, "-m", "megachat", *command, f"run={run}", "log.wandb=disabled"],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"megachat {command[0]} failed:\n{done.stderr[-4000:]}")
    return run


@contextmanager
def running(
    run: Path, settings: Sequence[str], ranks: int, marks: Path
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """`megachat pretrain` as a launcher starts it, one process a rank; at the end they are killed."""
    from megachat.parallel.mesh import free_port

    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tools.bench.runners.restart", str(marks), "pretrain", *settings],
            cwd=ROOT,
            env=os.environ | common | threads | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=(run.parent / f"rank{rank}.log").open("wb"),
        )
        for rank in range(ranks)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def wait_for(condition: Callable[[], bool], processes: Sequence[subprocess.Popen[bytes]], logs: Path) -> None:
    """Raises when a rank ends first, with what it said."""
    while not condition():
        for rank, process in enumerate(processes):
            if process.poll() is not None:
                said = (logs / f"rank{rank}.log").read_text(errors="replace")
                raise RuntimeError(f"rank {rank} has ended:\n{said[-4000:]}")
        time.sleep(0.05)


if __name__ == "__main__":
    main()
