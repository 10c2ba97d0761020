"""What a checkpoint costs the training: python tools/bench/saving.py [--model gpt_125m] [--zero 1]

One rank, weights and both moments of AdamW in fp32. Training waits for the whole of a checkpoint written in
the foreground, and for the copy in memory of one written in the background; the last column is that wait as a
share of ten minutes between two checkpoints. Reading is what a restart does: every sum compared with the
manifest's, then every tensor into the engine. The files are in --folder; each line is the median of --repeat.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # of a script, only its own folder is there

from megachat.config import compose
from megachat.parallel.attempt import claim
from megachat.parallel.checkpoint import architecture, newest
from megachat.parallel.engine import Engine
from megachat.parallel.mesh import start
from megachat.parallel.saving import Saver
from megachat.run import Stage
from megachat.train.pretrain import Pretrain

INTERVAL = 600.0
"""Seconds between two checkpoints."""


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="gpt_125m")
    parser.add_argument("--vocab", type=int, default=65_536)
    parser.add_argument("--zero", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure; a temporary one")
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    settings = [f"model={given.model}", f"parallel.zero={given.zero}", "parallel.precision=fp32"]
    task = Stage.of(compose("pretrain", settings))
    assert isinstance(task, Pretrain)
    mesh = start(1)
    model = task.model.build(given.vocab)
    groups = task.optimizer.groups(model)
    about = {"architecture": {"model": architecture(model)}, "tokenizer": "", "fingerprint": ""}
    engine = Engine(model.to(mesh.device), task.optimizer.build, groups, task.parallel, task.clip, mesh)
    stage = Path(tempfile.mkdtemp(dir=given.folder))
    try:
        savers = {
            way: Saver(
                stage / way / "checkpoints", {"model": engine}, about, mesh, claim(stage / way, mesh),
                interval=0, keep=1, keep_every=0, background=way == "background", step=None,
            )
            for way in ("foreground", "background")
        }  # fmt: skip
        size = 4 * sum(shape.numel() for shape in engine.tensors().values())
        threads = torch.get_num_threads()
        print(f"{given.model}, {size:,} bytes, ZeRO {given.zero}, {mesh.device}, {threads} threads")
        print(f"{'':<24}{'waits, s':>10}{'takes, s':>10}{'bytes/s':>18}{'of 10 min':>12}")
        for way, saver in savers.items():
            found = [_saved(saver, step) for step in range(1, given.repeat + 1)]
            waits, takes = (median(pair[index] for pair in found) for index in (0, 1))
            _line(way, waits, takes, size)

        def verified() -> None:
            assert newest(stage / "foreground" / "checkpoints", mesh) is not None

        saved = newest(stage / "foreground" / "checkpoints", mesh)
        assert saved is not None
        for name, action in (
            ("comparing sums", verified),
            ("loading", lambda: engine.load_logical(saved.reader("model"), 1)),
        ):
            seconds = median(_seconds(action) for _ in range(given.repeat))
            _line(name, None, seconds, size)
    finally:
        shutil.rmtree(stage)


def _saved(saver: Saver, step: int) -> tuple[float, float]:
    saver.save({"step": step})
    saver.finish()
    if saver.step != step:
        raise SystemExit("the checkpoint could not be written")
    figures = saver.take_figures()
    return figures["checkpoint/stall"], figures["checkpoint/seconds"]


def _seconds(action: Callable[[], None]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def _line(name: str, waits: float | None, takes: float, size: int) -> None:
    stall = "" if waits is None else f"{waits:.2f}"
    share = "" if waits is None else f"{waits / INTERVAL:.2%}"
    print(f"{name:<24}{stall:>10}{takes:>10.2f}{size / takes:>18,.0f}{share:>12}")


if __name__ == "__main__":
    main()
