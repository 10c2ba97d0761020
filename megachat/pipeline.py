"""STAGE pipeline: every stage in order, each in a process of its own, skipping what has finished.

A process of its own, because DeepSpeed keeps tensor-parallel state in globals that the next stage would trip
over.
"""

import json
import subprocess
import sys
import time
from typing import ClassVar

from pydantic import field_validator, model_validator

from megachat.config import ConfigError, compose
from megachat.log import say
from megachat.parallel.mesh import passing_on_signals
from megachat.run import Stage, finished
from megachat.stages import did_you_mean
from megachat.stages import stages as known_stages


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

    @field_validator("stages")
    @classmethod
    def _known(cls, stages: list[str]) -> list[str]:
        if not stages:
            raise ValueError("no stage to run")
        known = known_stages()
        if unknown := [stage for stage in stages if stage not in known]:
            hint = did_you_mean(unknown[0], known, f"there are {', '.join(known)}")
            raise ValueError(f"no stage {unknown[0]!r}; {hint}")
        return stages

    @model_validator(mode="after")
    def _overrides_reach_a_stage(self) -> "Pipeline":
        if unknown := [stage for stage in self.overrides if stage not in self.stages]:
            hint = did_you_mean(unknown[0], self.stages, "name one of those")
            raise ValueError(
                f"overrides.{unknown[0]}: no such stage among stages=[{','.join(self.stages)}]; {hint}"
            )
        return self

    def execute(self) -> None:
        """Runs the stages; every config is checked before the first one starts."""
        commands = {stage: [stage, *self._overrides(stage)] for stage in self.stages}
        mistakes = []
        for stage, command in commands.items():
            try:
                Stage.of(compose(stage, command[1:]))
            except ConfigError as error:
                mistakes.append(f"{stage}: {error}")
        if mistakes:
            raise ConfigError("\n".join(mistakes))
        began = time.monotonic()
        for number, (stage, command) in enumerate(commands.items(), 1):
            say(f"[{number}/{len(commands)}] {stage}")
            child = subprocess.Popen([sys.executable, "-m", "megachat", *command])
            with passing_on_signals([child]):
                code = child.wait()
            if code:
                say(
                    f"pipeline: {stage} failed; `megachat {' '.join(command)}` repeats it, "
                    "the same pipeline goes on from there"
                )
                sys.exit(code)
            if stage != "report" and not finished(self.run / stage):
                say(f"pipeline: {stage} was stopped before its end; the same command goes on from there")
                sys.exit(130)  # a script must not take it for a success
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
        shared += [f"run={self.run}", f"inputs={self.inputs}", f"seed={self.seed}"]
        shared += [f"log.{name}={value}" for name, value in self.log]
        return [*shared, *self.overrides.get(stage, [])]
