"""Pretraining measured: megachat, the same model in a bare loop, and what others train with.

    python tools/bench/pretrain.py                           # 14 M parameters on this machine's CPU
    python tools/bench/pretrain.py --gpu                     # 125 M, 1 B and 3 B on a GPU, bf16 and fp8
    python tools/bench/pretrain.py --only bare megachat --steps 30

README.md beside this file says what is counted and what is not.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # of a script, only its own folder is there

from megachat.config import compose
from megachat.data.harvest import library_documents
from megachat.data.loader import Order, TokenWindows
from megachat.data.shards import Shard, Shards, ShardWriter
from megachat.files import sha256, write_json
from megachat.model.gpt import GPTConfig
from megachat.model.size import flops_per_token, parameters
from megachat.parallel.mesh import free_port
from megachat.tokenizer.tokenizer import FILE, Tokenizer
from megachat.tokenizer.train import train
from tools.bench import clock
from tools.bench.dedup import processor
from tools.bench.job import Job

INTERVAL = 3
"""Steps between two marks."""
SKIPPED = 2 * INTERVAL
"""Steps before the clock starts: what is made or compiled when first used."""
TEXT = 4_000_000
"""Bytes of text, of Python's library: the tokenizer is learnt from them, and they are trained on."""
LEARNT = 8_192
"""Tokens that are learnt; a larger vocabulary has tokens that no text contains."""
SEED = 0
LR, BETAS, EPS, DECAY, CLIP = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0


@dataclass(frozen=True, slots=True)
class Shape:
    """A model and how it is trained."""

    name: str
    model: dict[str, Any]
    vocab: int
    context: int
    micro_batch: int
    batch: int
    checkpointing: bool = False


LLAMA = {"moe": None, "rope_base": 10_000.0, "qk_norm": False, "tied": True, "norm_eps": 1e-6, "dropout": 0.0}
"""What Llama has: all programs can compute it."""
CPU = Shape(
    "14M",
    LLAMA | {
        "dim": 384, "layers": 6, "heads": 6, "kv_heads": 6, "head_dim": 64, "hidden": 1024, "context": 256,
    },
    vocab=8_192, context=256, micro_batch=16, batch=32,
)  # fmt: skip


def gpu_shapes() -> list[Shape]:
    """Of `conf/model/`, as Llama computes them."""
    return [
        Shape(
            name, {**_configured(model), **LLAMA}, 65_536, 2048, micro_batch, 4 * micro_batch, checkpointing
        )
        for name, model, micro_batch, checkpointing in (
            ("125M", "gpt_125m", 32, False),
            ("1B", "gpt_1b", 8, False),
            ("3B", "gpt_3b", 4, True),
        )
    ]


def _configured(model: str) -> dict[str, Any]:
    tree = compose("pretrain", [f"model={model}"])["model"]
    return {name: value for name, value in tree.items() if not name.startswith("_")}


@dataclass(frozen=True)
class Prepared:
    """What all read, in a folder."""

    folder: Path
    """A run with a tokenizer and token shards; `rows.npy` has the same in the order of training."""
    job: Job


@dataclass(frozen=True)
class Took:
    """What one run of a program came to."""

    speed: float
    """Tokens a second, by the clock of this process."""
    memory: int
    """The most bytes that its ranks held up to the last mark, together; on a GPU, of its memory."""
    first: float
    """The loss at the first mark."""
    loss: float
    """The loss at the last one."""
    own: float | None
    """Tokens a second by its own account, where it gives one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A line of the table: a runner with a loop of its own."""

    key: str
    name: str
    runner: str
    arguments: tuple[str, ...] = ()
    environment: str = ""
    """The folder in `.venv-bench` whose Python runs it; empty for the Python that runs this."""
    variables: Mapping[str, str] = field(default_factory=dict)

    def missing(self) -> str:
        """How to install it; "" if it is there."""
        return clock.missing(self.environment)

    def command(self, prepared: Prepared, folder: Path) -> tuple[list[str], list[dict[str, str]], Path]:
        """What to start, the environment of each rank, and where its marks will be."""
        job = replace(prepared.job, marks=str(folder / "marks.jsonl"))
        job.write(folder / "job.json")
        python = clock.VENVS / self.environment / "bin" / "python" if self.environment else sys.executable
        module = f"tools.bench.runners.{self.runner}"
        command = [str(python), "-m", module, str(folder / "job.json"), *self.arguments]
        return command, [dict(self.variables)], Path(job.marks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Megachat:
    """A line of the table: `megachat pretrain` as a user starts it, on token shards."""

    key: str
    name: str
    ranks: int = 1
    settings: tuple[str, ...] = ()

    def missing(self) -> str:
        """It is there."""
        return ""

    def command(self, prepared: Prepared, folder: Path) -> tuple[list[str], list[dict[str, str]], Path]:
        """What to start, the environment of each rank, and where its marks will be."""
        job, run = prepared.job, folder / "run"
        settings = {
            "run": run, "inputs": prepared.folder, "context": job.context, "batch": job.batch,
            "micro_batch": job.micro_batch, "tokens": 10**15, "max_steps": job.steps, "seed": SEED,
            "optimizer.lr": job.lr, "optimizer.betas": json.dumps(job.betas), "optimizer.eps": job.eps,
            "optimizer.weight_decay": job.weight_decay, "clip": job.clip, "schedule": "constant",
            "schedule.warmup": 0, "validation_interval": 0, "validation_windows": 1, "checkpoint_interval": 0,
            "parallel.checkpointing": "full" if job.checkpointing else "none", "log.interval": job.interval,
            "log.wandb": "disabled", "prompt": "import",
        } | {f"model.{name}": _yaml(value) for name, value in job.model.items()}  # fmt: skip
        overrides = [*(f"{name}={value}" for name, value in settings.items()), *self.settings]
        common = {"WORLD_SIZE": str(self.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        common |= {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // self.ranks))}
        ranks = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(self.ranks)]
        alone: list[dict[str, str]] = [{}]
        command = [sys.executable, "-m", "megachat", "pretrain", *overrides]
        return command, ranks if self.ranks > 1 else alone, run / "pretrain" / "metrics.jsonl"


def _yaml(value: object) -> object:
    return json.dumps(value) if value is None or isinstance(value, bool) else value


Line = Program | Megachat

EAGER = {"TORCH_COMPILE_DISABLE": "1"}
LINES: tuple[Line, ...] = (
    Program(key="bare", name="bare loop, bf16 weights", runner="bare", arguments=("bf16",)),
    Program(key="autocast", name="bare loop, autocast", runner="bare", arguments=("autocast",)),
    Megachat(key="megachat", name="megachat"),
    Megachat(key="zero1x2", name="megachat, ZeRO 1 on 2", ranks=2, settings=("parallel=zero1",)),
    Program(key="trainer", name="transformers Trainer", runner="transformers", environment="transformers"),
    Program(key="litgpt", name="LitGPT", runner="litgpt", environment="litgpt"),
    Program(
        key="litgpt-eager",
        name="LitGPT, not compiled",
        runner="litgpt",
        environment="litgpt",
        variables=EAGER,
    ),
)
GPU_LINES: tuple[Line, ...] = (
    *(line for line in LINES if line.key not in ("zero1x2", "litgpt-eager")),
    Program(
        key="trainer-compiled",
        name="transformers Trainer, compiled",
        runner="transformers",
        arguments=("compile",),
        environment="transformers",
    ),
)


def main() -> int:
    """Prints the tables. Returns 3 if what was asked for by name is not installed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="125 M, 1 B and 3 B, on the first GPU")
    parser.add_argument("--shapes", nargs="+", default=[], metavar="SHAPE", help="with --gpu: only these")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", choices=_keys(), help=", ".join(_keys())
    )
    parser.add_argument("--steps", type=int, default=12, help=f"counted ones, after {SKIPPED} (default: 12)")
    parser.add_argument("--repeat", type=int, default=3, help="rounds; the median counts (default: 3)")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="SETTING", help="of megachat, for all its lines"
    )
    given = parser.parse_args()
    lines = [line for line in (GPU_LINES if given.gpu else LINES) if not given.only or line.key in given.only]
    lines = [_with(line, given.set) for line in lines]
    absent = {line.key: remedy for line in lines if (remedy := line.missing())}
    if asked := [key for key in given.only if key in absent]:
        for key in asked:
            print(f"{key:<32}not installed: {absent[key]}")
        return 3
    if given.gpu and not torch.cuda.is_available():
        print("pretrain.py: --gpu, and torch sees no GPU", file=sys.stderr)
        return 1
    shapes = [shape for shape in gpu_shapes() if shape.name in (given.shapes or [shape.name])]
    steps = -(-given.steps // INTERVAL) * INTERVAL
    try:
        for shape in shapes if given.gpu else [CPU]:
            with tempfile.TemporaryDirectory(prefix="bench-pretrain.") as folder:
                prepared = prepare(Path(folder), shape, SKIPPED + steps + 1, "cuda" if given.gpu else "cpu")
                print("\n".join(table(shape, lines, absent, prepared, given.repeat)), flush=True)
    except (ValueError, RuntimeError) as why:
        print(f"pretrain.py: {why}", file=sys.stderr)
        return 1
    return 0


def _keys() -> list[str]:
    return [*dict.fromkeys(line.key for line in (*LINES, *GPU_LINES))]


def _with(line: Line, settings: Sequence[str]) -> Line:
    return replace(line, settings=(*line.settings, *settings)) if isinstance(line, Megachat) else line


def prepare(folder: Path, shape: Shape, steps: int, device: str, most: int = TEXT) -> Prepared:
    """Writes a run's tokenizer and token shards, and the rows of `steps` in the order megachat reads them."""
    texts, size = [], 0
    for document in library_documents():
        texts.append(document.text)
        size += len(document.text.encode())
        if size >= most:
            break
    tokenizer = stretched(train(texts, min(shape.vocab, LEARNT), 0.9995, 1), shape.vocab)
    ids = np.array([token for text in texts for token in tokenizer.encode(text)])
    rows = steps * shape.batch
    documents = np.resize(ids, (rows + 2, shape.context))  # repeated if there are not so many
    write_run(folder, tokenizer, documents)
    source = TokenWindows(Shards([Shard(folder / "encode" / "train" / "text")]), shape.context)
    order = Order(source, SEED)
    np.save(folder / "rows.npy", np.stack([order[number].tokens[:-1] for number in range(rows)]))
    job = Job(
        rows=str(folder / "rows.npy"), marks="", model=shape.model, vocab=shape.vocab, context=shape.context,
        batch=shape.batch, micro_batch=shape.micro_batch, steps=steps, interval=INTERVAL, device=device,
        lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, clip=CLIP, checkpointing=shape.checkpointing,
    )  # fmt: skip
    return Prepared(folder, job)


def stretched(tokenizer: Tokenizer, vocab: int) -> Tokenizer:
    """The same one with so many tokens: what is added is in no text."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model)
    for number in range(len(model.pieces), vocab):
        model.pieces.add(piece=f"<none{number}>", score=0.0, type=model.SentencePiece.UNUSED)
    return Tokenizer(model.SerializeToString())


def write_run(folder: Path, tokenizer: Tokenizer, documents: np.ndarray[Any, Any]) -> None:
    """What `tokenizer` and `encode` leave: these documents to train on, and the first to validate."""
    (folder / "tokenizer").mkdir()
    tokenizer.save(folder / "tokenizer" / FILE)
    entries = {}
    for split, some in {"train": documents, "validation": documents[:2]}.items():
        prefix = folder / "encode" / split / "text"
        with ShardWriter(prefix, tokenizer.vocab) as writer:
            writer.add_many(some.reshape(-1), [some.shape[1]] * len(some))
        sums = {kind: sha256(Path(f"{prefix}.{kind}")) for kind in ("bin", "idx")}
        entries[f"{split}/text"] = {
            "split": split, "source": "text", "documents": len(some), "tokens": some.size, "sha256": sums,
        }  # fmt: skip
    about = {"tokenizer": tokenizer.sha256, "vocab": tokenizer.vocab, "shards": entries}
    write_json(folder / "encode" / "manifest.json", about)
    for stage in ("tokenizer", "encode"):
        write_json(folder / stage / "done.json", {"fingerprint": "made by pretrain.py"})


def table(
    shape: Shape, lines: Sequence[Line], absent: Mapping[str, str], prepared: Prepared, repeat: int
) -> Iterator[str]:
    """Measures in turns, one run of each and then the next, and gives the table."""
    job, config = prepared.job, GPTConfig(**shape.model)
    flops = float(flops_per_token(config, shape.vocab, shape.context))
    size = parameters(config, shape.vocab)
    yield f"{shape.name}: {size / 1e6:,.1f} M parameters, {flops / 1e6:,.1f} MFLOP a token"
    yield (
        f"rows of {shape.context} tokens, one document each; {shape.batch} a step, {shape.micro_batch} at "
        f"once; {repeat} x {job.steps - SKIPPED - 1} steps after {SKIPPED}"
    )
    peaks = [matrix_peak(job.device)]
    took: dict[str, list[Took]] = {line.key: [] for line in lines}
    for number in range(repeat):
        for line in lines:
            if line.key not in absent:
                print(f"{shape.name}: round {number + 1}: {line.name}", file=sys.stderr, flush=True)
                took[line.key].append(run(line, prepared, f"{line.key}-{number}"))
        peaks.append(matrix_peak(job.device))
    each = ", ".join(f"{peak / 1e12:.3g}" for peak in peaks)
    yield f"{_device(job.device)}, torch {torch.__version__}, Python {platform.python_version()}"
    yield f"matrix products in bf16, before, between and after: {each} TFLOP/s; MFU is of the highest"
    yield from rows(lines, absent, took, flops, max(peaks))


def rows(
    lines: Sequence[Line],
    absent: Mapping[str, str],
    took: Mapping[str, Sequence[Took]],
    flops: float,
    peak: float,
) -> Iterator[str]:
    """A line for each program: medians, and how far apart the slowest and the fastest round are."""
    yield f"{'':<32}{'tokens/s':>10}{'spread':>8}{'x megachat':>12}{'MFU':>7}{'GiB':>7}{'loss':>16}"
    base = _middle(took.get("megachat", ()), lambda one: one.speed)
    for line in lines:
        if line.key in absent:
            yield f"{line.name:<32}not installed: {absent[line.key]}"
            continue
        runs = took[line.key]
        speed = _middle(runs, lambda one: one.speed)
        memory = _middle(runs, lambda one: one.memory) / 2**30
        spread = (max(one.speed for one in runs) - min(one.speed for one in runs)) / speed
        ratio = f"{speed / base:>12.2f}" if base else f"{'-':>12}"
        losses = f"{_middle(runs, lambda one: one.first):.3f} -> {_middle(runs, lambda one: one.loss):.3f}"
        yield (
            f"{line.name:<32}{speed:>10,.0f}{spread:>8.1%}{ratio}{speed * flops / peak:>7.1%}{memory:>7.2f}"
            f"{losses:>16}"
        )
    for line in lines:
        if own := [one.own for one in took.get(line.key, ()) if one.own is not None]:
            yield f"{line.name}, by its own account: {median(own):,.0f} tokens/s"


def _middle(runs: Sequence[Took], of: Callable[[Took], float]) -> float:
    return median(map(of, runs)) if runs else 0.0


def _device(device: str) -> str:
    return torch.cuda.get_device_name(0) if device == "cuda" else processor()


def matrix_peak(device: str) -> float:
    """FLOP/s of the best square matrix product in bf16: 2 * size^3 over its seconds."""
    best = 0.0
    for size in (4096, 8192, 16_384) if device == "cuda" else (1024, 2048):
        a, b = torch.ones(2, size, size, dtype=torch.bfloat16, device=device)
        for _ in range(20):
            _wait(device)
            begun = time.perf_counter()
            a @ b
            _wait(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - begun))
    return best


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def run(line: Line, prepared: Prepared, name: str) -> Took:
    """Starts a program, notes when its marks come, and waits for its end."""
    folder = prepared.folder / name
    folder.mkdir()
    command, ranks, marks = line.command(prepared, folder)
    last = prepared.job.steps - 1
    with running(command, ranks, folder) as processes:
        seen = follow(marks, last, processes, folder)
        memory = sum(map(peak_of, processes))
        for rank, process in enumerate(processes):
            if process.wait(timeout=600):
                raise RuntimeError(f"{line.name} failed at its end:\n{said(folder, rank)}")
    if prepared.job.device == "cuda":
        memory = int(seen[last][1]["memory_gib"] * 2**30)
    own = [
        row["tokens_per_second"]
        for step, (_, row) in seen.items()
        if step > SKIPPED and "tokens_per_second" in row
    ]
    return Took(
        speed(seen, SKIPPED, last), memory, seen[SKIPPED][1]["loss"], seen[last][1]["loss"],
        median(own) if own else None,
    )  # fmt: skip


Seen = dict[int, tuple[float, dict[str, Any]]]
"""When the mark of a step was seen, and what it says."""


def speed(seen: Seen, first: int, last: int) -> float:
    """Tokens a second between two marks."""
    (begun, before), (ended, after) = seen[first], seen[last]
    return float((after["tokens"] - before["tokens"]) / (ended - begun))


@contextmanager
def running(
    command: Sequence[str], ranks: Sequence[Mapping[str, str]], folder: Path
) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """One process a rank; what is left of them at the end is killed."""
    apart = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    own = {name: value for name, value in os.environ.items() if name not in apart}
    own |= {"PYTHONPATH": str(clock.ROOT), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with ExitStack() as stack:
        processes = []
        for rank, variables in enumerate(ranks):
            log = stack.enter_context((folder / f"rank{rank}.log").open("wb"))
            process = subprocess.Popen(
                command, cwd=folder, env=own | dict(variables), stdout=log, stderr=subprocess.STDOUT
            )
            stack.callback(_end, process)
            processes.append(process)
        yield processes


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()


def follow(marks: Path, last: int, processes: Sequence["subprocess.Popen[bytes]"], folder: Path) -> Seen:
    """Reads the marks as they come, up to that of step `last`."""
    seen: Seen = {}
    read = 0
    while last not in seen:
        ended = [rank for rank, process in enumerate(processes) if process.poll() is not None]
        lines = marks.read_bytes()[read:].splitlines(keepends=True) if marks.is_file() else []
        now = time.perf_counter()
        for line in lines:
            if line.endswith(b"\n"):
                row = json.loads(line)
                seen[row["step"]] = (now, row)
                read += len(line)
        if ended and last not in seen:
            raise RuntimeError(f"a program ended before its step {last}:\n{said(folder, ended[0])}")
        time.sleep(0.01)
    return seen


def said(folder: Path, rank: int) -> str:
    """The end of what a rank printed."""
    return (folder / f"rank{rank}.log").read_text(encoding="utf-8", errors="replace")[-4000:]


def peak_of(process: "subprocess.Popen[bytes]") -> int:
    """The most bytes that a process has held so far; 0 if it has just ended."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    return 1024 * int(status.split("VmHWM:")[1].split()[0]) if "VmHWM:" in status else 0


if __name__ == "__main__":
    sys.exit(main())
