"""STAGE import_deepspeed: what somebody trained with DeepSpeed becomes a run's `pretrain` stage.

It reads the checkpoints of `engine.save_checkpoint` at any ZeRO stage, and those of `ds_to_universal`, and
writes one of ours: weights, moments, step. Then `megachat pretrain run=... resume=any` goes on from there in
any layout, with the data read from their beginning, and later stages and `chat` find a trained model.
The model is ours, so theirs must be the same architecture; names may differ (`rename`).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import field_validator
from torch import Tensor

from megachat.files import replacing, write_json
from megachat.log import say
from megachat.model.gpt import GPTConfig
from megachat.parallel.checkpoint import LATEST, architecture, steps, write_manifest
from megachat.parallel.deepspeed_checkpoint import WEIGHT, Source, open_source
from megachat.parallel.saving import write_tensors
from megachat.run import Stage
from megachat.tokenizer.tokenizer import FILE, Tokenizer
from megachat.train.loop import Progress

FRESH = ("exp_avg", "exp_avg_sq", "momentum_buffer")
"""What `pretrain` needs to go on, with any optimizer, where nothing was saved of it."""


class ImportDeepSpeed(Stage):
    """Take over a model that DeepSpeed saved."""

    name: ClassVar[str] = "import_deepspeed"
    place: ClassVar[str] = "pretrain"

    path: Path | None
    """The folder given to `save_checkpoint`, or one of the checkpoints in it, or a universal one."""
    tag: str | None
    """Which of the folder's checkpoints; null takes the one that its `latest` names."""
    model: GPTConfig
    """The shape of the model; its vocabulary is the tokenizer's."""
    moments: bool
    """Whether the optimizer's moments come along. Without, they begin at zero, as in a new run."""
    rename: list[tuple[str, str]]
    """Pairs of a pattern and what takes its place in the names of their parameters, one after the other:
    rename=[["^module[.]", ""], ["^h[.]", "blocks."]]"""
    ignore: list[str]
    """Patterns of (renamed) parameters there that this model does without."""

    @field_validator("ignore", "rename")
    @classmethod
    def _patterns(cls, value: list[str] | list[tuple[str, str]]) -> list[str] | list[tuple[str, str]]:
        for one in value:
            pattern, replacement = (one, "") if isinstance(one, str) else one
            try:
                re.sub(pattern, replacement, "")
            except re.error as error:
                raise ValueError(f"{one!r} is no regular expression: {error}") from None
        return value

    def reads(self) -> list[str]:
        """The tokenizer that their model was trained with."""
        return ["tokenizer"]

    def execute(self) -> None:
        """Writes the checkpoint."""
        if self.path is None:
            raise ValueError("path=... is to name the folder that DeepSpeed's save_checkpoint wrote to")
        checkpoints = self.folder / "checkpoints"
        if found := steps(checkpoints):
            raise ValueError(f"{found[-1]} is of a training that has not finished; give another run=...")
        tokenizer = Tokenizer.load(self.input("tokenizer"))
        model = self.model.blueprint(tokenizer.vocab).model
        expected = {name: parameter.shape for name, parameter in model.named_parameters()}
        source = open_source(self.path, self.tag, self.moments)
        theirs = matched(source, list(expected), self.rename, self.ignore)
        if source.moments and (frozen := source.frozen & set(theirs.values())):
            say(f"{self.name}: {len(frozen)} parameters were frozen there; their moments begin at zero")
        facts = {
            "stage": self.place,
            "fingerprint": self.fingerprint(),
            "tokenizer": tokenizer.sha256,
            "architecture": {"model": architecture(model)},
            "optimizer_steps": {"model": source.optimizer_steps if self.moments else 0},
            "progress": asdict(Progress(step=source.step)),
            "imported": str(source.path.resolve()),
        }
        target = checkpoints / f"step-{source.step:08d}"
        with replacing(target) as temporary:
            temporary.mkdir()
            files = write_tensors(temporary, tensors(source, theirs, expected))
            write_manifest(temporary, facts | {"files": files})
        write_json(checkpoints / LATEST, {"checkpoint": target.name, "step": source.step})
        tokenizer.save(self.folder / FILE)
        numbers = sum(shape.numel() for shape in expected.values())
        say(
            f"{self.name}: {numbers / 1e6:,.1f} M weights of step {source.step}, with "
            f"{' and '.join(source.moments) or 'no moments'}, are in {target}; "
            f"`megachat pretrain run={self.run} resume=any ...` goes on from there"
        )


def matched(
    source: Source, expected: Sequence[str], rename: Sequence[tuple[str, str]], ignore: Sequence[str]
) -> dict[str, str]:
    """Which of their names is each of our parameters'. ValueError if one is missing, or left over."""
    theirs: dict[str, str] = {}
    aliases: dict[str, str] = {}
    for name in [*source.parameters, *source.shared]:
        ours = name
        for pattern, replacement in rename:
            ours = re.sub(pattern, replacement, ours)
        if any(re.search(pattern, ours) for pattern in ignore):
            continue
        if name in source.shared:
            aliases[ours] = source.shared[name]
        elif ours in theirs:
            raise ValueError(
                f"{source.path}: {theirs[ours]} and {name} would both be {ours}; change rename=..."
            )
        else:
            theirs[ours] = name
    missing = [name for name in expected if name not in theirs and name not in aliases]
    extra = [name for name in theirs if name not in expected]
    if missing:
        hint = f", and has {_some(extra)}; rename=... can say which is which" if extra else ""
        raise ValueError(f"{source.path} lacks {_some(missing)} of this model{hint}")
    if extra:
        raise ValueError(
            f"{source.path} has {_some(extra)}, for which this model has no place; change model=..., "
            "or leave them out with ignore=[...]"
        )
    return {name: theirs.get(name) or aliases[name] for name in expected}


def tensors(
    source: Source, theirs: Mapping[str, str], expected: Mapping[str, torch.Size]
) -> Iterator[tuple[str, Tensor]]:
    """What goes into the checkpoint, one tensor at a time."""
    for name, shape in expected.items():
        for kind in (WEIGHT, *source.moments):
            yield f"model/{kind}.{name}", source.read(theirs[name], kind, shape)
        for kind in () if source.moments else FRESH:
            yield f"model/{kind}.{name}", torch.zeros(shape)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
