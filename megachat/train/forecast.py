"""What a run will take, and what of it will not fit: tokens, days, memory, disk; by arithmetic, in no time.

`megachat doctor` prints all of it before anything is trained; `megachat pretrain` says what is wrong with it.
"""

import json
import math
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from megachat.data.mixture import Mixture
from megachat.model.gpt import GPTConfig
from megachat.model.size import active_parameters, flops_per_token, parameters
from megachat.parallel.engine import Parallel
from megachat.parallel.volume import Layout
from megachat.train.memory import ROOM, Memory, Run, host_bytes, largest_micro_batch, memory, moments_of
from megachat.train.optimizers import SGD, Optimizer

MEMORY = {
    "GB200": 186, "B200": 180, "GH200": 96, "H200": 141, "H100": 80, "H100 NVL": 94, "A100": 80, "A40": 48,
    "A30": 24, "A10": 24, "L40": 48, "L4": 24, "RTX 6000 ADA": 48, "RTX A6000": 48, "RTX 5090": 32,
    "RTX 4090": 24, "RTX 3090": 24,
}  # fmt: skip
"""GiB by the longest part of a device's name that is listed, from makers' data sheets (which say GB)."""

DGX = 2_000_000_000_000
"""Bytes of host memory of NVIDIA's DGX H100, from its data sheet."""
OPTIMAL = 20.0
"""Tokens a parameter at which loss is lowest for the computation (Hoffmann et al., 2022,
https://arxiv.org/abs/2203.15556)."""
FREE_EPOCHS = 4.0
"""Passes over the same text up to which each is worth nearly as much as new text (Muennighoff et al., 2023,
https://arxiv.org/abs/2305.16264)."""
WORTH = 15.387756
"""The same authors' R*_D: what repetitions are worth decays by e after so many."""
GPT_3 = {
    125e6: 6e-4,
    350e6: 3e-4,
    760e6: 2.5e-4,
    1.3e9: 2e-4,
    2.7e9: 1.6e-4,
    6.7e9: 1.2e-4,
    13e9: 1e-4,
    175e9: 6e-5,
}
"""Parameters and Adam's learning rate (Brown et al., 2020, https://arxiv.org/abs/2005.14165, table 2.1)."""

NEAR = 1.1
"""How far a formula's memory may be from that of the run: `tools/estimate_memory.py --table` measures it."""

Number = int | float
Level = Literal["ok", "unknown", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of advice."""

    level: Level
    about: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.about}: {self.text}" + (f"; {self.remedy}" if self.remedy else "")


@dataclass(frozen=True)
class Job:
    """A training run as arithmetic sees it."""

    model: GPTConfig
    vocab: int
    parallel: Parallel
    optimizer: Optimizer
    batch: int
    micro_batch: int
    seq: int
    ranks: int
    bf16: bool
    cuda: bool

    @property
    def data(self) -> int:
        """Data-parallel ranks."""
        return max(1, self.ranks // self.parallel.together)

    @property
    def parameters(self) -> int:
        """Of the model."""
        return parameters(self.model, self.vocab)

    @property
    def active(self) -> int:
        """Of those the ones that a token passes through."""
        return active_parameters(self.model, self.vocab)

    @property
    def share(self) -> int:
        """Samples of a step on the rank that has most."""
        return math.ceil(self.batch / self.data)

    @property
    def run(self) -> Run:
        """One rank of it."""
        most = min(self.micro_batch, self.share)
        return Run(
            model=self.model,
            vocab=self.vocab,
            parallel=self.parallel,
            optimizer=self.optimizer,
            data=self.data,
            micro_batch=most,
            seq=self.seq,
            accumulated=math.ceil(self.share / most),
            bf16=self.bf16,
            cuda=self.cuda,
        )

    @property
    def layout(self) -> Layout:
        """As the network's formula sees it."""
        one, parallel = self.run, self.parallel
        return Layout(
            parallel.zero, self.data, parallel.tensor, one.accumulated, one.micro_batch, self.seq, self.bf16,
            checkpointing=parallel.checkpointing != "none", sequence=parallel.sequence,
        )  # fmt: skip

    @property
    def memory(self) -> Memory:
        """Of one rank."""
        return memory(self.run)

    @property
    def checkpoint(self) -> int:
        """Bytes of one: weights and moments in fp32."""
        return 4 * (1 + moments_of(self.optimizer)) * self.parameters

    @property
    def flops(self) -> int:
        """To train on a token."""
        return flops_per_token(self.model, self.vocab, self.seq)

    def seconds(self, tokens: int, peak: Number, mfu: Number) -> float:
        """To train on so many tokens with devices of `peak` FLOP/s, of which `mfu` are put to use."""
        return tokens * self.flops / (self.ranks * peak * mfu)


@dataclass(frozen=True)
class Encoded:
    """What `encode` has written, as far as a mixture reads it."""

    folder: Path
    tokens: int
    """To train on."""
    tokenizer: str
    """Sha256 of the one that made them."""
    sources: list[str]
    missing: list[str]
    """Sources that the mixture names and the corpus does not have."""

    @staticmethod
    def read(folder: Path, mixture: Mixture) -> "Encoded":
        """From the manifest alone."""
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        shards = [shard for shard in manifest["shards"].values() if shard["split"] == "train"]
        sources = [shard["source"] for shard in shards]
        named = {name for phase in mixture.plan() for name in phase.weights}
        used = named or set(sources)
        return Encoded(
            folder=folder,
            tokens=sum(shard["tokens"] for shard in shards if shard["source"] in used),
            tokenizer=manifest["tokenizer"],
            sources=sources,
            missing=sorted(named - set(sources)),
        )


def memory_here() -> int:
    """Bytes of this machine's memory that are free, or of what its control group may use."""
    values = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = 1024 * int(values["MemAvailable"].split()[0])
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # not there, or "max"
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
    return free


def room_here(ranks: int) -> tuple[float, str]:
    """Bytes that each of so many ranks of this machine may fill, and of what."""
    if torch.cuda.is_available():
        return ROOM * torch.cuda.mem_get_info()[1], torch.cuda.get_device_name()
    return memory_here() / ranks, "the memory that is free here"


def device_memory(name: str) -> int | None:
    """Bytes of a device by its name, None where neither it nor the table says.

    Example: device_memory("NVIDIA A100-SXM4-40GB") -> 40 * 2**30
    """
    said = re.search(r"(\d+) ?GB", name, re.IGNORECASE)
    if said:
        return int(said[1]) * 2**30
    plain = name.upper().replace("-", " ")
    known = max((part for part in MEMORY if re.search(rf"\b{part}\b", plain)), key=len, default=None)
    return None if known is None else MEMORY[known] * 2**30


def worth(tokens: Number, unique: Number) -> float:
    """How much new text `tokens` are worth that come from `unique` ones (Muennighoff et al., 2023, eq. 5)."""
    again = max(0.0, tokens / unique - 1)
    return min(tokens, unique) + unique * WORTH * -math.expm1(-again / WORTH)


def usual_rate(count: Number) -> float:
    """The learning rate of GPT-3's models for so many parameters, along straight lines between logarithms."""
    sizes = sorted(GPT_3)
    size = min(max(count, sizes[0]), sizes[-1])
    above = next(index for index, known in enumerate(sizes) if size <= known)
    if above == 0:
        return GPT_3[sizes[0]]
    low, high = sizes[above - 1], sizes[above]
    part = math.log(size / low) / math.log(high / low)
    return GPT_3[low] * (GPT_3[high] / GPT_3[low]) ** part


# What is wrong, if anything.


def check_memory(job: Job, room: Number, where: str) -> Finding:
    """Whether a rank fits into `room` bytes."""
    needed = job.memory
    text = f"{gib(needed.peak)} a rank, at its peak in the {needed.moment}, of {gib(room)} of {where}"
    fitting = largest_micro_batch(job.run, room)
    if needed.peak <= room:
        fitting = min(fitting, job.share)
        more = f"; micro_batch up to {fitting} fits" if fitting > job.run.micro_batch else ""
        return Finding("ok", "memory", text + more)
    remedy = f"micro_batch={fitting} fits" if fitting else _smaller(job)
    if needed.peak <= NEAR * room:
        return Finding("warning", "memory", f"{text}: it may or may not fit", remedy)
    return Finding("problem", "memory", text, remedy)


def _smaller(job: Job) -> str:
    """What to do where not even one sample fits."""
    zero, ideas = job.parallel.zero, []
    if zero < 3 and job.data > 1:
        ideas.append(f"parallel=zero{zero + 1}")
    if job.parallel.checkpointing == "none":
        ideas.append("parallel.checkpointing=full")
    ideas.append("a larger parallel.tensor, more GPUs, or a smaller model")
    return "not even micro_batch=1 fits: try " + ", ".join(ideas)


def check_host(job: Job, ranks: int, room: int | None) -> Finding:
    """Whether a node's own memory holds what its ranks keep there: what is offloaded, copies being saved."""
    needed = copied = ranks * job.checkpoint // job.ranks
    text = f"{gib(copied)} a node for a copy that is saved"
    if job.parallel.offload != "none":
        offloaded = ranks * host_bytes(job.run)
        needed += offloaded
        text = f"{gib(offloaded)} a node for what is offloaded, {text}"
    if room is not None and job.cuda and needed > room:
        return Finding("problem", "host memory", f"{text}, and {gib(room)} are free", "fewer ranks a node")
    if room is None and needed > DGX:
        return Finding("warning", "host memory", text, "a DGX H100 has 2 TB")
    return Finding("ok", "host memory", text)


def check_corpus(corpus: Encoded, vocab: int, tokenizer: str) -> list[Finding]:
    """Whether the tokens are of the tokenizer with this sum, and all sources of the mixture are there."""
    found = []
    if corpus.tokenizer != tokenizer:
        text = f"{corpus.folder} was encoded with another tokenizer ({corpus.tokenizer[:12]}) than this run's"
        remedy = f"run `megachat encode` again: its tokens are no words of the model's {vocab:,}"
        found.append(Finding("problem", "corpus", text, remedy))
    if corpus.missing:
        text = f"the mixture names {', '.join(corpus.missing)}; the corpus has {', '.join(corpus.sources)}"
        found.append(Finding("problem", "corpus", text, "correct mixture.weights"))
    return found


def check_vocabulary(job: Job) -> Finding:
    """Whether the model's weights are those of blocks that compute, or rows that are looked up."""
    share = 1 - parameters(job.model, 0) / job.parameters
    text = f"{job.vocab:,} words, {share:.0%} of the {short(job.parameters)} parameters"
    if share > 0.75:
        remedy = "train a smaller one (vocab=... of `tokenizer`), or a larger model"
        return Finding("warning", "vocabulary", text, remedy)
    return Finding("ok", "vocabulary", text)


def check_batch(job: Job) -> Finding:
    """Whether ranks wait for each other because the batch does not divide."""
    if job.batch < job.data:
        remedy = f"batch={job.data} or more, or fewer GPUs"
        return Finding("problem", "batch", f"{job.batch} samples for {job.data} data-parallel ranks", remedy)
    run = job.run
    used = job.batch / (job.data * run.micro_batch * run.accumulated)
    text = (
        f"{job.batch} samples = {job.data} ranks x {run.accumulated} micro-batches x {run.micro_batch}, "
        f"{job.batch * job.seq:,} tokens a step"
    )
    if used > 0.95:
        return Finding("ok", "batch", text)
    whole = job.data * run.micro_batch
    remedy = f"batch={max(1, round(job.batch / whole)) * whole} divides evenly"
    return Finding("warning", "batch", f"{text}, of which ranks wait {1 - used:.0%}", remedy)


def check_tokens(job: Job, tokens: int, corpus: int | None) -> list[Finding]:
    """The budget against the size of the model, and of the corpus where it is known."""
    each, kind = tokens / job.active, "parameters" if job.model.moe is None else "active parameters"
    text = f"{short(tokens)} for {short(job.active)} {kind}, {each:.3g} a parameter"
    if each < OPTIMAL / 4:
        remedy = f"20 a parameter, {short(OPTIMAL * job.active)}, make the most of the computation"
        found = [Finding("warning", "tokens", text, remedy)]
    else:
        found = [Finding("ok", "tokens", text)]
    if corpus is None:
        return found
    epochs = tokens / max(1, corpus)
    text = f"{short(corpus)} tokens, which are read {epochs:.3g} times"
    if epochs <= FREE_EPOCHS:
        return [*found, Finding("ok", "corpus", text)]
    value = f", worth as much as {short(worth(tokens, corpus))} new ones"
    limit = f"tokens={round(FREE_EPOCHS * corpus)}"
    remedy = f"up to four times is nearly as good as new text: use more text, or {limit}"
    return [*found, Finding("warning", "corpus", text + value, remedy)]


def check_disk(job: Job, folder: Path, kept: int) -> Finding:
    """Whether the checkpoints that are kept, and one more while it is written, have room."""
    there = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    free, needed = shutil.disk_usage(there).free, (kept + 1) * job.checkpoint
    text = (
        f"{size(free)} free at {there}, checkpoints take {size(needed)} ({kept + 1} x {size(job.checkpoint)})"
    )
    if free >= needed:
        return Finding("ok", "disk", text)
    if free >= 2 * job.checkpoint:
        return Finding("warning", "disk", text, "older ones make way; lower checkpoint_keep or free some")
    return Finding("problem", "disk", text, "free some, or write elsewhere with run=...")


def check_rate(job: Job) -> Finding:
    """The learning rate against those of GPT-3's models."""
    usual, rate = usual_rate(job.parameters), job.optimizer.lr
    if isinstance(job.optimizer, SGD) or job.parameters < min(GPT_3) / 2:
        return Finding("ok", "learning rate", f"{rate:g}")
    text = f"{rate:g}; GPT-3 had {usual:.2g} at this size"
    if usual / 10 < rate < 10 * usual:
        return Finding("ok", "learning rate", text)
    return Finding("warning", "learning rate", text, "try it on a smaller model first: sweep it with -m")


def check_tensor(job: Job, per_node: int) -> Finding | None:
    """Ranks that share a model or rows talk in every layer, so they should share a node."""
    for name in ("tensor", "sequence", "expert"):
        degree = getattr(job.parallel, name)
        if job.ranks % degree:
            text = f"parallel.{name}={degree} does not divide {job.ranks} ranks"
            return Finding("problem", "layout", text, "choose a multiple of it for the number of GPUs")
        if degree > per_node:
            text = (
                f"parallel.{name}={degree} spans nodes of {per_node} GPUs: every layer waits for the network"
            )
            return Finding("warning", "layout", text, f"parallel.{name}={per_node} and a higher ZeRO stage")
    return None


def worst(found: Iterable[Finding]) -> Level:
    """The worst level of all."""
    levels = {finding.level for finding in found}
    return "problem" if "problem" in levels else "warning" if "warning" in levels else "ok"


def gib(count: Number) -> str:
    """Memory, as GPUs count it."""
    return f"{count / 2**30:.2f} GiB"


def size(count: Number) -> str:
    """Disk space. Example: size(3.2e12) -> "3.2 TB"."""
    return f"{_rounded(count, ['', 'k', 'M', 'G', 'T', 'P'])}B"


def flop(count: Number) -> str:
    """Computations. Example: flop(989e12) -> "989 TFLOP"."""
    return f"{_rounded(count, ['', 'k', 'M', 'G', 'T', 'P', 'E'])}FLOP"


def short(count: Number) -> str:
    """A large number, as tokens and parameters are counted. Example: short(2_500_000_000) -> "2.5 B"."""
    return _rounded(count, ["", "k", "M", "B", "T"]).strip()


def _rounded(count: Number, prefixes: list[str]) -> str:
    power = min(len(prefixes) - 1, max(0, int(math.log10(max(1.0, count)) // 3)))
    return f"{count / 1000**power:.3g} {prefixes[power]}"
