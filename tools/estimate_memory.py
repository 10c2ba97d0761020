"""The memory of one rank, by part: python tools/estimate_memory.py model=gpt_1b parallel=zero2 --ranks 8

Settings are those of `megachat pretrain`, the formula is megachat/train/memory.py, and `device=H100` asks for
GPUs that are not here. With --measure the ranks take two real steps on this machine, on random tokens, and
the highest peak is compared: on GPUs the most that torch had allocated; on a CPU the peak of resident memory
less what was resident after the imports. --table measures six layouts, in minutes; 7 GiB must be free.

On a CPU glibc is told to give back what is freed, as MALLOC_MMAP_THRESHOLD_=1048576 does for a run, too. Left
to itself it keeps blocks of up to 32 MiB, and holes between them: 3.50 GiB where 2.89 were needed.
"""

import argparse
import multiprocessing
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from megachat.config import ConfigError, compose, decode
from megachat.data.loader import Window
from megachat.parallel.engine import has_bf16
from megachat.parallel.mesh import environment_of, free_port, start
from megachat.train.doctor import Doctor, breakdown
from megachat.train.feed import Lane
from megachat.train.forecast import Job, check_memory, check_tensor
from megachat.train.loop import Progress, Running, attempt_step, engines
from megachat.train.memory import host_bytes
from megachat.train.pretrain import Tokens, collate

STEPS = 2
"""The optimizer's moments are there from the end of the first on."""
PRELOAD = ["__main__", "torch._inductor.compile_fx", "deepspeed.moe.layer", "deepspeed.module_inject"]
"""What a rank imports sooner or later: ranks on CPUs fork from a process that has it."""
TABLE = {
    "ZeRO 0, fp32": "1 parallel=zero0 parallel.precision=fp32 context=128 batch=2",
    "ZeRO 0, bf16, rows of 2,048": "1 parallel=zero0 parallel.precision=bf16 context=2048 batch=1",
    "ZeRO 1, bf16": "2 parallel=zero1 parallel.precision=bf16 context=64 batch=4",
    "ZeRO 1, TP 2, bf16, rows of 2,048": "2 parallel=zero1_tp2 parallel.precision=bf16 context=2048 batch=1",
    "ZeRO 2, bf16, Muon, head apart": "2 parallel=zero2 parallel.precision=bf16 optimizer=muon "
    "model.tied=false context=64 batch=4",
    "ZeRO 3, bf16, checkpointing, head apart": "2 parallel=zero3 parallel.precision=bf16 "
    "parallel.checkpointing=full model.tied=false context=256 batch=4",
}
"""Layouts of `gpt_125m` whose peak is 2 GiB and more a rank: the ranks, and settings."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of pretrain")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--vocab", type=int, default=65_536)
    parser.add_argument("--measure", action="store_true", help="take real steps and compare")
    parser.add_argument("--table", action="store_true", help="measure six layouts")
    given = parser.parse_intermixed_args(arguments)
    if given.table:
        table()
        return
    try:
        task, job = planned(given.overrides, given.ranks, given.vocab, here=given.measure)
    except ConfigError as error:
        parser.error(str(error))
    if layout := check_tensor(job, task.gpus_per_node):
        print(layout)
        if layout.level == "problem":
            sys.exit(1)
    print("\n".join(breakdown(job)))
    if offloaded := host_bytes(job.run) if job.cuda else 0:
        print(f"  {'on the host':<12}{offloaded / 2**30:>10.2f} GiB")
    room, where = task.room(job) if task.device is not None and not given.measure else (None, "")
    if room is not None:
        print(check_memory(job, room, where))
    if given.measure:
        peak = measured(given.overrides, given.ranks, given.vocab)
        print(f"  {'measured':<12}{peak / 2**30:>10.2f} GiB, predicted {job.memory.peak / peak - 1:+.1%}")


def planned(overrides: Sequence[str], ranks: int, vocab: int, here: bool) -> tuple[Doctor, Job]:
    """The run in figures; on this machine, or on GPUs if the settings name some."""
    task = decode(compose("doctor", list(overrides)))
    elsewhere = task.device is not None and not here
    bf16 = elsewhere or has_bf16() if task.parallel.precision == "auto" else task.parallel.precision == "bf16"
    return task, task.job(vocab, ranks, bf16, elsewhere or torch.cuda.is_available())


def table() -> None:
    """Estimate and measurement of each layout, as a table in Markdown."""
    print("| gpt_125m | ranks | estimate | measured | |\n|---|---|---|---|---|")
    for name, line in TABLE.items():
        first, *overrides = line.split()
        ranks, settings = int(first), ["model=gpt_125m", "micro_batch=1", *overrides]
        _, job = planned(settings, ranks, 65_536, here=True)
        peak = measured(settings, ranks, 65_536)
        estimate = job.memory.peak
        print(
            f"| {name} | {ranks} | {estimate / 2**30:.2f} GiB, {job.memory.moment} | {peak / 2**30:.2f} GiB "
            f"| {estimate / peak - 1:+.1%} |",
            flush=True,
        )


def measured(overrides: Sequence[str], ranks: int, vocab: int) -> int:
    """The highest peak of the ranks, in a process each."""
    gpus, port = torch.cuda.is_available(), free_port()
    context = multiprocessing.get_context("spawn" if gpus else "forkserver")
    if not gpus:
        os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "1048576")  # read when the server of ranks starts
        context.set_forkserver_preload(PRELOAD)
    peaks = []
    with ExitStack() as stack:
        for rank in range(ranks):
            here, there = context.Pipe(duplex=False)
            stack.enter_context(closing(here))
            given = (there, rank, list(overrides), ranks, vocab, port)
            process = context.Process(target=one_rank, args=given, daemon=True)
            process.start()
            stack.callback(process.kill)
            there.close()
            peaks.append(here)
        try:
            return max(int(pipe.recv()) for pipe in peaks)
        except EOFError:
            raise SystemExit("a rank has failed: see above") from None


def one_rank(
    pipe: Connection, rank: int, overrides: Sequence[str], ranks: int, vocab: int, port: int
) -> None:
    """Sends the peak of this rank."""
    os.environ.update(environment_of(rank, ranks, port))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    pipe.send(steps(*planned(overrides, ranks, vocab, here=True)))


def steps(task: Doctor, job: Job) -> int:
    """Takes some steps as one rank, as the loop does; returns the bytes it needed at its peak."""
    for name in PRELOAD[1:]:
        import_module(name)
    mesh = start(task.parallel.tensor, sequence=task.parallel.sequence)
    before = resident("VmRSS")
    torch.manual_seed(0)
    blueprint = task.model.blueprint(job.vocab, mesh.device)
    run = Running(mesh, None, Progress())  # type: ignore[arg-type]
    run.engines = engines(task, {"model": blueprint}, mesh)
    draw = np.random.default_rng(mesh.data_rank)

    def batch() -> Tokens:
        rows = draw.integers(job.vocab, size=(job.run.micro_batch, job.seq + 1))
        return collate([Window(row, [0, job.seq + 1]) for row in rows])

    lane = Lane(mesh.device)
    for _ in range(STEPS):
        batches = lane.receive(*lane.send([batch() for _ in range(min(2, job.run.accumulated))]))
        attempt_step(task, run, [*batches], sum(one.weight for one in batches) * mesh.data, 1e-4)
    if mesh.device.type == "cuda":
        return torch.cuda.max_memory_allocated(mesh.device)
    return resident("VmHWM") - before


def resident(which: str) -> int:
    """Bytes of this process that are in memory, now (VmRSS) or at the most so far (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == which:
            return 1024 * int(value.split()[0])
    raise OSError(f"/proc/self/status has no {which}")


if __name__ == "__main__":
    main()
