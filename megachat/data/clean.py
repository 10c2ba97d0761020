"""STAGE clean: from sources to text shards in which every document is worth reading, and is there once.

The work is a chain of steps (see `steps.py`), each of many tasks that read files and write files: `collect`
reads, mends and measures the documents, `select` applies the rules, `sign` to `settle` find the copies,
`filter` writes what stays. Which documents come out depends on the sources and the settings alone: not on the
number of shards, on who does the tasks, or on how often they were interrupted.
"""

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Generator
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import NonNegativeInt, PositiveFloat, model_validator

from megachat.data.boilerplate import Boilerplate
from megachat.data.collect import (
    EXACT,
    EXAMPLES,
    HITS,
    NEAR,
    SCHEMA,
    Collect,
    Select,
    Write,
    columns,
    measured,
)
from megachat.data.contamination import Benchmarks, largest
from megachat.data.copies import Corpus, Found, Shards, hot_buckets, search, signing
from megachat.data.dedup import Dedup
from megachat.data.executor import Executor
from megachat.data.filters import Filter
from megachat.data.funnel import (
    Funnel,
    as_records,
    clusters,
    document,
    kept,
    lengths,
    quarantine,
    removed_examples,
    table,
)
from megachat.data.jit import available
from megachat.data.language import LanguageId
from megachat.data.privacy import Privacy
from megachat.data.repair import Repair
from megachat.data.sources import Part, Source
from megachat.data.steps import Step, carry_out, folder
from megachat.data.words import Transform
from megachat.files import replacing, write_json
from megachat.log import say
from megachat.run import Stage, external
from megachat.stages import did_you_mean

STEPS = ("collect", "select", "sign", "exact", "alive", "join", "verify", "components", "settle", "filter")
"""What the stage does, in this order."""

PER_SHARD = 4_000_000
"""Bytes of input for which another shard is made, unless `shards` says how many; of a part of unknown size it
is taken to be the size."""
MANY_SHARDS = 1024
"""Beyond these, four times the input makes twice the shards."""
MOST_SHARDS = 8192
"""From 260 GB on: every search for copies opens files of all shards, and more of them would be small."""

COMPILE = 100_000_000
"""Bytes of Parquet, some twice as many of text, above which compiling the signatures' loop pays."""

FEW = 100
"""A source with fewer documents may lose them all."""

EMPTY = "empty, or nothing but control characters"
SAME = "the same text as an earlier document, but for blanks and letter case"


class Clean(Stage):
    """Collects, cleans and deduplicates text."""

    name: ClassVar[str] = "clean"
    neutral: ClassVar[tuple[str, ...]] = ("executor", "memory", "stage", "shard")

    corpus: dict[str, Source]
    """Where the text comes from; of two copies the one from the earlier source stays."""
    repair: Repair
    """How texts are brought to one spelling."""
    language: LanguageId
    """How languages are told apart."""
    boilerplate: Boilerplate
    """Lines to take out, such as cookie banners."""
    privacy: Privacy
    """What must not be learnt of people, and what is put in its place."""
    filters: dict[str, Filter]
    """The rules a document must pass, in this order."""
    benchmarks: Benchmarks
    """What the model will be examined with: documents that have it are removed."""
    transforms: dict[str, Transform]
    """What is done to the text in the end, for other models than language models."""
    dedup: Dedup
    """Which documents count as copies."""
    against: list[Path]
    """Finished runs whose documents are there already: copies of them go, by what is in their `work`."""
    shards: NonNegativeInt
    """Into how many files the corpus is cut, which is how many can work at it; 0: one per 4 MB, and fewer
    beyond 1,024."""
    executor: Executor
    """Who does the work. It does not change the result."""
    memory: PositiveFloat
    """GB that a task may take for sorting."""
    stage: str | None
    """The one step to do, on a cluster without Ray: collect, select, sign, exact, alive, join, verify,
    components, settle or filter; then once more none, to put the result in its place."""
    shard: str | None
    """With `stage`: which share of its tasks, as in 3/64 of an array of 64 jobs numbered from 0."""

    @model_validator(mode="after")
    def _what_there_is(self) -> "Clean":
        if self.stage is not None and self.stage not in STEPS:
            hint = did_you_mean(self.stage, STEPS, f"there are {', '.join(STEPS)}")
            raise ValueError(f"stage: there is no step {self.stage!r}; {hint}")
        if self.shard is not None:
            number, _, of = self.shard.partition("/")
            if not (number.isdecimal() and of.isdecimal() and int(number) < int(of)):
                raise ValueError(f"shard: {self.shard!r} is no share; those of 64 are 0/64 to 63/64")
            if self.stage is None:
                raise ValueError(
                    f"shard={self.shard} is a share of one step; say which, as in stage={STEPS[0]}"
                )
        if own := [run for run in self.against if run.absolute() == self.run.absolute()]:
            raise ValueError(f"against: {own[0]} is this run itself; name earlier ones, or leave it out")
        names = [*SCHEMA, *(name for rule in measured(self.filters).items() for name in columns(*rule))]
        dedup = self.dedup
        if dedup.near and dedup.keep == "best" and dedup.score not in names:
            hint = did_you_mean(dedup.score, names, f"there are {', '.join(names)}")
            raise ValueError(f"dedup.score: nothing measured is called {dedup.score!r}; {hint}")
        return self

    @property
    def whole(self) -> bool:
        return self.stage is None

    @property
    def work(self) -> Path:
        """Where the steps leave their files; other settings find there what they have in common."""
        return (self.run / "work").absolute()

    def execute(self) -> None:
        """Writes `text-*.jsonl.zst` and, as `report.json`, what was removed and why."""
        steps = self._steps()
        done = []
        try:
            while True:
                step = next(steps)
                if self.stage is None:
                    carry_out(step, self.executor)
                elif self._one(step):
                    return
                done.append(step)
        except StopIteration as end:
            if self.stage is not None:
                names = ", ".join(step.name for step in done)
                raise ValueError(f"stage: there is no step {self.stage!r}; there are {names}") from None
            self._finish(end.value)
        finally:
            self.executor.close()

    def _one(self, step: Step) -> bool:
        """Whether this is the step that was asked for, now done; any before it must be done already."""
        if step.name != self.stage:
            if missing := step.missing():
                raise ValueError(
                    f"stage={self.stage} reads what {step.name} writes, and {len(missing)} of its "
                    f"{step.tasks} tasks are not done (first {missing[0]}); run stage={step.name} before it"
                )
            return False
        number, of = map(int, (self.shard or "0/1").split("/"))
        if number >= step.tasks:
            say(f"{step.name} has {step.tasks:,} tasks: none for shard={self.shard}")
        carry_out(step, self.executor, (number, of))
        return True

    def _steps(self) -> Generator[Step, None, "Made"]:
        """The steps one by one, each when those before it have been carried out."""
        tree, signed = self.tree, signing(self.dedup)
        before = tuple(earlier(run, signed) for run in self.against)
        shards = self._shards()
        mending = {
            name: tree[name] for name in ("repair", "language", "boilerplate", "privacy", "transforms")
        }
        sought = {key: value for key, value in tree["benchmarks"].items() if key != "threshold"}
        measuring = {
            name: [type(filter).__name__, filter.model_dump(include={*filter.measured_by, "applies_to"})]
            for name, filter in self.filters.items()
        }
        # What a bucket or a data set holds is known from its parts alone; what filters name, from the files.
        parts = [[(name, *astuple(part)) for name, part in shard] for shard in shards]
        read = external([tree["corpus"], tree["benchmarks"], tree["filters"], mending])
        at = folder(self.work, "collect", tree["corpus"], mending, measuring, sought, read, parts)
        collect = Collect(
            "collect", at, len(shards), self.corpus, shards,
            self.repair, self.language, self.boilerplate, self.privacy, self.filters,
            self.benchmarks, self.transforms,
        )  # fmt: skip
        yield collect
        sizes = tuple(record["documents"] for record in collect.records)
        threshold = self.benchmarks.threshold if self.benchmarks.paths else None
        at = folder(self.work, "select", collect.folder.name, tree["filters"], threshold)
        select = Select("select", at, len(shards), collect.folder, self.filters, threshold)
        yield select
        index = folder(self.work, "sign", collect.folder.name, signed)
        own = Shards(sizes, collect.folder, index, select.folder)
        corpus = Corpus(own, before)
        amount = sum(path.stat().st_size for path in collect.folder.glob("*.parquet"))
        fast = available() and amount > COMPILE
        memory = int(self.memory * 1e9)
        found = yield from search(self.work, corpus, self.dedup, memory, fast)
        at = folder(self.work, "filter", select.folder.name, found.exact.folder.name, found.near.folder.name)
        write = Write("filter", at, len(shards), corpus, found, (*self._rules(),))
        yield write
        return Made(collect, select, write, found, corpus)

    def _shards(self) -> tuple[tuple[tuple[str, Part], ...], ...]:
        """The parts of all sources in order, cut into runs of about the same size."""
        parts = []
        for name, source in self.corpus.items():
            own = source.parts()
            if not own:
                raise ValueError(f"corpus.{name}: holds no document; leave it out or mend its settings")
            parts += [(name, part) for part in own]
        if not parts:
            raise ValueError("corpus: it names no source; choose one, as in corpus=python_library")
        sizes = np.array([part.size or PER_SHARD for _, part in parts], dtype=np.float64)
        count = min(self.shards or shards_for(sizes.sum()), len(parts))
        # A part cannot be cut: one larger than a shard counts as a shard, or others would share what is left.
        for _ in range(32):
            sizes = np.minimum(sizes, sizes.sum() / count)
        # A part belongs to the shard in which its middle lies.
        middle = np.cumsum(sizes) - sizes / 2
        owner = np.minimum(middle * count // sizes.sum(), count - 1)
        runs = [tuple(parts[row] for row in np.flatnonzero(owner == shard)) for shard in range(count)]
        return tuple(run for run in runs if run)

    def _finish(self, made: "Made") -> None:
        """Puts the shards and the report in their places."""
        funnel = Funnel.of(self._reasons(), made.collect.records, made.select.records, made.write.records)
        examples = removed_examples(made.write.records, made.corpus)
        rows = funnel.rows(examples)
        summary = kept(made.write.records)
        read, signed = made.collect.records, signing(self.dedup)
        aside = quarantine(read)
        unread = ""
        if count := aside["count"]:
            unread = f"{count:,} records or files of the corpus could not be read, the first at "
            unread += "{place}: {why}".format(**aside["first"][0])
            say(f"clean: {unread}")
        if not rows[0].documents_in:
            raise ValueError(f"corpus: there is no document in it; {unread or 'look at what its files hold'}")
        if not summary["documents"]:
            raise ValueError(f"no document is left; loosen the filter that removed the most\n{table(rows)}")
        self._check_loss(funnel, examples.get(NEAR, [""])[0])
        names = [f"text-{task:05}.jsonl.zst" for task in range(made.write.tasks)]
        for old in {path.name for path in self.folder.glob("text-*")} - {*names}:
            (self.folder / old).unlink()  # by a run with more shards that was killed here
        for name in names:
            with replacing(self.folder / name) as path:
                link(made.write.folder / name, path)
        buckets = [
            {"band": band, "documents": hot.documents, "sample": document(made.corpus, hot.example)}
            for band, hot in hot_buckets(made.found.join)[:EXAMPLES]
        ]
        report = {
            "rows": [asdict(row) for row in rows],
            "funnel": as_records(funnel),
            **summary,
            "lengths": lengths(made.write.records),
            "clusters": clusters(made.found.settle, made.found, made.corpus),
            "quarantine": aside,
            "hot_buckets": buckets,
            "pairs": {"compared": made.found.compared, "alike": made.found.alike},
            "contamination": largest([hit for record in read for hit in record["hits"]], HITS),
            "contaminated": sum((Counter(record["benchmarks"]) for record in read), Counter()),
            "signing": signed,
        }
        write_json(self.folder / "report.json", report)
        own = made.corpus.own
        folders = {"texts": own.texts.name, "indices": own.indices.name, "marks": made.write.folder.name}
        write_json(self.folder / "index.json", {"signing": signed, "sizes": own.sizes, **folders})
        say(table(rows))

    def _rules(self) -> dict[str, str]:
        """What is asked of each document by itself, and why it goes."""
        rules = {name: rule.reason for name, rule in self.filters.items()}
        share = f"{self.benchmarks.threshold:.0%} or more of what an item of a benchmark says"
        return rules | ({"contamination": share} if self.benchmarks.paths else {})

    def _reasons(self) -> dict[str, str]:
        """The steps at which documents go, and why."""
        near = f"{self.dedup.threshold:.0%} or more of the MinHash of an earlier document"
        return {"normalise": EMPTY, **self._rules(), EXACT: SAME} | ({NEAR: near} if self.dedup.near else {})

    def _check_loss(self, funnel: Funnel, example: str) -> None:
        """No source may lose nearly everything as near copies unnoticed."""
        for source, row in funnel.by_source():
            lost = row.step == NEAR and row.documents_removed / max(row.documents_in, 1)
            if lost > self.dedup.largest_loss and row.documents_in >= FEW:
                raise ValueError(
                    f"{row.documents_removed:,} of the {row.documents_in:,} documents of {source!r} are near "
                    f"copies (a copy, ~ and what stays: {example}); raise dedup.threshold, or, where so many "
                    "are right, as of pages that were crawled before, allow it with dedup.largest_loss=1"
                )


@dataclass(frozen=True)
class Made:
    """What the steps have left."""

    collect: Step
    select: Step
    write: Step
    found: Found
    corpus: Corpus


def earlier(run: Path, signed: dict[str, Any]) -> Shards:
    """The documents that an earlier run kept, with their index."""
    path = run / "clean" / "index.json"
    if not path.is_file():
        raise ValueError(f"against: {path} is missing; name a run in which `megachat clean` has finished")
    known = json.loads(path.read_text(encoding="utf-8"))
    if known["signing"] != signed:
        raise ValueError(
            f"against: {run} was signed with {known['signing']}, this run is with {signed}; set dedup alike, "
            f"or, where another Python brings another Unicode, run `megachat clean` of {run} again"
        )
    texts, indices, marks = (
        (run / "work" / known[name]).absolute() for name in ("texts", "indices", "marks")
    )
    if gone := [folder for folder in (texts, indices, marks) if not folder.is_dir()]:
        raise ValueError(f"against: {gone[0]} is gone; run `megachat clean` of {run} again")
    return Shards(tuple(known["sizes"]), texts, indices, marks)


def shards_for(size: float) -> int:
    """Into how many shards to cut so many bytes."""
    count = size / PER_SHARD
    if count > MANY_SHARDS:
        count = MANY_SHARDS * math.sqrt(count / MANY_SHARDS)
    return min(max(math.ceil(count), 1), MOST_SHARDS)


def link(old: Path, new: Path) -> None:
    """The same file under another name, or a copy where there can be none."""
    try:
        os.link(old, new)
    except OSError:
        shutil.copyfile(old, new)
