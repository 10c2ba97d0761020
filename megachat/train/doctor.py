"""STAGE doctor: what `megachat pretrain` would need with the same settings, and what is missing for it.

It trains nothing, starts no ranks and writes nothing that stays. Without `gpus` and `device` it is about this
machine; with them about the one that is named, on any laptop or login node. What `encode` has not made yet it
says it could not look at. The exit code is 1 when something would end the run, else 0.
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import yaml
from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from megachat.log import rows
from megachat.parallel.engine import compatible_ops, has_bf16, version
from megachat.parallel.link import measure
from megachat.parallel.mesh import expected_world
from megachat.parallel.predict import H100, step
from megachat.run import finished
from megachat.tokenizer.tokenizer import Tokenizer
from megachat.train.forecast import (
    MEMORY,
    Encoded,
    Finding,
    Job,
    check_batch,
    check_corpus,
    check_disk,
    check_host,
    check_memory,
    check_rate,
    check_tensor,
    check_tokens,
    check_vocabulary,
    device_memory,
    flop,
    gib,
    memory_here,
    room_here,
    short,
    size,
    worst,
)
from megachat.train.memory import ROOM
from megachat.train.metrics import PEAKS, Precision, known_as, peak_flops
from megachat.train.pretrain import Pretrain

PATIENCE = 60.0
"""Seconds that the ranks of an all-reduce may take, imports included."""
USUAL = 0.4
"""MFU: llm-foundry has published 0.41 to 0.46 of runs on H100s."""
PROBE = 2**26
"""Bytes written to the disk to see how fast it is."""
LOCAL = ("ext4", "xfs", "btrfs", "overlay", "tmpfs", "zfs")
"""File systems that other nodes do not see."""
MARKS = {"ok": "ok     ", "unknown": "-      ", "warning": "WARNING", "problem": "PROBLEM"}


class Doctor(Pretrain):
    """A pretraining run that is looked at, not run."""

    name: ClassVar[str] = "doctor"
    trains: ClassVar[bool] = False
    recorded: ClassVar[bool] = False

    gpus: PositiveInt | None
    """How many devices it is planned for; null: those of this machine."""
    gpus_per_node: PositiveInt
    """How many of them share a node."""
    device: str | None
    """Of which kind (`H100`); null: this machine's."""
    vocab: PositiveInt
    """Words of the vocabulary, as long as `tokenizer` has not finished."""
    mfu: Annotated[float, Field(gt=0, le=1)] | None
    """The share of the devices' peak that is put to use, as long as this run has not been measured; null:
    what `megachat/parallel/predict.py` makes of it where it knows the devices, else 0.4."""
    price: PositiveFloat | None
    """Of one GPU for one hour, in any currency."""
    probe: bool
    """Whether to try the disk and an all-reduce on this machine, which takes some seconds."""

    @field_validator("device")
    @classmethod
    def _is_known(cls, device: str | None) -> str | None:
        if device is not None and device_memory(device) is None:
            raise ValueError(
                f"how much memory {device!r} has is not known; name one of {', '.join(MEMORY)}, or say it, "
                f"as in device='{device} 48GB'"
            )
        return device

    @property
    def elsewhere(self) -> bool:
        """Whether it is about other machines than this one."""
        return self.gpus is not None or self.device is not None

    def execute(self) -> None:
        """Prints what it finds."""
        tokenizer, corpus, about_data = self.data()
        job = self.planned(tokenizer.vocab if tokenizer else self.vocab)
        size = short(job.parameters)
        if job.model.moe is not None:
            size += f" ({short(job.active)} active)"
        print(f"A {size} model on {job.ranks} x {self.device or here()}, run={self.run}")
        sections = {"Data": iter(about_data), "Settings": self.settings(job, corpus)}
        if not self.elsewhere:
            sections = {"This machine": self.machine()} | sections
        found: list[Finding] = []
        for title, findings in sections.items():
            print(f"\n{title}")
            for finding in findings:
                print(f"  {MARKS[finding.level]}  {finding}", flush=True)
                found.append(finding)
        print("\nMemory of a rank")
        print("\n".join(breakdown(job)))
        print("\nPlan")
        print("\n".join(f"  {line}" for line in self.plan(job, corpus)))
        counts = {level: sum(finding.level == level for finding in found) for level in MARKS}
        print(f"\n{plural(counts['problem'], 'problem')}, {plural(counts['warning'], 'warning')}")
        if worst(found) == "problem":
            sys.exit(1)

    def planned(self, vocab: int) -> Job:
        """The run in figures. GPUs that are not here have bf16."""
        precision = self.parallel.precision
        bf16 = self.elsewhere or has_bf16() if precision == "auto" else precision == "bf16"
        cuda = self.elsewhere or torch.cuda.is_available()
        return self.job(vocab, self.gpus or expected_world(), bf16, cuda)

    # What is looked at.

    def machine(self) -> Iterator[Finding]:
        """Devices, compilers, libraries, and the network between the ranks."""
        yield from devices()
        yield from software()
        if self.probe:
            yield link()

    def disk(self, job: Job) -> Iterator[Finding]:
        """Whether the run folder can be written, how fast, and for how many checkpoints."""
        there = next(path for path in [self.run.absolute(), *self.run.absolute().parents] if path.exists())
        kind = file_system(there)
        if self.elsewhere and kind in LOCAL:
            text = f"{there} is on a disk of this machine ({kind}), {size(job.checkpoint)} are a checkpoint"
            yield Finding(
                "unknown", "run folder", text, "several nodes need run=... on one that all of them see"
            )
            return
        yield check_disk(job, self.run, self.checkpoint_keep)
        try:
            speed = write_speed(there) if self.probe else None
        except OSError as error:
            yield Finding(
                "problem",
                "run folder",
                f"{there} cannot be written ({error.strerror})",
                "name another with run=...",
            )
            return
        if speed is not None:
            yield Finding("ok", "run folder", f"{there} ({kind}), {size(speed)} a second with fsync")

    def data(self) -> tuple[Tokenizer | None, Encoded | None, list[Finding]]:
        """The tokenizer and the shards, as far as they are there."""
        found, tokenizer, corpus = [], None, None
        if finished(self.source("tokenizer")):
            tokenizer = Tokenizer.load(self.source("tokenizer"))
            found.append(Finding("ok", "tokenizer", f"{tokenizer.vocab:,} words of vocabulary"))
        else:
            text = f"`tokenizer` has not finished in {self.run}: {self.vocab:,} words are assumed"
            found.append(Finding("unknown", "tokenizer", text, "set vocab=..."))
        folder = self.source("encode")
        if not finished(folder):
            text = f"`encode` has not finished in {self.run}: the corpus was not looked at"
            return tokenizer, None, [*found, Finding("unknown", "corpus", text)]
        corpus = Encoded.read(folder, self.mixture)
        if tokenizer:
            found.extend(check_corpus(corpus, tokenizer.vocab, tokenizer.sha256))
        return tokenizer, corpus, found

    def settings(self, job: Job, corpus: Encoded | None) -> Iterator[Finding]:
        """What arithmetic can tell."""
        layout = check_tensor(job, self.gpus_per_node)
        if layout:
            yield layout
        room, where = self.room(job)
        if room is None:
            text = f"{gib(job.memory.peak)} a rank; how much {where} has is not known"
            yield Finding("unknown", "memory", text, "say device=H100, or another of the table")
        else:
            yield check_memory(job, room, where)
        yield check_host(job, min(job.ranks, self.gpus_per_node), None if self.elsewhere else memory_here())
        yield check_vocabulary(job)
        yield check_batch(job)
        budget = self.budget(corpus.tokens if corpus else None)
        if budget is not None:
            yield from check_tokens(job, budget, corpus.tokens or None if corpus else None)
        if self.context < self.model.context:
            text = f"context={self.context} of model.context={self.model.context}"
            yield Finding(
                "warning", "context", text, "the model will not have seen later positions; set context"
            )
        yield check_rate(job)
        yield from self.disk(job)

    def room(self, job: Job) -> tuple[float | None, str]:
        """Bytes that a rank may fill, and of what."""
        if self.device is not None:
            there = device_memory(self.device)
            return None if there is None else ROOM * there, self.device
        if self.gpus is not None and not torch.cuda.is_available():
            return None, "the device"
        return room_here(job.ranks)

    def plan(self, job: Job, corpus: Encoded | None) -> Iterator[str]:
        """Steps, days, money, bytes."""
        tokens = self.budget(corpus.tokens if corpus else None)
        if tokens is None:
            yield "epochs of a corpus that is not there yet: no number of tokens, no days"
        else:
            steps = max(1, tokens // (self.batch * self.context))
            yield f"{short(tokens)} tokens, {steps:,} steps of {short(self.batch * self.context)}"
            yield from self.time(job, tokens)
        yield f"{flop(job.flops)} a token; a checkpoint is {size(job.checkpoint)}"

    def time(self, job: Job, tokens: int) -> Iterator[str]:
        """How long it takes, as measured in this run, else by the peak of the device."""
        speed, source = self.measured(), f"measured in {self.run / 'pretrain'}"
        if speed is None:
            peak = self.peak(job)
            if peak is None:
                yield f"n/a days: the peak of {self.device or 'the device'} is not known; say device=H100"
                return
            mfu, why = self.use(job)
            speed = job.ranks * peak * mfu / job.flops
            source = f"if {mfu:.0%} of {flop(peak)}/s a device are put to use ({why})"
        seconds = tokens / speed
        yield f"{duration(seconds)}, {short(speed)} tokens a second, {source}"
        if self.price is not None:
            hours = job.ranks * seconds / 3600
            yield f"{hours:,.0f} GPU-hours, {hours * self.price:,.0f} at {self.price:g} each"

    def use(self, job: Job) -> tuple[float, str]:
        """The share of the peak that is put to use, and who says so."""
        if self.mfu is not None:
            return self.mfu, "mfu=..."
        known = self.device is not None and known_as(self.device) == "H100" and job.bf16
        if known and job.model.moe is None and job.ranks % job.parallel.together == 0:
            return step(job.model, job.vocab, job.layout, H100).mfu, "predicted, mfu=... to say otherwise"
        return USUAL, "assumed, mfu=... to say otherwise"

    def peak(self, job: Job) -> float | None:
        """FLOP/s of one device."""
        precision: Precision = "bf16" if job.bf16 else "fp32"
        if self.device is None:
            kind = "cuda" if torch.cuda.is_available() else "cpu"
            return (
                None if self.gpus is not None and kind == "cpu" else peak_flops(torch.device(kind), precision)
            )
        peak = PEAKS.get(known_as(self.device))
        return None if peak is None else peak.of(precision)

    def measured(self) -> float | None:
        """Tokens a second of this very run, if it has begun on this machine."""
        folder = self.run / "pretrain"
        if self.elsewhere or not (folder / "config.yaml").is_file():
            return None
        before: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        names = ("model", "parallel", "optimizer", "batch", "micro_batch", "context")
        if any(before.get(name) != self.tree.get(name) for name in names):
            return None
        speeds = [
            row["tokens_per_second"] for row in rows(folder / "metrics.jsonl") if "tokens_per_second" in row
        ]
        return statistics.median(speeds[-20:]) if speeds else None


def here() -> str:
    """What this machine trains on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "this CPU"


def devices() -> Iterator[Finding]:
    """What there is to compute with."""
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        text = f"{torch.cuda.get_device_name(index)}, {gib(total)}, bf16 {'yes' if has_bf16() else 'no'}"
        if free < total / 2:
            yield Finding("warning", "GPU", f"{text}, of which {gib(free)} are free", "somebody else uses it")
        else:
            yield Finding("ok", "GPU", text)
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    extensions = {
        "AVX512-BF16": torch.cpu._is_avx512_bf16_supported(),
        "AMX": torch.cpu._is_amx_tile_supported(),
    }
    text = f"{cores} cores, {threads} threads a rank, " + ", ".join(
        f"{name} {'yes' if there else 'no'}" for name, there in extensions.items()
    )
    if not torch.cuda.is_available() and not any(extensions.values()):
        yield Finding(
            "warning", "CPU", text, "bf16 would be slower than fp32: parallel.precision=auto takes fp32"
        )
    elif threads > cores:
        yield Finding("warning", "CPU", text, f"OMP_NUM_THREADS={cores} would not wait for cores")
    else:
        yield Finding("ok", "CPU", text)


def software() -> Iterator[Finding]:
    """Versions, compilers, and DeepSpeed's compiled parts."""
    text = f"torch {torch.__version__}, DeepSpeed {version()}"
    if torch.cuda.is_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        text += f", CUDA {torch.version.cuda}, NCCL {nccl}"
    yield Finding("ok", "libraries", text)
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    tools = {"C++": compiler, "ninja": shutil.which("ninja"), "nvcc": shutil.which("nvcc")}
    if not torch.cuda.is_available():
        del tools["nvcc"]
    lacking = [name for name, path in tools.items() if path is None]
    text = ", ".join(f"{name} {path or 'none'}" for name, path in tools.items())
    if compiler is None:
        yield Finding("warning", "compilers", text, "torch.compile needs one: apt-get install g++")
    else:
        remedy = f"only DeepSpeed's own ops would need {' and '.join(lacking)}" if lacking else ""
        yield Finding("ok", "compilers", text, remedy)
    ops = compatible_ops()
    text = f"can be built here: {', '.join(name for name, can in ops.items() if can) or 'none'}"
    yield Finding("ok", "DeepSpeed ops", text, "megachat needs none of them")


def link() -> Finding:
    """An all-reduce between the processes that this machine would have, two at least."""
    ranks = max(2, torch.cuda.device_count())
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        return Finding("ok", "all-reduce", "one GPU, nothing to sum")
    name = "NCCL" if torch.cuda.is_available() else "gloo"
    speed, wrong = measure(ranks, PATIENCE)
    if wrong:
        return Finding(
            "problem", "all-reduce", f"{ranks} ranks with {name}: {wrong}", "NCCL_DEBUG=INFO says more"
        )
    return Finding("ok", "all-reduce", f"{ranks} ranks with {name}, {speed:.2f} GB/s")


def file_system(path: Path) -> str:
    """The kind of the file system that a path is on."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    above = [(place, kind) for place, kind in mounts if path.is_relative_to(place)]
    return max(above, key=lambda mount: len(mount[0]))[1] if above else "unknown"


def write_speed(folder: Path) -> float:
    """Bytes a second that reach the disk."""
    begun = time.perf_counter()
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
        file.write(os.urandom(PROBE))
        file.flush()
        os.fsync(file.fileno())
    return PROBE / (time.perf_counter() - begun)


def breakdown(job: Job) -> Iterator[str]:
    """Each part in GiB, and the moment of the peak."""
    needed = job.memory
    for name, count in needed.parts().items():
        if count:
            yield f"  {name:<12}{count / 2**30:>10.2f} GiB"
    yield f"  {'peak':<12}{needed.peak / 2**30:>10.2f} GiB, in the {needed.moment}"


def plural(count: int, noun: str) -> str:
    """Example: plural(2, "problem") -> "2 problems" """
    return f"{count} {noun}{'s' * (count != 1)}"


def duration(seconds: float) -> str:
    """Example: duration(100_000) -> "1.2 days" """
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.0f} seconds"
