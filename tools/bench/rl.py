"""Reinforcement learning measured: megachat and what others use, with the same tiny models on the CPU.

    python tools/bench/rl.py                                 # all parts
    python tools/bench/rl.py --part generation --repeat 5    # how fast answers to 64 prompts are written
    python tools/bench/rl.py --part grpo dpo                 # how long a step takes

README.md beside this file says what is counted and what is not.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # of a script, only its own folder is there

from megachat.data import conversations
from megachat.data.harvest import library_documents
from megachat.model.draws import seed_of
from megachat.model.gpt import GPTConfig
from megachat.parallel.checkpoint import load_model
from megachat.tokenizer.chat_format import render_prompt
from megachat.tokenizer.tokenizer import Tokenizer
from megachat.tokenizer.train import train
from tools.bench import clock
from tools.bench.ask import Ask
from tools.bench.dedup import processor
from tools.bench.lesson import Lesson
from tools.bench.pretrain import LEARNT, stretched, write_run

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


@dataclass(frozen=True, slots=True)
class Training:
    """How a model is aligned."""

    batch: int
    micro_batch: int
    group: int
    shortest: int
    longest: int
    """Words of a prompt."""
    new: int
    """For GRPO tokens of an answer at most, for DPO words of one."""
    beta: float


TRAININGS = {
    "grpo": Training(batch=64, micro_batch=16, group=8, shortest=8, longest=64, new=64, beta=0.04),
    "dpo": Training(batch=32, micro_batch=16, group=1, shortest=8, longest=64, new=40, beta=0.1),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """Somebody who writes, or trains."""

    key: str
    name: str
    runner: str
    environment: str = ""


LINES = (
    Line(key="transformers", name="transformers generate", runner="write_transformers",
         environment="transformers"),
    Line(key="megachat", name="megachat", runner="write_megachat"),
)  # fmt: skip
TRAINERS = (
    Line(key="trl", name="TRL", runner="align_trl", environment="trl"),
    Line(key="megachat", name="megachat", runner="align_megachat"),
)
KEYS = [*dict.fromkeys(line.key for line in (*LINES, *TRAINERS))]


def main() -> int:
    """Prints the tables. Returns 3 if what was asked for by name is not installed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", nargs="+", default=[*PARTS], choices=[*PARTS], help=", ".join(PARTS))
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", choices=KEYS, help=", ".join(KEYS))
    parser.add_argument("--repeat", type=int, default=3, help="rounds; the median counts (default: 3)")
    given = parser.parse_args()
    if absent := [
        (one.key, remedy)
        for one in (*LINES, *TRAINERS)
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


def steps(stage: str, only: Sequence[str], repeat: int) -> Iterator[str]:
    """How long an optimizer step takes, at each precision, answers written and judged included."""
    lines = [line for line in TRAINERS if not only or line.key in only]
    for shape in SHAPES:
        with tempfile.TemporaryDirectory(prefix="bench-rl.") as folder:
            for precision in ("float32", "bfloat16"):
                lesson = prepared(Path(folder), shape, stage, precision, 2 * repeat)
                told = {}
                for line in lines:
                    if not clock.missing(line.environment):
                        print(f"{shape.name}, {stage}: {line.name}", file=sys.stderr, flush=True)
                        told[line.key] = teach(line, stage, lesson, Path(folder))
                how = TRAININGS[stage]
                title = f"{stage}, {how.batch} a step, {how.micro_batch} at once; {shape.name}; {precision}"
                yield from steps_table(lines, told, title)


def prepared(folder: Path, shape: Shape, stage: str, precision: str, count: int) -> Lesson:
    """A run with a model that has taken one step, and prompts or preferences out of Python's library."""
    how, run = TRAININGS[stage], folder / "start"
    if not run.exists():
        start(run, shape)
    loaded = load_model(run / "pretrain")
    weights = folder / "weights.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in loaded.model.state_dict().items()}, weights)
    tokenizer, words = loaded.tokenizer, iter(library_words())
    torch.manual_seed(0)

    def said(number: int) -> str:
        return " ".join(next(words) for _ in range(number))

    needed = (count + 1) * how.batch // (how.group if stage == "grpo" else 1)
    lengths = torch.randint(how.shortest, how.longest + 1, (needed,)).tolist()
    asked = [said(length) for length in lengths]
    answers = [(said(how.new), said(how.new)) if stage == "dpo" else ("", "") for _ in asked]
    texts = folder / f"{stage}.jsonl"
    with texts.open("w", encoding="utf-8") as file:
        for prompt, (good, bad) in zip(asked, answers, strict=True):
            row = {"prompt": prompt} | ({"chosen": good, "rejected": bad} if stage == "dpo" else {})
            file.write(json.dumps(row) + "\n")
    return Lesson(
        run=str(run), weights=str(weights), model=shape.model, vocab=shape.vocab, pad=tokenizer.pad,
        end=tokenizer.end, precision=precision, texts=str(texts),
        prompts=[render_prompt(conversations.ask(prompt), tokenizer) for prompt in asked],
        chosen=[tokenizer.encode(good) for good, _ in answers],
        rejected=[tokenizer.encode(bad) for _, bad in answers],
        steps=count, batch=how.batch, micro_batch=how.micro_batch, group=how.group, new=how.new,
        beta=how.beta, lr=1e-6,
    )  # fmt: skip


def start(run: Path, shape: Shape) -> None:
    """A tokenizer, shards, and a model after one step of `megachat pretrain`."""
    texts, size = [], 0
    for document in library_documents():
        texts.append(document.text)
        size += len(document.text)
        if size > 2_000_000:
            break
    tokenizer = stretched(train(texts, min(shape.vocab, LEARNT), 0.9995, 1), shape.vocab)
    run.mkdir()
    write_run(run, tokenizer, documents(tokenizer, texts))
    sizes = [f"model.{name}={'null' if value is None else value}" for name, value in shape.model.items()]
    command = [
        sys.executable, "-m", "megachat", "pretrain", f"run={run}", "model=gpt_3m", *sizes, "context=256",
        "batch=8", "micro_batch=8", "tokens=1000000", "max_steps=1", "validation_windows=1",
        "log.wandb=disabled", "preflight=false", "prompt=def",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=clock.ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"megachat pretrain failed:\n{done.stderr[-4000:]}")


def documents(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray[Any, Any]:
    """Rows to train on."""
    ids = np.array([token for text in texts[:200] for token in tokenizer.encode(text)])
    return np.resize(ids, (64, 256))


def library_words() -> Iterator[str]:
    """Words of Python's library, one after the other."""
    for document in library_documents():
        yield from document.text.split()


def teach(line: Line, stage: str, lesson: Lesson, folder: Path) -> clock.Result:
    """Has the steps taken in a process of its own, with all cores."""
    lesson.write(folder / "lesson.json")
    threads = {"OMP_NUM_THREADS": str(cores()), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return clock.run(line.runner, line.environment, stage, folder / "lesson.json", settings=threads)


def steps_table(lines: Sequence[Line], told: Mapping[str, clock.Result], title: str) -> Iterator[str]:
    """A line for each: median seconds of a step, the fastest, the slowest, and how many times TRL's speed."""
    yield ""
    yield title
    yield f"{'':<32}{'s/step':>10}{'from':>8}{'to':>8}{'x TRL':>8}{'GiB':>7}"
    base = median(told["trl"]["seconds"]) if "trl" in told else None
    for line in lines:
        if line.key not in told:
            yield f"{line.name:<32}not installed: {clock.missing(line.environment)}"
            continue
        each = told[line.key]["seconds"]
        ratio = f"{base / median(each):.2f}" if base else "-"
        yield (
            f"{line.name:<32}{median(each):>10.2f}{min(each):>8.2f}{max(each):>8.2f}{ratio:>8}"
            f"{told[line.key]['peak'] / 2**30:>7.2f}"
        )


PARTS = {"generation": generation, "grpo": partial(steps, "grpo"), "dpo": partial(steps, "dpo")}
"""Each yields the lines of its tables."""


if __name__ == "__main__":
    sys.exit(main())
