"""A checkpoint is logical tensors: one full tensor per parameter and per optimizer moment, in safetensors.

No layout is in it, so a run saved on any number of ranks at any ZeRO stage and tensor degree loads at any
other. `step-N/manifest.json` has the size and sum of every file of tensors, and one over itself; what differs
is damaged, and is set aside in `damaged/`. Nothing is ever unpickled. `saving.py` writes them.
"""

import errno
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from megachat import __version__
from megachat.config import ConfigError, decode
from megachat.files import patiently, sha256, write_json
from megachat.log import say
from megachat.model.blueprint import Blueprint, Read
from megachat.model.gpt import GPT
from megachat.model.heads import Scalar
from megachat.model.lora import Adapted, LoRA, merged
from megachat.parallel.mesh import Mesh
from megachat.parallel.preflight import read_again
from megachat.tokenizer.tokenizer import Tokenizer

FORMAT = 2
"""Of the manifest. The first one listed the tensors of a file without their shapes, and had no sum."""
MANIFEST = "manifest.json"
LATEST = "latest.json"
"""Beside the checkpoints: which of them is the newest that is whole."""
SAVED = "saved.json"
"""In the stage's folder, beside `checkpoints/`: that something was saved, should all of it disappear."""

REPLACED = ".replaced.tmp"
"""What a checkpoint's name ends in while another of the same step takes its place."""


def architecture(model: nn.Module) -> dict[str, Any]:
    """What it takes to build the model again without its weights."""
    body = trunk(model)
    kind = type(body.config)
    lora = next((module.lora for module in model.modules() if isinstance(module, Adapted)), None)
    return {
        "head": "scalar" if isinstance(model, Scalar) else "language",
        "vocab": body.vocab,
        **({"scores": [model.mean, model.deviation]} if isinstance(model, Scalar) else {}),
        "config": {"_target_": f"{kind.__module__}.{kind.__qualname__}", **body.config.model_dump()},
        **({} if lora is None else {"lora": lora.model_dump()}),
    }


def trunk(model: nn.Module) -> GPT:
    """The language model itself, or the one under a scalar head."""
    body = model.trunk if isinstance(model, Scalar) else model
    assert isinstance(body, GPT), f"do not know what a {type(model).__name__} is made of"
    return body


def build(description: Mapping[str, Any]) -> nn.Module:
    """The model that `architecture` described, without weights: on the meta device.

    What was adapted (`lora`) is a plain model again.
    """
    config = decode({"moe": None} | description["config"])  # older ones have none
    body = config.blueprint(description["vocab"]).model
    with torch.device("meta"):
        if description["head"] != "scalar":
            return body
        return Scalar(body, *description.get("scores", (0.0, 1.0)))  # older ones have none


def steps(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    named = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted((path for path in named if path.is_dir()), key=lambda path: int(path.name[5:]))


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes `manifest.json`, with a sum over what it says. `facts["files"]` is from `write_tensors`."""
    manifest = {"format": FORMAT, "megachat": __version__, **facts}
    write_json(folder / MANIFEST, manifest | {"sha256": _sum(manifest)})


def _sum(manifest: Mapping[str, Any]) -> str:
    apart = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(apart, sort_keys=True).encode()).hexdigest()


class TooNew(ValueError):
    """A checkpoint of a later version: it is whole, and this version cannot read it."""


def _check_format(manifest: Any, path: Path) -> None:
    """Before anything else, for a later format may call everything by another name."""
    found = manifest.get("format", 1) if isinstance(manifest, dict) else 1
    if isinstance(found, int) and found > FORMAT:
        raise TooNew(
            f"{path} has format {found}, and megachat {__version__} reads up to {FORMAT}; update megachat"
        )


def _mistake(manifest: Any, path: Path) -> str:
    """What is wrong with a manifest, or nothing. The first format had no sum, and no shapes."""
    match manifest:
        case {"files": dict(files), "progress": {"step": int(step)}, "architecture": dict()} if files:
            pass
        case _:
            return "it lacks files, progress, or architecture"
    if manifest.get("format", 1) not in (1, FORMAT):
        return f"it has format {manifest['format']!r}"
    if manifest.get("format", 1) == FORMAT and manifest.get("sha256") != _sum(manifest):
        return "it has been changed since it was written: its own sha256 differs"
    if path.name.startswith("step-") and path.name != f"step-{step:08d}":
        return f"it is of step {step}"
    for name, facts in files.items():
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            return f"{name!r} is not the name of a file of tensors in that folder"
        match facts:
            case {"bytes": int(), "sha256": str(), "tensors": list() | dict()}:
                pass
            case _:
                return f"of {name} it lacks bytes, sha256, or tensors"
    return ""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    manifest: dict[str, Any]

    @staticmethod
    def open(path: Path) -> "Checkpoint":
        """Reads the manifest and compares every file's size with it.

        A ValueError names what is damaged (TooNew: nothing is); an OSError comes from a disk that does not
        answer.
        """
        try:
            text = patiently((path / MANIFEST).read_bytes)
            manifest = json.loads(text.decode("utf-8"))
            _check_format(manifest, path)
            if mistake := _mistake(manifest, path):
                raise ValueError(f"{path / MANIFEST} is damaged: {mistake}")
            for name, facts in manifest["files"].items():
                size = patiently((path / name).stat).st_size
                if size != facts["bytes"]:
                    raise ValueError(
                        f"{path / name} has {size:,} bytes, its manifest says {facts['bytes']:,}"
                    )
        except (FileNotFoundError, NotADirectoryError, RecursionError) as error:
            raise ValueError(f"{path} is not a complete checkpoint: {error}") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path / MANIFEST} is damaged: it is not JSON: {error}") from None
        return Checkpoint(path, manifest)

    @property
    def mark(self) -> str:
        """A sum that tells its tensors from those of any other; the files themselves need not be read."""
        return _sum({name: facts["sha256"] for name, facts in self.manifest["files"].items()})

    def verify(self) -> None:
        """Compares the sha256 of all files with the manifest."""
        if path := self.first_damaged():
            raise ValueError(_other_sum(path))

    def first_damaged(self, share: int = 0, shares: int = 1) -> Path | None:
        """The first file (of this share of them) whose sha256 is not the manifest's, if there is one."""
        paths = [self.path / name for name in sorted(self.manifest["files"])[share::shares]]
        return next((path for path in paths if not self.whole(path)), None)

    def whole(self, path: Path) -> bool:
        """Whether this process reads of a file what was written."""
        return bool(patiently(partial(sha256, path)) == self.manifest["files"][path.name]["sha256"])

    def verify_together(self, mesh: Mesh) -> None:
        """`verify`, each rank its share; what one of them finds is raised on all.

        An OSError says that a rank cannot read, or misreads what others can: nothing is damaged then.
        """
        wrong, silent = None, ""
        try:
            wrong = self.first_damaged(mesh.rank, mesh.world)
        except OSError as error:  # a file that rank 0 sees and this rank does not is no damage, either
            silent = f"rank {mesh.rank}: {error}"
        if silent := next(filter(None, mesh.gather(silent)), ""):
            raise _unreadable(self.path, silent)
        if path := read_again(mesh, wrong, self.whole):
            raise ValueError(_other_sum(path))

    def reader(self, role: str) -> Read:
        """A function from a tensor's name (`weight.embed.weight`) to the tensor, or to a part of it."""
        where = self._where()

        def read(name: str, *index: slice) -> Tensor:
            with self._tensors(where, f"{role}/{name}") as file:
                if not index:
                    return file.get_tensor(f"{role}/{name}")
                return file.get_slice(f"{role}/{name}")[index]

        return read

    def check_shapes(self, role: str, expected: Mapping[str, torch.Size]) -> None:
        """Refuses to go on with a model that has other tensors."""
        where = self._where()
        for name, shape in expected.items():
            with self._tensors(where, f"{role}/{name}") as file:
                found = file.get_slice(f"{role}/{name}").get_shape()
            if tuple(found) != tuple(shape):
                raise ValueError(
                    f"{self.path} has {role}/{name} in shape {tuple(found)}, and this model in "
                    f"{tuple(shape)}: it was written by another architecture"
                )

    def _where(self) -> dict[str, str]:
        return {tensor: name for name, facts in self.manifest["files"].items() for tensor in facts["tensors"]}

    @contextmanager
    def _tensors(self, where: Mapping[str, str], name: str) -> Iterator[Any]:
        """The open file that holds a tensor."""
        role, _, rest = name.partition("/")
        kind, _, parameter = rest.partition(".")
        if name not in where and f"{role}/weight.{parameter}" in where:
            raise ValueError(
                f"{self.path} holds no {kind} of {role}/{parameter}: it was written with another optimizer; "
                "set optimizer=... back"
            )
        if name not in where:
            raise ValueError(f"{self.path} holds no tensor {name}: it was written by another architecture")
        path = self.path / where[name]
        try:
            with safe_open(path, "pt") as file:
                yield file
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from None

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Refuses a tokenizer other than the one the model was trained with."""
        trained_with = self.manifest["tokenizer"]
        if trained_with != tokenizer.sha256:
            raise ValueError(
                f"{self.path} was trained with tokenizer {trained_with[:12]}, "
                f"but this run's is {tokenizer.sha256[:12]}; use the run folder "
                "that the checkpoint came from, or train the stages after `tokenizer` again"
            )


def newest(folder: Path, mesh: Mesh, fence: Callable[[], None] = lambda: None) -> Checkpoint | None:
    """The newest checkpoint that is whole, the same on every rank; None if none was ever written.

    Rank 0 says what there is (network file systems do not show all nodes the same at once), all ranks verify.
    Damaged ones are named and moved to `damaged/`. `fence` raises, on all ranks, where this process may not
    change the folder.
    """
    fence()
    mesh.lead(lambda: _return_replaced(folder))
    passed_over = False
    for name in reversed(mesh.lead(lambda: [path.name for path in steps(folder)])):
        checkpoint, problem = _verified(folder / name, mesh)
        if checkpoint:
            if passed_over and mesh.rank == 0:
                with suppress(OSError):  # a full disk: nobody but a person reads it
                    write_json(folder / LATEST, {"checkpoint": name, "step": int(name[5:])})
            return checkpoint
        passed_over = True
        fence()  # it takes long to read them all, and a newer start deletes the oldest
        aside = folder / "damaged" / name
        if mesh.rank == 0:
            while aside.exists():  # written again since, and damaged again
                aside = aside.with_name(f"{aside.name}-again")
            aside.parent.mkdir(exist_ok=True)
            (folder / name).rename(aside)
        say(f"ALARM: a damaged checkpoint is passed over, and now in {aside.parent}: {problem}")
    if told := mesh.lead(lambda: _evidence(folder)):
        raise ValueError(
            f"{told}, but {folder} holds no checkpoint that is whole; put one back, "
            f"or delete {folder.parent} to start over"
        )
    return None


def _return_replaced(folder: Path) -> None:
    """A save that was killed just before a new checkpoint took the name of an old one gives it back."""
    for left in folder.glob(f"step-*{REPLACED}"):
        whole = left.with_name(left.name.removesuffix(REPLACED))
        if not whole.exists():
            left.rename(whole)


def _verified(path: Path, mesh: Mesh) -> tuple[Checkpoint | None, str]:
    """The checkpoint, or what is damaged in it. Raises on every rank when one of them cannot read."""
    checkpoint, newer, damaged, silent = None, "", "", ""
    try:
        if mesh.rank == 0:
            checkpoint = Checkpoint.open(path)
    except TooNew as error:
        newer = str(error)
    except ValueError as error:
        damaged = str(error)
    except OSError as error:
        silent = str(error)
    checkpoint, newer, damaged, silent = mesh.first((checkpoint, newer, damaged, silent))
    if newer:
        raise TooNew(newer)
    if silent:
        raise _unreadable(path, silent)
    try:
        if checkpoint:
            checkpoint.verify_together(mesh)
    except ValueError as error:
        damaged = str(error)
    return (None if damaged else checkpoint), damaged


def _other_sum(path: Path) -> str:
    return f"{path} is damaged: its sha256 differs from the manifest's"


def _unreadable(path: Path, why: str) -> OSError:
    return OSError(errno.EIO, f"cannot be read ({why}); nothing was changed", str(path))


def _evidence(folder: Path) -> str:
    """What says that there must be a checkpoint: one is missing that was written, or all are damaged."""
    damaged = len(list(folder.glob("damaged/*")))
    if damaged:
        return f"all checkpoints are damaged ({damaged} are in {folder / 'damaged'})"
    for path in (folder.parent / SAVED, folder / LATEST):
        if path.exists():
            return f"{path} tells of a checkpoint that was written"
    return ""


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


def blueprint(checkpoint: Checkpoint, role: str) -> Blueprint[nn.Module]:
    """A model of the checkpoint, of which no weight has been read yet; what LoRA has learnt is in them."""
    if role not in checkpoint.manifest["architecture"]:
        raise ValueError(
            f"{checkpoint.path} has no {role!r}; it has {sorted(checkpoint.manifest['architecture'])}"
        )
    description, read = checkpoint.manifest["architecture"][role], checkpoint.reader(role)
    try:
        model = build(description)
        if "lora" in description:
            read = merged(read, LoRA(**description["lora"]))
    except (ConfigError, ValidationError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{checkpoint.path / MANIFEST} does not describe a model: {error}") from None
    return Blueprint(model, read)


def load_model(
    stage: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    role: str = "model",
    mesh: Mesh | None = None,
) -> Loaded:
    """The newest model of a training stage's folder, in eval mode, with the tokenizer that lies beside it.

    With a mesh all its ranks call this, and share the work of verifying.
    """
    checkpoint = latest(stage)
    if mesh is None:
        checkpoint.verify()
    else:
        checkpoint.verify_together(mesh)
    tokenizer = Tokenizer.load(stage)
    checkpoint.check_tokenizer(tokenizer)
    return Loaded(
        blueprint(checkpoint, role).whole(device, dtype).eval(),
        tokenizer,
        checkpoint.manifest["progress"]["step"],
    )
