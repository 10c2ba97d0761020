"""Where alignment starts: the model of a finished stage, to train further or to judge with.

What judges is frozen and comes from that stage's folder on every start, also of a run that goes on: a
reference taken from the policy at a restart would make its KL 0 without a word.
"""

from torch import nn

from megachat.model.gpt import GPT, Block
from megachat.model.heads import Scalar
from megachat.parallel import checkpoint
from megachat.train.loop import Running, Task


def language_model(task: Task, stage: str, run: Running) -> GPT:
    """The model of a stage that writes text."""
    model = _load(task, stage, run)
    if not isinstance(model, GPT):
        raise ValueError(f"{task.name} needs a model that writes text; `{stage}` trained one that scores it")
    return model


def scorer(task: Task, stage: str, run: Running) -> Scalar:
    """The model of a stage that scores text."""
    model = _load(task, stage, run)
    if not isinstance(model, Scalar):
        raise ValueError(f"{task.name} needs a reward model; `{stage}` trained one that writes text")
    return model


def frozen(model: nn.Module, run: Running) -> nn.Module:
    """A judge: no gradients, no dropout, on the device and in the precision of the model in training."""
    precision = next(run.engines["model"].module.parameters()).dtype
    return model.to(run.mesh.device, precision).requires_grad_(False).eval()


def without_dropout(model: nn.Module) -> None:
    """For losses that compare probabilities: noise in one of them is not a preference."""
    for module in model.modules():
        if isinstance(module, Block):
            module.dropout = 0.0


def _load(task: Task, stage: str, run: Running) -> nn.Module:
    folder = task.input(stage)
    checkpoint.latest(folder).check_tokenizer(run.tokenizer)
    model = checkpoint.load_model(folder, mesh=run.mesh).model
    trunk = model.trunk if isinstance(model, Scalar) else model
    assert isinstance(trunk, GPT)
    if task.context > trunk.config.context:
        raise ValueError(
            f"context={task.context} is longer than the {trunk.config.context} tokens that `{stage}` reads; "
            f"use context={trunk.config.context} or less"
        )
    return model.train()
