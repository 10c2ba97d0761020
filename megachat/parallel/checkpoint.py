"""A checkpoint is logical tensors: one full tensor per parameter and per optimizer moment, in safetensors.

No layout is in it, so a run saved on any number of ranks at any ZeRO stage and tensor degree loads at any
other. It appears whole or not at all: every rank writes and fsyncs its files in `step-N.tmp`, rank 0 adds a
manifest of sizes and sha256 sums, the folder is renamed, and only then does `latest.json` name it to whoever
asks from outside. Nothing is ever unpickled.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from megachat import __version__
from megachat.config import decode
from megachat.files import fsync, sha256, write_json
from megachat.log import say
from megachat.model.gpt import GPT
from megachat.model.heads import Scalar
from megachat.parallel.engine import Engine
from megachat.parallel.mesh import Mesh
from megachat.tokenizer.tokenizer import Tokenizer

FILE_BYTES = 2**30
"""A writer flushes a file whenever it holds this much, which bounds host memory."""


def architecture(model: nn.Module) -> dict[str, Any]:
    """What it takes to build the model again without its weights."""
    body = trunk(model)
    kind = type(body.config)
    return {
        "head": "scalar" if isinstance(model, Scalar) else "language",
        "vocab": body.vocab,
        "config": {"_target_": f"{kind.__module__}.{kind.__qualname__}", **body.config.model_dump()},
    }


def trunk(model: nn.Module) -> GPT:
    """The language model itself, or the one under a scalar head."""
    body = model.trunk if isinstance(model, Scalar) else model
    assert isinstance(body, GPT), f"do not know what a {type(model).__name__} is made of"
    return body


def build(description: Mapping[str, Any]) -> nn.Module:
    """The model that `architecture` described, with fresh weights."""
    body = decode(description["config"]).build(description["vocab"])
    return Scalar(body) if description["head"] == "scalar" else body


def save(
    folder: Path,
    engines: Mapping[str, Engine],
    progress: Mapping[str, Any],
    about: Mapping[str, Any],
    mesh: Mesh,
    keep: int,
) -> bool:
    """Writes `folder/step-N` with all engines' weights and moments; every rank calls it.

    Returns whether it worked. `about` is recorded in the manifest (`architecture`, `tokenizer`,
    `fingerprint`). Only the newest `keep` stay. A failure (a full disk, say) is reported, leaves nothing
    behind, and leaves older checkpoints alone.
    """
    name = f"step-{progress['step']:08d}"
    temporary = folder / f"{name}.tmp"
    writer = _Writer(temporary, mesh)
    if mesh.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            writer.problem = str(error)
    mesh.barrier()
    for role, engine in engines.items():
        for tensor_name, tensor in engine.logical():
            writer.add(f"{role}/{tensor_name}", tensor)
    writer.flush()
    parts = mesh.gather(writer.files)
    failures = [problem for problem in mesh.gather(writer.problem) if problem]
    if mesh.rank == 0 and not failures:
        try:
            files = {file: facts for part in parts for file, facts in part.items()}
            write_json(
                temporary / "manifest.json",
                {"megachat": __version__, **about, "progress": dict(progress), "files": files},
            )
            if (folder / name).exists():
                shutil.rmtree(folder / name)
            os.replace(temporary, folder / name)
            fsync(folder)
            write_json(folder / "latest.json", {"checkpoint": name})
        except OSError as error:
            failures.append(str(error))
    failed = mesh.any(bool(failures))
    if mesh.rank == 0:
        if failed:
            shutil.rmtree(temporary, ignore_errors=True)
            say(
                f"ALARM: the checkpoint of step {progress['step']} could not be written: {failures[0]}; "
                f"free some space in {folder}"
            )
        else:
            for old in steps(folder)[:-keep]:
                try:
                    shutil.rmtree(old)
                except OSError as error:
                    say(f"the old checkpoint {old} could not be deleted: {error}")
    mesh.barrier()
    return not failed


class _Writer:
    """Deals tensors over the ranks by size and writes this rank's share.

    It remembers the first problem instead of raising.
    """

    def __init__(self, folder: Path, mesh: Mesh) -> None:
        self.folder, self.mesh = folder, mesh
        self.load = [0] * mesh.world
        self.held: dict[str, Tensor] = {}
        self.files: dict[str, dict[str, Any]] = {}
        self.problem = ""

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes the tensor if it is this rank's turn."""
        owner = self.load.index(min(self.load))
        self.load[owner] += tensor.nbytes
        if owner == self.mesh.rank:
            self.held[name] = tensor.detach().to("cpu", copy=True).contiguous()
            if sum(held.nbytes for held in self.held.values()) >= FILE_BYTES:
                self.flush()

    def flush(self) -> None:
        """Writes and fsyncs what is held."""
        if not self.held or self.problem:
            self.held = {}
            return
        path = self.folder / f"tensors-{self.mesh.rank:05d}-{len(self.files):05d}.safetensors"
        try:
            save_file(self.held, path)
            fsync(path)
            self.files[path.name] = {
                "bytes": path.stat().st_size,
                "sha256": sha256(path),
                "tensors": sorted(self.held),
            }
        except (OSError, SafetensorError) as error:
            self.problem = f"{path.name}: {error}"
        self.held = {}


def steps(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".tmp" and path.is_dir())


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    manifest: dict[str, Any]

    @staticmethod
    def open(path: Path) -> "Checkpoint":
        """Reads the manifest and compares every file's size with it."""
        try:
            manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
            for name, facts in manifest["files"].items():
                size = (path / name).stat().st_size
                if size != facts["bytes"]:
                    raise ValueError(
                        f"{path / name} has {size:,} bytes, its manifest says {facts['bytes']:,}"
                    )
        except (OSError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a complete checkpoint: {error}") from None
        return Checkpoint(path, manifest)

    def verify(self, share: int = 0, shares: int = 1) -> None:
        """Compares the sha256 of the files (of this share of them) with the manifest."""
        for name in sorted(self.manifest["files"])[share::shares]:
            if sha256(self.path / name) != self.manifest["files"][name]["sha256"]:
                raise ValueError(f"{self.path / name} is damaged: its sha256 differs from the manifest's")

    def reader(self, role: str) -> Callable[[str], Tensor]:
        """A function from a tensor's name (`weight.embed.weight`) to the tensor."""
        where = {
            tensor: name for name, facts in self.manifest["files"].items() for tensor in facts["tensors"]
        }

        def read(name: str) -> Tensor:
            if f"{role}/{name}" not in where:
                raise ValueError(
                    f"{self.path} holds no tensor {role}/{name}: it was written by another architecture"
                )
            with safe_open(self.path / where[f"{role}/{name}"], "pt") as file:
                return file.get_tensor(f"{role}/{name}")

        return read

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Refuses a tokenizer other than the one the model was trained with."""
        trained_with = self.manifest["tokenizer"]
        if trained_with != tokenizer.sha256:
            raise ValueError(
                f"{self.path} was trained with tokenizer {trained_with[:12]}, "
                f"but this run's is {tokenizer.sha256[:12]}; use the run folder "
                "that the checkpoint came from, or train the stages after `tokenizer` again"
            )


def newest(folder: Path, mesh: Mesh) -> Checkpoint | None:
    """The newest checkpoint that every rank finds whole, or None if there is none.

    Damaged ones are named and passed over.
    """
    candidates = steps(folder)
    for path in reversed(candidates):
        problem, checkpoint = "", None
        try:
            checkpoint = Checkpoint.open(path)
            checkpoint.verify(mesh.rank, mesh.world)
        except ValueError as error:
            problem = str(error)
        problems = [text for text in mesh.gather(problem) if text]
        if not problems:
            return checkpoint
        say(f"passing over a damaged checkpoint: {problems[0]}")
    if candidates:
        raise ValueError(
            f"all {len(candidates)} checkpoints in {folder} are damaged; delete that folder to start over"
        )
    return None


@dataclass(frozen=True)
class Loaded:
    """A trained model, ready for inference, and its tokenizer."""

    model: nn.Module
    tokenizer: Tokenizer
    step: int


def latest(stage: Path) -> Checkpoint:
    """The checkpoint that a training stage's folder (`runs/x/sft`) offers to others."""
    found = steps(stage / "checkpoints")
    if not found:
        raise ValueError(f"{stage} holds no checkpoint; run `megachat {stage.name} run={stage.parent}` first")
    return Checkpoint.open(found[-1])


def load_weights(
    checkpoint: Checkpoint, role: str, device: torch.device | str, dtype: torch.dtype | None
) -> nn.Module:
    """A model of the checkpoint with its weights."""
    if role not in checkpoint.manifest["architecture"]:
        raise ValueError(
            f"{checkpoint.path} has no {role!r}; it has {sorted(checkpoint.manifest['architecture'])}"
        )
    model = build(checkpoint.manifest["architecture"][role])
    read = checkpoint.reader(role)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(read(f"weight.{name}"))
    return model.to(device=device, dtype=dtype)


def load_model(
    stage: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, role: str = "model"
) -> Loaded:
    """The newest model of a training stage's folder, in eval mode, with the tokenizer that lies beside it."""
    checkpoint = latest(stage)
    checkpoint.verify()
    tokenizer = Tokenizer.load(stage)
    checkpoint.check_tokenizer(tokenizer)
    return Loaded(
        load_weights(checkpoint, role, device, dtype).eval(),
        tokenizer,
        checkpoint.manifest["progress"]["step"],
    )
