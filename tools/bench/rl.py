"""Reinforcement learning measured: megachat and what others use, with the same tiny models on the CPU.

    python tools/bench/rl.py                                 # all parts
    python tools/bench/rl.py --part generation --repeat 5    # how fast answers to 64 prompts are written

README.md beside this file says what is counted and what is not.
"""

import argparse
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # of a script, only its own folder is there

from megachat.model.draws import seed_of
from megachat.model.gpt import GPTConfig
from tools.bench import clock
from tools.bench.ask import Ask
from tools.bench.dedup import processor

COMMON: dict[str, Any] = {
    "head_dim": 64, "context": 512, "moe": None, "rope_base": 10_000.0, "tied": True, "norm_eps": 1e-6,
    "dropout": 0.0,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shape:
    """A model."""

    name: str
    model: dict[str, Any]
    vocab: int


SHAPES = (
    Shape(
        "3.5 M parameters, Qwen3's",
        COMMON | {"dim": 320, "layers": 2, "heads": 4, "kv_heads": 2, "hidden": 896, "qk_norm": True},
        4_096,
    ),
    Shape(
        "13 M parameters, Llama's",
        COMMON | {"dim": 384, "layers": 6, "heads": 6, "kv_heads": 2, "hidden": 1024, "qk_norm": False},
        8_192,
    ),
)
"""The quickstart's model, and one with as many layers as time allows."""


@dataclass(frozen=True, slots=True)
class Work:
    """Prompts and how they are answered."""

    name: str
    prompts: int
    shortest: int
    longest: int
    """Tokens of a prompt; all lengths between are as likely."""
    new: int
    ends: float
    """How many tokens of the vocabulary, as a share, end an answer."""


WORKS = (
    Work("all answers of 128 tokens", 64, 16, 128, 128, 0.0),
    Work("answers that end, of up to 256 tokens", 64, 16, 128, 256, 1 / 64),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """Somebody who writes."""

    key: str
    name: str
    runner: str
    environment: str = ""


LINES = (
    Line(key="transformers", name="transformers generate", runner="write_transformers",
         environment="transformers"),
    Line(key="megachat", name="megachat", runner="write_megachat"),
)  # fmt: skip


def main() -> int:
    """Prints the tables. Returns 3 if what was asked for by name is not installed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", nargs="+", default=[*PARTS], choices=[*PARTS], help=", ".join(PARTS))
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", choices=[one.key for one in LINES])
    parser.add_argument("--repeat", type=int, default=3, help="rounds; the median counts (default: 3)")
    given = parser.parse_args()
    if absent := [
        (one.key, remedy)
        for one in LINES
        if one.key in given.only and (remedy := clock.missing(one.environment))
    ]:
        for key, remedy in absent:
            print(f"{key:<32}not installed: {remedy}")
        return 3
    print(f"{processor()}, {cores()} cores, torch {torch.__version__}, Python {platform.python_version()}")
    try:
        for part in given.part:
            for line in PARTS[part](given.only, given.repeat):
                print(line, flush=True)
    except RuntimeError as why:
        print(f"rl.py: {why}", file=sys.stderr)
        return 1
    return 0


def cores() -> int:
    """What every program may use."""
    return len(os.sched_getaffinity(0))


def generation(only: Sequence[str], repeat: int) -> Iterator[str]:
    """How fast answers are written, at each precision."""
    lines = [line for line in LINES if not only or line.key in only]
    with tempfile.TemporaryDirectory(prefix="bench-rl.") as folder:
        for shape in SHAPES:
            for work in WORKS:
                for precision in ("float32", "bfloat16"):
                    told = {}
                    ask = asked(Path(folder), shape, work, precision, repeat)
                    for line in lines:
                        if not clock.missing(line.environment):
                            print(f"{shape.name}, {work.name}: {line.name}", file=sys.stderr, flush=True)
                            told[line.key] = run(line, ask, Path(folder))
                    yield from table(lines, told, f"{shape.name}; {work.name}; {precision}")


def asked(
    folder: Path, shape: Shape, work: Work, precision: str, rounds: int, temperature: float = 1.0
) -> Ask:
    """Random weights, and prompts of random tokens."""
    weights = folder / f"{seed_of(shape.name)}.safetensors"
    torch.manual_seed(0)
    if not weights.exists():
        save_file(GPTConfig(**shape.model).build(shape.vocab).state_dict(), weights)
    lengths = torch.randint(work.shortest, work.longest + 1, (work.prompts,))
    return Ask(
        weights=str(weights), model=shape.model, vocab=shape.vocab, precision=precision,
        prompts=[torch.randint(shape.vocab, (length,)).tolist() for length in lengths.tolist()],
        new=work.new, temperature=temperature, stop=[*range(round(shape.vocab * work.ends))], rounds=rounds,
    )  # fmt: skip


def run(line: Line, ask: Ask, folder: Path) -> clock.Result:
    """Has the prompts answered in a process of its own, with all cores."""
    ask.write(folder / "ask.json")
    threads = {"OMP_NUM_THREADS": str(cores()), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return clock.run(line.runner, line.environment, folder / "ask.json", settings=threads)


def table(lines: Sequence[Line], told: Mapping[str, clock.Result], title: str) -> Iterator[str]:
    """A line for each: median tokens a second, and how far apart the slowest and the fastest round are."""
    yield ""
    yield title
    yield f"{'':<32}{'tokens/s':>10}{'spread':>8}{'x transformers':>16}{'GiB':>7}{'tokens':>9}"
    base = median(speeds(told["transformers"])) if "transformers" in told else None
    for line in lines:
        if line.key not in told:
            yield f"{line.name:<32}not installed: {clock.missing(line.environment)}"
            continue
        each = speeds(told[line.key])
        ratio = f"{median(each) / base:.2f}" if base else "-"
        yield (
            f"{line.name:<32}{median(each):>10,.0f}{(max(each) - min(each)) / median(each):>8.1%}{ratio:>16}"
            f"{told[line.key]['peak'] / 2**30:>7.2f}{median(told[line.key]['tokens']):>9,.0f}"
        )


def speeds(told: clock.Result) -> list[float]:
    """Tokens a second of each round."""
    return [tokens / seconds for tokens, seconds in zip(told["tokens"], told["seconds"], strict=True)]


PARTS = {"generation": generation}
"""Each yields the lines of its tables."""


if __name__ == "__main__":
    sys.exit(main())
