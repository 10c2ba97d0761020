"""STAGE report: a run on one page, `<run>/report.html`, and every number on it in `<run>/report.json`.

It shows what has finished so far and can be written at any time: nothing here needs a model, a GPU, or the
network. The page is made from `report.json`'s contents alone. Texts of documents and of models are escaped
like any other.
"""

import json
import math
import os
import platform
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

from megachat import __version__
from megachat.evals.page import Facts, page
from megachat.evals.plots import Line, Plot
from megachat.files import replacing, write_json
from megachat.log import say
from megachat.run import Stage, finished
from megachat.stages import ORDER

PACKAGES = (
    "torch",
    "deepspeed",
    "sentencepiece",
    "datasketch",
    "grain",
    "hydra-core",
    "pydantic",
    "numpy",
    "wandb",
)


CURVES: dict[str, tuple[str, str | dict[str, str]]] = {
    "loss": (
        "Loss",
        {
            "rm": "nats per pair",
            "dpo": "nats per pair",
            "kto": "value per answer",
            "ppo": "policy loss",
            "grpo": "policy loss",
        },
    ),
    "bits_per_byte": ("Held-out text", "bits per byte"),
    "reward/mean": ("Reward", "what the answers were worth"),
    "kl": ("Distance from SFT (KL)", "nats per answer"),
    "accuracy": ("Pairs in the right order", "share"),
    "margin": ("Margin of the better answer", "difference of scores"),
    "entropy": ("Entropy of the policy", "nats per token"),
    "answer/length": ("Length of answers", "tokens"),
    "answer/repetition": ("What answers say twice", "share of fours of tokens"),
    "group/flat": ("Groups without spread", "share"),
    "clip_fraction": ("Clipped ratios", "share of tokens"),
    "critic/loss": ("Critic", "squared error"),
    "critic/explained_variance": ("What the critic foresees", "share of the variance of returns"),
    "sampler/error": ("Sampler against loss", "factor between a token's probabilities"),
    "gradient_norm": ("Gradient norm", "before clipping"),
    "tokens_per_second": ("Throughput", "tokens per second"),
}  # fmt: skip
"""Which metrics are drawn, in this order, and in which units; its `validation/` twin is drawn with it."""


class Report(Stage):
    """A run's report."""

    name: ClassVar[str] = "report"
    recorded: ClassVar[bool] = False

    def execute(self) -> None:
        """Writes report.json and report.html."""
        facts = gather(self.run)
        if not facts["stages"] and not facts["training"]:
            raise ValueError(
                f"no stage has finished in {self.run}, so nothing to report; name the run with run=..."
            )
        write_json(self.run / "report.json", facts)
        with replacing(self.run / "report.html") as temporary:
            temporary.write_text(page(facts), encoding="utf-8")
        say(f"{self.run / 'report.html'} shows the run; its numbers are in report.json")


def gather(run: Path) -> Facts:
    """Everything the page shows, from the files of a run."""
    stages = {}
    for stage in stages_in(run):
        if done := finished(run / stage):
            stages[stage] = {"seconds": done["seconds"], "finished": done.get("finished", "")}
    training = {
        stage: told for stage in stages_in(run) if (told := metrics(run / stage / "metrics.jsonl", stage))
    }
    answers = {stage: newest_answers(run / stage / "answers.jsonl") for stage in stages_in(run)}
    configs = {stage: text(run / stage / "config.yaml") for stage in stages_in(run)}
    return {
        "run": run.resolve().name,
        "written": time.strftime("%Y-%m-%d %H:%M %Z"),
        "seconds": round(sum(stage["seconds"] for stage in stages.values()), 3),
        "stages": stages,
        "evaluation": read_json(run / "evaluate" / "scores.json"),
        "samples": read_json(run / "evaluate" / "samples.json"),
        "answers": {stage: rows for stage, rows in answers.items() if rows},
        "training": training,
        "clean": read_json(run / "clean" / "report.json"),
        "tokenizer": read_json(run / "tokenizer" / "report.json"),
        "encode": read_json(run / "encode" / "manifest.json"),
        "encoding": read_json(run / "encode" / "notes.json"),
        "versions": versions(),
        "configs": {stage: config for stage, config in configs.items() if config},
    }


def stages_in(run: Path) -> list[str]:
    """The stages that have a folder in a run, in the order they run."""
    found = {path.name for path in run.iterdir() if path.is_dir()} if run.is_dir() else set()
    found -= {"pipeline", "report", "chat"}
    return [stage for stage in ORDER if stage in found] + sorted(found - set(ORDER))


def metrics(path: Path, stage: str) -> Facts | None:
    """The curves of a stage, and its last value of everything; None where it logged nothing.

    A resumed run has logged some steps twice: the later line counts. A line that a crash cut short is
    skipped, and so are numbers that are none (NaN), which JSON could not hold.
    """
    rows: dict[float, Facts] = {}
    for line in text(path).splitlines():
        try:
            row = json.loads(line)
            numbers = {name: value for name, value in row.items() if is_number(value)}
            rows.setdefault(row["step"], {}).update(numbers)
        except (ValueError, TypeError, KeyError):
            continue
    if not rows:
        return None
    last: Facts = {}
    for step in sorted(rows):
        last |= rows[step]
    curves = {}
    for name, (title, units) in CURVES.items():
        lines = []
        for label, metric in (("training", name), ("held out", f"validation/{name.removesuffix('/mean')}")):
            points = [(step, rows[step][metric]) for step in sorted(rows) if metric in rows[step]]
            if points:
                lines.append(Line.of(label, *zip(*points, strict=True)))
        if lines:
            unit = units.get(stage, "nats per token") if isinstance(units, dict) else units
            curves[name] = asdict(Plot(title, unit, lines))
    return {"last": last, "curves": curves}


def newest_answers(path: Path, most: int = 4) -> list[Facts]:
    """What a stage that samples answered last: to held-out prompts, or, where there are none, to others."""
    found: dict[str, list[Facts]] = {}
    for line in text(path).splitlines():
        try:
            row = json.loads(line)
            newest = found.setdefault(row["of"], [])
            if newest and newest[0]["step"] != row["step"]:
                newest.clear()
            newest.append(row)
        except (ValueError, TypeError, KeyError):
            continue
    return (found.get("held out") or found.get("rollout") or [])[:most]


def is_number(value: Any) -> bool:
    """Whether it is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def versions() -> dict[str, str]:
    """What the report was written with: this machine's software and cores."""
    found = {"megachat": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found | {"system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"}


def read_json(path: Path) -> Any:
    """The contents of a JSON file; {} where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); run its stage again") from None


def text(path: Path) -> str:
    """The contents of a file; "" where there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
