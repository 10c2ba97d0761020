"""STAGE pipeline: every stage in order, each in a process of its own, skipping what has finished.

A process of its own, because DeepSpeed keeps tensor-parallel state in globals that the next stage would trip
over.
"""

import json
import os
import subprocess
import sys
import time
from typing import ClassVar

from megachat.config import compose
from megachat.log import say
from megachat.run import Stage, finished


class Pipeline(Stage):
    """From raw text to a model to talk to."""

    name: ClassVar[str] = "pipeline"
    recorded: ClassVar[bool] = False

    stages: list[str]
    """The stages to run, in order."""
    overrides: dict[str, list[str]]
    """Overrides for single stages, such as {pretrain: [optimizer.lr=1e-3]}."""
    recipe: str | None
    """The experiment whose settings all stages take; `experiment=quickstart` on the command line sets it."""

    def execute(self) -> None:
        """Runs the stages; every config is checked before the first one starts."""
        commands = {stage: [stage, *self._overrides(stage)] for stage in self.stages}
        for stage, command in commands.items():
            Stage.of(compose(stage, command[1:]))
        began = time.monotonic()
        for number, (stage, command) in enumerate(commands.items(), 1):
            say(f"[{number}/{len(commands)}] {stage}")
            environment = os.environ | {"WANDB_RUN_GROUP": self.run.name}
            code = subprocess.run(
                [sys.executable, "-m", "megachat", *command], env=environment, check=False
            ).returncode
            if code:
                say(
                    f"pipeline: {stage} failed; `megachat {' '.join(command)}` repeats it, "
                    "the same pipeline goes on from there"
                )
                sys.exit(code)
            if stage not in ("report",) and not finished(self.run / stage):
                say(f"pipeline: {stage} was stopped before its end; the same command goes on from there")
                sys.exit(0)
        say(f"pipeline: {time.monotonic() - began:.0f} s")
        self._end()

    def _end(self) -> None:
        """A sample dialogue of the newest chat model, and where to look."""
        samples = self.run / "evaluate" / "samples.json"
        if samples.is_file():
            *_, last = json.loads(samples.read_text(encoding="utf-8"))
            say(f"\nA sample of `{last['stage']}`:")
            for turn in last["turns"]:
                say(f"  {turn['role']:>9}  {turn['text']}")
        if (report := self.run / "report.html").is_file():
            say(f"\nThe report:  {report}\nTo talk:     megachat chat run={self.run}")

    def _overrides(self, stage: str) -> list[str]:
        shared = [f"experiment={self.recipe}"] if self.recipe else []
        places = (
            [f"run={self.run}", f"inputs={self.inputs}"] if self.inputs != self.run else [f"run={self.run}"]
        )
        return [
            *shared,
            *places,
            f"seed={self.seed}",
            f"log.wandb={self.log.wandb}",
            *self.overrides.get(stage, []),
        ]
