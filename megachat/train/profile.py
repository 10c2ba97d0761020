"""`profile=true`: where the time of a step goes, as a page to read and a trace to look into.

Some steps are only timed, then as many are traced: torch's profiler slows down what it looks at, so the page
has the parts of a step from the former and its operators from the latter. Rank 0 alone is looked at, and the
others wait for it meanwhile; how they compare is in `watch/slowest_ratio` of the metrics.
"""

import gzip
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from megachat.files import remove, replacing
from megachat.log import say
from megachat.train.metrics import memory_gib
from megachat.train.watch import Watch

TRACE, PAGE = "trace.json.gz", "profile.md"

WARM = 5
"""Steps before the first that counts: kernels are chosen and compiled, memory is taken."""
STEPS = 3
"""Steps that are timed, and steps that are traced; of a large model they are some million events."""
LONGEST = 12
"""Operators on the page."""


@dataclass(frozen=True)
class Use:
    """What a GPU did, as shares of the time that has passed."""

    computing: float
    communicating: float
    """And nothing else."""
    copying: float
    """And nothing else."""

    @property
    def idle(self) -> float:
        """The share in which it did nothing."""
        return max(0.0, 1.0 - self.computing - self.communicating - self.copying)


@dataclass(frozen=True)
class Operator:
    """One kind of operation, without what it calls."""

    name: str
    calls: float
    """In a step."""
    share: float
    """Of the time that has passed."""


@dataclass(frozen=True)
class Facts:
    """What is known of a step."""

    seconds: float
    """Of a step that was only timed."""
    traced: float
    """Of a step that was traced."""
    parts: Mapping[str, float]
    """Seconds of a timed step, by part."""
    operators: Sequence[Operator]
    """By time: of the GPU's where there is one."""
    outside: float
    """The share of the time in which a CPU was in no operator, but in Python."""
    use: Use | None
    """None without a GPU."""
    memory: float
    """The peak, in GiB."""
    room: float | None
    """What the GPU has, in GiB."""

    def share(self, part: str) -> float:
        """Of a timed step."""
        return self.parts.get(part, 0.0) / self.seconds


Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> float:
    """How long at least one of them lasts. Example: union([(0.0, 4.0), (2.0, 6.0), (8.0, 9.0)]) -> 7.0."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def use_of(events: Iterable[tuple[str, Interval]], passed: float) -> Use:
    """What a GPU did, by the names of its kernels and when each ran."""
    computing, communicating, copying = [], [], []
    for name, interval in events:
        kind = name.lower()
        if "nccl" in kind:
            communicating.append(interval)
        elif kind.startswith(("memcpy", "memset")):
            copying.append(interval)
        else:
            computing.append(interval)
    computed = union(computing)
    talked = union([*computing, *communicating])
    busy = union([*computing, *communicating, *copying])
    return Use(computed / passed, (talked - computed) / passed, (busy - talked) / passed)


def advice(facts: Facts) -> list[str]:
    """What the figures suggest, the largest share first: three sentences at most."""
    use = facts.use
    waiting = max(facts.share("communication"), use.communicating if use else 0.0)
    found = [
        (facts.share("data"), 0.05, "Data takes {} of a step, in which nothing else happens: raise prefetch, "
         "put the data on a faster disk, or leave a core to the thread that reads."),
        (waiting, 0.15, "Communication takes {}: a larger batch has more work between two exchanges, a "
         "lower ZeRO stage sends less, and tensor-parallel ranks belong on one node."),
        (facts.share("optimizer"), 0.2, "The optimizer takes {}: with a larger batch it steps less often."),
        (facts.share("saving"), 0.05, "Saving takes {}: raise checkpoint_interval, and keep "
         "checkpoint_background=true."),
        (facts.share("validation"), 0.1, "Validation takes {}: raise validation_interval."),
        (facts.share("rollout"), 0.5, "Writing answers takes {}: raise at_once as far as memory goes."),
        (use.idle if use else 0.0, 0.15, "The GPU has nothing to do for {} of the time, tracing included: "
         "Python cannot start kernels that small fast enough; raise micro_batch, or set "
         "parallel.compile=true."),
        (facts.outside, 0.15, "Python between two operators takes {}, tracing included: raise micro_batch, "
         "so that each does more."),
    ]  # fmt: skip
    told = [
        sentence.format(f"{share:.0%}")
        for share, much, sentence in sorted(found, reverse=True)
        if share > much
    ]
    if facts.room is not None and facts.memory < 0.6 * facts.room:
        told.append(
            f"Peak memory is {facts.memory:.1f} of {facts.room:.1f} GiB: a larger micro_batch fits, or "
            "parallel.checkpointing=none, where it is not that already."
        )
    useful = facts.share("forward") + facts.share("backward")
    return told[:3] or [
        f"Forward and backward take {useful:.0%} of a step and nothing stands out: what can be gained is in "
        "the operators."
    ]


def page(facts: Facts, title: str) -> str:
    """All of it for a person, in Markdown."""
    lines = [f"# {title}", "", f"A step takes {_milliseconds(facts.seconds)}.", ""]
    lines += [*advice(facts), "", "## Parts of a step", "", "| part | time | share |", "|---|---:|---:|"]
    for part, seconds in sorted(facts.parts.items(), key=lambda item: -item[1]):
        lines.append(f"| {part} | {_milliseconds(seconds)} | {facts.share(part):.1%} |")
    if facts.use is not None:
        use = facts.use
        lines += [
            "",
            f"The GPU computes {use.computing:.1%} of the time, only communicates {use.communicating:.1%}, "
            f"only copies {use.copying:.1%}, and is idle {use.idle:.1%}.",
        ]
    room = "" if facts.room is None else f" of {facts.room:.1f}"
    lines += [
        "",
        f"Peak memory: {facts.memory:.2f}{room} GiB.",
        "",
        "## Operators",
        "",
        "By their own time, without what they call, as a share of all that has passed. Steps were traced for "
        f"this, which makes them slower: {_milliseconds(facts.traced)} each.",
        "",
        "| operator | calls a step | share |",
        "|---|---:|---:|",
    ]
    lines += [f"| {one.name} | {one.calls:.0f} | {one.share:.1%} |" for one in facts.operators[:LONGEST]]
    rest = facts.operators[LONGEST:]
    lines.append(f"| {len(rest)} others | {sum(one.calls for one in rest):.0f} | {_sum(rest):.1%} |")
    if facts.use is None:
        lines.append(f"| none: Python | | {facts.outside:.1%} |")
    return "\n".join([*lines, "", f"`{TRACE}` beside this page opens in https://ui.perfetto.dev.", ""])


def _sum(operators: Sequence[Operator]) -> float:
    return sum((one.share for one in operators), 0.0)


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


@dataclass
class Profile:
    """Looks at some steps of a run, once. It is left without a word if the run ends before."""

    folder: Path
    title: str
    watch: Watch
    device: torch.device
    left: int
    """Steps that the run still has to take: of a short one fewer are looked at."""
    tracer: Any = None
    plan: dict[int, Callable[[], None]] = field(default_factory=dict)
    """What is done before which step."""
    steps: int = 0
    """Steps that have been begun."""
    before: dict[str, float] = field(default_factory=dict)
    """Seconds of each part, when last asked."""

    def __post_init__(self) -> None:
        self.count = min(STEPS, (self.left - 1) // 2)
        if self.count < 1:
            say("profile=true takes a run that has three more steps to take; nothing is profiled")
            return
        first = min(WARM, self.left - 2 * self.count - 1)
        # A step between the timed ones and the traced ones pays for setting up the tracer.
        acts = (self._time, self._prepare, self._trace, self._finish)
        after = (0, self.count, self.count + 1, 2 * self.count + 1)
        self.plan = {first + steps: act for steps, act in zip(after, acts, strict=True)}

    def step(self) -> None:
        """A step begins, or the last one is over."""
        act = self.plan.pop(self.steps, None)
        self.steps += 1
        if act is not None:
            act()

    def _spent(self) -> dict[str, float]:
        """Seconds by part of a step, since last asked, when the GPU has done all it was told."""
        self.watch.at("profile")
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.watch.split.read()
        before, self.before = self.before, dict(self.watch.split.total)
        spent = {part: (total - before.get(part, 0.0)) / self.count for part, total in self.before.items()}
        return {part: seconds for part, seconds in spent.items() if seconds and part != "profile"}

    def _time(self) -> None:
        self._spent()

    def _prepare(self) -> None:
        self.parts, self.memory = self._spent(), memory_gib(self.device)  # the tracer takes some, too
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])]
        self.tracer = profile(activities=kinds)
        self.tracer.prepare_trace()

    def _trace(self) -> None:
        self._spent()
        self.tracer.start_trace()
        self.watch.split.span = Spans().begin

    def _finish(self) -> None:
        traced = sum(self._spent().values())
        tracer = self._stop()
        try:
            with replacing(self.folder / TRACE) as packed:
                plain = packed.with_suffix(".plain.tmp")
                try:
                    tracer.export_chrome_trace(str(plain))
                    with plain.open("rb") as source, gzip.open(packed, "wb", 3) as target:
                        shutil.copyfileobj(source, target)
                finally:
                    remove(plain)
            with replacing(self.folder / PAGE) as temporary:
                temporary.write_text(page(self._facts(tracer, traced), self.title), encoding="utf-8")
        except OSError as why:
            say(f"ALARM: the profile cannot be written to {self.folder} ({why}); the run goes on without it")
            return
        say(f"profile: {self.folder / PAGE} says where the time of a step goes; {TRACE} beside it has it all")

    def _facts(self, tracer: Any, traced: float) -> Facts:
        passed = self.count * traced
        gpu = self.device.type == "cuda"
        own = "self_device_time_total" if gpu else "self_cpu_time_total"
        averages = [one for one in tracer.key_averages() if one.device_type == DeviceType.CPU]
        operators = [
            Operator(one.key.replace("|", " ")[:60], one.count / self.count, getattr(one, own) / 1e6 / passed)
            for one in averages
            if not one.is_user_annotation and getattr(one, own)
        ]
        outside = sum(one.self_cpu_time_total for one in averages if one.is_user_annotation) / 1e6 / passed
        kernels = [
            (one.name, (one.time_range.start / 1e6, one.time_range.end / 1e6))
            for one in tracer.events()
            if one.device_type == DeviceType.CUDA and not one.is_user_annotation
        ]
        return Facts(
            seconds=sum(self.parts.values()),
            traced=traced,
            parts=self.parts,
            operators=sorted(operators, key=lambda one: -one.share),
            outside=0.0 if gpu else outside,
            use=use_of(kernels, passed) if gpu else None,
            memory=self.memory,
            room=torch.cuda.get_device_properties(self.device).total_memory / 2**30 if gpu else None,
        )

    def _stop(self) -> Any:
        """Ends the trace that is being taken, if one is."""
        tracer, self.tracer = self.tracer, None
        if self.watch.split.span is not None:
            self.watch.split.span("")
            self.watch.split.span = None
        elif tracer is not None:  # prepared, which only its end undoes
            tracer.start_trace()
        if tracer is not None:
            tracer.stop_trace()
        return tracer

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()


class Spans:
    """The sections of a step as spans of the trace."""

    def __init__(self) -> None:
        self.span: Any = None

    def begin(self, section: str) -> None:
        """The last one ends; "" begins none."""
        if self.span is not None:
            self.span.__exit__(None, None, None)
        self.span = record_function(section) if section else None
        if self.span is not None:
            self.span.__enter__()
