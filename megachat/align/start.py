"""Where alignment starts: the model of a finished stage, to train further or to judge with.

What judges is frozen and comes from that stage's folder on every start, also of a run that goes on: a
reference taken from the policy at a restart would make its KL 0 without a word.
"""

from typing import Any, ClassVar, TypeVar

from pydantic import model_validator
from torch import nn

from megachat.model.blueprint import Blueprint
from megachat.model.gpt import GPT, Block
from megachat.model.heads import Scalar
from megachat.model.lora import LoRA, adapted
from megachat.parallel import checkpoint
from megachat.train.loop import Running, Task

Model = TypeVar("Model", bound=nn.Module)


class Adapting(Task):
    """A stage that trains another one's model on: all of it, or small matrices beside it."""

    exact: ClassVar[bool] = True
    """Whether it compares probabilities, and noise in them would be taken for a difference."""

    lora: LoRA | None
    """Small matrices are trained and the model stays as it is; null: all of it is trained."""

    @model_validator(mode="after")
    def _can_adapt(self) -> "Adapting":
        if self.lora is None:
            return self
        if self.exact and self.lora.dropout:
            raise ValueError(
                f"lora.dropout={self.lora.dropout} is noise, which {self.name} would take for a difference "
                "of probabilities; set lora.dropout=0"
            )
        if self.parallel.expert > 1:
            raise ValueError(
                f"parallel.expert={self.parallel.expert} spreads experts that lora does not train; set "
                "parallel.expert=1, or lora=none"
            )
        if self.parallel.fp8 != "none":
            raise ValueError(
                f"parallel.fp8={self.parallel.fp8} has no use for the small matrices of lora; set "
                "parallel.fp8=none, or lora=none"
            )
        return self

    def trainee(self, start: Blueprint[Model]) -> Blueprint[Model]:
        """What is trained of a model."""
        return start if self.lora is None else adapted(start, self.lora)


def anchored(task: Task, stage: str, run: Running) -> nn.Module:
    """The model of a stage as the frozen reference: a run that goes on must have the one it began with."""
    mark, began = _newest(task, stage, run).mark, run.progress.references
    if began.setdefault(stage, mark) != mark:
        raise ValueError(
            f"{task.name} has trained against another reference until step {run.progress.step}: the model of "
            f"`{stage}` was {began[stage][:12]}, and in {task.input(stage)} is {mark[:12]}; put that model "
            "back, or give another run=... to start over with this one"
        )
    return frozen(language_model(task, stage, run), run)


def language_model(task: Task, stage: str, run: Running) -> Blueprint[GPT]:
    """The model of a stage that writes text."""
    found = _open(task, stage, run)
    if not isinstance(found.model, GPT):
        raise ValueError(f"{task.name} needs a model that writes text; `{stage}` trained one that scores it")
    return Blueprint(found.model, found.read)


def scorer(task: Task, stage: str, run: Running) -> Blueprint[Scalar]:
    """The model of a stage that scores text."""
    found = _open(task, stage, run)
    if not isinstance(found.model, Scalar):
        raise ValueError(f"{task.name} needs a reward model; `{stage}` trained one that writes text")
    return Blueprint(found.model, found.read)


def frozen(judge: Blueprint[Any], run: Running) -> nn.Module:
    """A judge: no gradients, no dropout, on the device and in the precision of the model in training."""
    precision = next(run.engines["model"].module.parameters()).dtype
    model: nn.Module = judge.whole(run.mesh.device, precision)
    return model.requires_grad_(False).eval()


def without_dropout(model: nn.Module) -> None:
    """For losses that compare probabilities: noise in one of them is not a preference."""
    for module in model.modules():
        if isinstance(module, Block):
            module.dropout = 0.0


def _newest(task: Task, stage: str, run: Running) -> checkpoint.Checkpoint:
    newest = checkpoint.latest(task.input(stage))
    newest.check_tokenizer(run.tokenizer)
    return newest


def _open(task: Task, stage: str, run: Running) -> Blueprint[nn.Module]:
    newest = _newest(task, stage, run)
    newest.verify_together(run.mesh)
    found = checkpoint.blueprint(newest, "model")
    trunk = checkpoint.trunk(found.model)
    if task.context > trunk.config.context:
        raise ValueError(
            f"context={task.context} is longer than the {trunk.config.context} tokens that `{stage}` reads; "
            f"use context={trunk.config.context} or less"
        )
    return found
