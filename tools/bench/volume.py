"""Does a step send what the formula says? python tools/bench/volume.py

A small model takes three steps in each layout, on processes that talk by gloo. Every collective passes
torch's dispatcher as an operator of its own, wherever DeepSpeed calls it from; those of the third step are
counted there and stand beside `megachat.parallel.volume`. Both count the whole tensors, before they are cut
and after they are gathered: what a ring sends for them follows. ZeRO 3 is counted twice, for it keeps a model
below 1e9 parameters gathered between forward and backward: so, and with that limit lowered to a third of the
model.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # of a script, only its own folder is there

from megachat.model.gpt import GPTConfig
from megachat.parallel.volume import LIVE, Layout, held, volume
from tools.bench.elastic import gang

VOCAB = 512
TINY = GPTConfig(
    dim=512, layers=3, heads=4, kv_heads=2, head_dim=128, hidden=1024, context=32, rope_base=1e4,
    moe=None, qk_norm=True, tied=False, norm_eps=1e-6, dropout=0.0,
)  # fmt: skip
"""Its matrices are large enough for ZeRO 3 to cut them."""
COUNTED = "counted.json"
LIMIT = 0.01
"""The largest share by which a count may differ: gradients of norms that are whole on every tensor rank."""
KILOBYTE = 1000
"""Counts of tokens, norms of gradients, whether they are finite: what no formula counts."""

KINDS = {
    "allreduce_": "all_reduce",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "alltoall_base_": "all_to_all",
}
"""torch's operators of `torch.ops.c10d`, by what they do. Others are shown by their own names."""

Bytes = dict[str, int]
"""Of the whole tensors, by the kind of collective."""


class Cell(NamedTuple):
    """A layout, and how many parameters ZeRO 3 may keep gathered."""

    layout: Layout
    live: int

    def __str__(self) -> str:
        layout = self.layout
        marks = [
            f"ZeRO {layout.zero}", f"DP {layout.data}", f"TP {layout.tensor}",
            *[f"SP {layout.sequence}"] * (layout.sequence > 1),
            "bf16" if layout.bf16 else "fp32", f"{layout.micro_batches} micro-batches",
            *["checkpointing"] * layout.checkpointing, *["few kept"] * (self.live < LIVE),
        ]  # fmt: skip
        return ", ".join(marks)


def main() -> int:
    """Prints the table; 1 if a count differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=int, nargs="+", default=[2, 4], help="data ranks, at tensor 1")
    given = parser.parse_args()
    wrong = 0
    print(f"{'':<86}{'formula, kB':>12}{'counted, kB':>12}{'ratio':>10}")
    for data, tensor, sequence in [*((data, 1, 1) for data in given.data), (1, 2, 1), (2, 2, 1), (1, 1, 2)]:
        chosen = cells(data, tensor, sequence)
        with tempfile.TemporaryDirectory() as folder:
            gang(data * sequence, tensor, measure, Path(folder), chosen)
            file = Path(folder) / COUNTED
            counted = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        wrong += len(chosen) - len(counted)
        for cell, found in zip(chosen, counted, strict=False):
            for line, fine in lines(cell, found):
                print(line)
                wrong += not fine
    print("all as the formula says" if not wrong else f"{wrong} counts differ by more than {LIMIT:.0%}")
    return int(bool(wrong))


def cells(data: int, tensor: int, sequence: int) -> list[Cell]:
    """What is counted on so many ranks: each stage, with two micro-batches to tell what is sent for each."""

    def layout(zero: int, bf16: bool = True, checkpointing: bool = False) -> Layout:
        return Layout(zero, data, tensor, 2, 2, 32, bf16, checkpointing, sequence)

    found = [Cell(layout(zero), LIVE) for zero in ((0, 1) if data == 1 else (0, 1, 2, 3))]
    found.append(Cell(layout(1, bf16=False), LIVE))
    if tensor * sequence > 1:
        found.append(Cell(layout(1, checkpointing=True), LIVE))
    if data > 1:
        found.append(Cell(layout(3), held(TINY, VOCAB, tensor) // 3))
    return found


def lines(cell: Cell, counted: Bytes) -> Iterator[tuple[str, bool]]:
    """For each kind of collective: a line, and whether the count is the formula's."""
    predicted: Counter[str] = Counter()
    for sent in volume(TINY, VOCAB, cell.layout, cell.live):
        predicted[sent.kind] += sent.payload
    for kind in sorted({*predicted, *counted}):
        expected, found = predicted[kind], counted.get(kind, 0)
        # A parameter is kept whole or not at all, so with a limit on them a few more are gathered again.
        limit = LIMIT if cell.live == LIVE else 12 * LIMIT
        fine = abs(found - expected) <= limit * expected + KILOBYTE
        if expected or not fine:
            share = f"{found / expected:>10.4f}" if expected else f"{'-':>10}"
            numbers = f"{expected / 1e3:>12,.0f}{found / 1e3:>12,.0f}{share}"
            yield f"{cell!s:<70}{kind:<16}{numbers}{'' if fine else '  !'}", fine


def measure(folder: Path, chosen: list[Cell]) -> None:
    """What a rank does; the first writes what it has counted."""
    counted = [count(cell) for cell in chosen]
    if os.environ["RANK"] == "0":
        (folder / COUNTED).write_text(json.dumps(counted), encoding="utf-8")


def count(cell: Cell) -> Bytes:
    """Bytes of this rank's collectives in the third step."""
    from megachat.config import compose, decode
    from megachat.parallel.engine import Engine
    from megachat.parallel.mesh import start
    from megachat.train.optimizers import AdamW

    layout = cell.layout
    mesh = start(layout.tensor, sequence=layout.sequence)
    torch.manual_seed(0)
    model = TINY.build(VOCAB)
    optimizer = AdamW(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    settings = {
        "zero": layout.zero, "tensor": layout.tensor, "sequence": layout.sequence,
        "precision": "bf16" if layout.bf16 else "fp32",
        "checkpointing": "full" if layout.checkpointing else "none",
    }  # fmt: skip
    spread = decode(
        compose("pretrain", [f"parallel.{name}={value}" for name, value in settings.items()])
    ).parallel
    with keeping(cell.live):
        engine = Engine(model, optimizer.build, optimizer.groups(model), spread, 1.0, mesh)
    for _ in range(3):
        with Counting() as counting:
            for micro in range(layout.micro_batches):
                tokens = torch.randint(VOCAB, (layout.micro_batch, layout.seq))
                loss = engine(tokens, labels=tokens) / layout.tokens
                engine.backward(loss, last=micro == layout.micro_batches - 1)
            engine.step(1e-3)
    return dict(counting.bytes)


class Counting(TorchDispatchMode):
    """Counts the bytes of collectives while it is entered, those of groups of one rank left out."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called for every operator."""
        if func.namespace == "c10d" and any(_ranks(arg) > 1 for arg in args):
            name = func.overloadpacket.__name__
            self.bytes[KINDS.get(name, name)] += max(_bytes(arg) for arg in args[:2])
        return func(*args, **(kwargs or {}))


def _ranks(argument: Any) -> int:
    """How many a process group has; 0 of what is none."""
    if not isinstance(argument, torch.ScriptObject):
        return 0
    try:
        return dist.ProcessGroup.unbox(argument).size()
    except RuntimeError:  # the kind of reduction comes as such an object, too
        return 0


def _bytes(argument: Any) -> int:
    """Of all tensors in an argument: a gather's outputs, or its inputs."""
    return sum(leaf.nbytes for leaf in tree_leaves(argument) if isinstance(leaf, torch.Tensor))


@contextlib.contextmanager
def keeping(live: int) -> Iterator[None]:
    """Engines that are built keep at most so many gathered parameters."""
    from megachat.parallel import engine

    initialize = engine.deepspeed.initialize
    limits = {"stage3_max_live_parameters": live, "stage3_max_reuse_distance": live}
    small = {"stage3_prefetch_bucket_size": live // 10}  # or what is fetched early is more than that

    def limited(config: dict[str, Any], **arguments: Any) -> Any:
        config["zero_optimization"] |= limits | small if live < LIVE else {}
        return initialize(config=config, **arguments)

    engine.deepspeed.initialize = limited
    try:
        yield
    finally:
        engine.deepspeed.initialize = initialize


if __name__ == "__main__":
    sys.exit(main())
