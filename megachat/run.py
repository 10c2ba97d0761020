"""A run is a folder: `runs/<name>/<stage>/` holds what a stage wrote, and nothing else holds state.

A stage that has finished leaves `done.json` with its fingerprint: a hash of its settings and of the stages it
read. A stage whose fingerprint has not changed need not run again.
"""

import glob
import hashlib
import json
import os
import shutil
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import Field, PrivateAttr, field_validator

from megachat import __version__
from megachat.config import Config, decode, redact
from megachat.files import replacing, sha256, write_json
from megachat.log import Log, say

APART = (
    "done.json", "config.yaml", "metrics.jsonl", "samples.jsonl", "skipped.jsonl", "wandb.json", "notes.json",
    "restarts.json", "refused.json", "heartbeat.json", "attempt.json", "saved.json", "trace.json.gz",
    "profile.md",
)  # fmt: skip
"""Files that tell how a stage went and are no output: later stages do not depend on them."""


class Superseded(ValueError):
    """A newer start of the same stage has taken over: this one must write nothing more."""


class Stage(Config):
    """One step of the pipeline. A subclass adds its settings, `reads`, and `execute`."""

    run: Path
    """The run folder this stage writes to, as `<run>/<stage>/`."""
    inputs: Path
    """The run folder to take finished stages from that its own does not have; the same one unless given."""
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    """Everything random follows from it."""
    log: Log
    """What is printed and recorded."""

    name: ClassVar[str]
    """What it is called on the command line, in `conf/`, and in the run folder."""
    place: ClassVar[str | None] = None
    """The folder of the run that it writes, where that is not called as it is."""
    trains: ClassVar[bool] = False
    """Whether it starts one process per visible GPU, and does its own bookkeeping on rank 0."""
    recorded: ClassVar[bool] = True
    """Whether it leaves a folder and is skipped when nothing has changed."""
    neutral: ClassVar[tuple[str, ...]] = ()
    """Settings that do not change what it makes, besides `run`, `inputs` and `log`."""

    _tree: dict[str, Any] = PrivateAttr(default_factory=dict)
    _aside: Path | None = PrivateAttr(default=None)
    """Where `begin` has moved what other settings had made."""

    @field_validator("run", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if value == "":
            raise ValueError("it is empty; name a folder, as in run=runs/main")
        return value

    @classmethod
    def of(cls, tree: dict[str, Any]) -> "Stage":
        """The stage that a composed config describes; it remembers the config."""
        stage: Stage = decode(tree)
        stage._tree = tree
        return stage

    @property
    def whole(self) -> bool:
        """Whether all of it is to be done, and not one step of many."""
        return True

    @property
    def continues(self) -> bool:
        """Whether it goes on from what other settings made, instead of starting over."""
        return False

    def reads(self) -> list[str]:
        """The stages whose output this one needs."""
        return []

    def execute(self) -> None:
        """Does the work."""
        raise NotImplementedError

    @property
    def folder(self) -> Path:
        """Where this stage writes."""
        return self.run / (self.place or self.name)

    @property
    def tree(self) -> dict[str, Any]:
        """The composed config this stage was made from, as plain dicts and lists."""
        assert self._tree, "made by hand, not by Stage.of"
        return self._tree

    def source(self, stage: str) -> Path:
        """Where to look for an earlier stage: in this run if it has finished here, else in `inputs`."""
        own = self.run / stage
        return own if finished(own) else self.inputs / stage

    def input(self, stage: str) -> Path:
        """The folder of a finished earlier stage."""
        folder, own = self.source(stage), self.run / stage
        if folder != own and any((own / name).exists() for name in ("config.yaml", "attempt.json")):
            raise ValueError(
                f"{self.name} reads the output of `{stage}`, which was begun in {own} and has not finished; "
                f"run `megachat {stage} run={self.run}` to its end, or delete {own} to read that of {folder}"
            )
        if not finished(folder):
            places = " or ".join(dict.fromkeys([str(self.run), str(self.inputs)]))
            raise ValueError(
                f"{self.name} reads the output of `{stage}`, which has not finished in {places}; "
                f"run `megachat {stage} run={self.run}` first, or name another run with inputs=..."
            )
        return folder

    def fingerprint(self) -> str:
        """Sha256 of the settings that matter and of what the stage reads.

        That is earlier stages, and files called `path(s)`.
        """
        return _digest([__version__, *self._parts()])

    def made_of(self) -> dict[str, Any]:
        """What the fingerprint is of, to be compared with that of another time, without secrets."""
        settings, inputs, files = self._parts()
        sums = {name: _digest(outputs) for name, outputs in inputs.items()}
        return {
            "megachat": __version__,
            "settings": redact(settings),
            "inputs": sums,
            "files": _digest(files),
        }

    def _parts(self) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
        apart = {"run", "inputs", "log", *self.neutral}
        settings = {key: value for key, value in self.tree.items() if key not in apart}
        inputs = {name: finished(self.source(name)).get("outputs") for name in self.reads()}
        return settings, inputs, external(settings)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What has changed from one `Stage.made_of` to another: `optimizer.lr: 0.001 -> 0.003`."""
    old, new = _flat(before["settings"]), _flat(now["settings"])
    lines = [
        f"{key}: {old.get(key, 'not there')} -> {new.get(key, 'not there')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, "not there") != new.get(key, "not there")
    ]
    lines += [
        f"the output of `{name}` has changed"
        for name, digest in now["inputs"].items()
        if before["inputs"].get(name) != digest
    ]
    if before["files"] != now["files"]:
        lines.append("files that the settings name have changed")
    if before["megachat"] != now["megachat"]:
        lines.append(f"megachat: {before['megachat']} -> {now['megachat']}")
    return lines if len(lines) <= 10 else [*lines[:9], f"and {len(lines) - 9} more"]


def _flat(node: Any, path: str = "") -> dict[str, Any]:
    """Settings by their dotted keys; JSON has no tuples, so lists are compared as they read."""
    if not isinstance(node, dict) or not node:
        return {path: str(node) if isinstance(node, list | tuple | dict) else node}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= _flat(value, f"{path}.{key}" if path else str(key))
    return flat


def perform(stage: Stage) -> None:
    """Runs a stage, unless it has finished with the same settings and inputs."""
    try:
        if stage.trains or not stage.recorded or not stage.whole:
            stage.execute()
        elif begin(stage):
            record_config(stage)
            started = time.monotonic()
            stage.execute()
            finish(stage, time.monotonic() - started)
    except Superseded:
        raise
    except BaseException:
        put_back(stage)
        raise


def begin(stage: Stage) -> bool:
    """Makes way for the stage; False when it has finished with the same settings and inputs.

    What other settings made is not deleted but moved to `<run>/replaced/`.
    """
    for name in stage.reads():
        stage.input(name)
    done = finished(stage.folder)
    if done.get("fingerprint") == stage.fingerprint():
        lost = [stage.folder / name for name in done["outputs"] if not (stage.folder / name).exists()]
        if lost and not stage.trains:  # old checkpoints are anybody's to delete
            raise ValueError(
                f"`{stage.name}` has finished, and {lost[0]} is missing; put it back, or delete "
                f"{stage.folder} to make all of it again"
            )
        say(f"{stage.name}: already finished in {stage.folder}, and nothing has changed since")
        return False
    if done and stage.continues:
        (stage.folder / "done.json").unlink()
    elif done:
        aside = stage.run / "replaced" / f"{stage.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        while aside.exists():  # twice in a second
            aside = aside.with_name(f"{aside.name}-again")
        aside.parent.mkdir(parents=True, exist_ok=True)
        stage.folder.rename(aside)
        stage._aside = aside
        changed = differences(done["made_of"], stage.made_of()) if "made_of" in done else []
        listed = "".join(f"\n  {line}" for line in changed)
        say(f"{stage.name}: settings or inputs have changed; what they had made is now in {aside}{listed}")
    return True


def put_back(stage: Stage) -> None:
    """After a failure: what `begin` moved away returns, unless something has been trained in its place."""
    aside = stage._aside
    if aside is None:
        return
    metrics = stage.folder / "metrics.jsonl"
    with suppress(OSError):  # the disk, perhaps, that was the failure
        if metrics.is_file() and metrics.stat().st_size:
            return
        if any(stage.folder.glob("checkpoints/step-*[0-9]")) or not _ours(stage.folder / "attempt.json"):
            return
        shutil.rmtree(stage.folder, ignore_errors=True)
        aside.rename(stage.folder)
        say(f"{stage.name}: nothing has been made in its place, so {aside} is {stage.folder} again")


def _ours(path: Path) -> bool:
    """Whether this process started the last attempt, or none has begun."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return bool((found["host"], found["pid"]) == (socket.gethostname(), os.getpid()))
    except FileNotFoundError:
        return True
    except (ValueError, KeyError, TypeError):
        return False


def refuse(stage: Stage, error: str) -> None:
    """Tells who watches over the ranks of a job that the mistake is the user's: no restart helps."""
    step = os.environ
    if stage.trains and "SLURM_STEP_ID" in step:
        said = {"error": error, "job": step["SLURM_JOB_ID"], "restart": step.get("SLURM_RESTART_COUNT", "0")}
        with suppress(OSError):
            write_json(stage.folder / "refused.json", said)


def record_config(stage: Stage) -> None:
    """Writes down the settings that the stage runs with, but for secrets."""
    with replacing(stage.folder / "config.yaml") as temporary:
        temporary.write_text(
            yaml.safe_dump(redact(stage.tree), sort_keys=False, allow_unicode=True), encoding="utf-8"
        )


def external(node: Any) -> list[str]:
    """Names, sizes and times of the files that settings called `path` or `paths` point at."""
    found: list[str] = []
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("path", "paths", "against"):
                for pattern in value if isinstance(value, list) else [value]:
                    for name in sorted(glob.glob(str(pattern), recursive=True)):
                        below = sorted(glob.glob(f"{glob.escape(name)}/**", recursive=True))
                        for file in filter(os.path.isfile, below if os.path.isdir(name) else [name]):
                            found.append(f"{file} {os.path.getsize(file)} {os.stat(file).st_mtime_ns}")
            else:
                found += external(value)
    elif isinstance(node, list):
        for item in node:
            found += external(item)
    return found


def finished(folder: Path) -> dict[str, Any]:
    """What `done.json` says of a finished stage, or {}."""
    try:
        done: dict[str, Any] = json.loads((folder / "done.json").read_text(encoding="utf-8"))
        return done
    except FileNotFoundError:
        return {}
    except ValueError as error:
        path = folder / "done.json"
        raise ValueError(f"{path} is not JSON ({error}); delete it and run the stage again") from None


def finish(stage: Stage, seconds: float) -> None:
    """Marks the stage as done. `outputs` identifies what it wrote, so that later stages see when it changes.

    Tensor files are not read again: the manifest beside them holds their sha256.
    """
    outputs = {}
    for path in sorted(stage.folder.rglob("*")):
        if path.is_file() and path.name not in APART and path.suffix not in (".safetensors", ".tmp"):
            outputs[str(path.relative_to(stage.folder))] = sha256(path)
    record = {
        "fingerprint": stage.fingerprint(),
        "seconds": round(seconds, 3),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "outputs": outputs,
        "made_of": stage.made_of(),
    }
    write_json(stage.folder / "done.json", record)
