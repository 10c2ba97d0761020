"""Text beside sampled answers: the pretraining mix of PPO-ptx (Ouyang et al., 2022,
https://arxiv.org/abs/2203.02155), so that a policy that learns to please does not forget how text goes on.

The rows are those of `encode`'s shards in the order in which `pretrain` reads them: which ones a step takes
follows from how many the run has taken. Their loss is the mean over all tokens of text of the step, on all
ranks; how many answers there are, and how long they are, does not change what it counts.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megachat.data.loader import WHOLE, Mixed, Plan, TokenWindows, share
from megachat.data.mixture import Mixture
from megachat.data.shards import Shards, read_split
from megachat.train.loop import Batch, Losses, Running, micro_batches, moved
from megachat.train.pretrain import Tokens, collate


@dataclass(frozen=True)
class Text(Batch):
    """A micro-batch of text. It adds nothing to the weight, which is that of the answers."""

    tokens: Tokens
    scale: float
    """The weight of the step over its tokens of text: what makes of a sum, which the loop divides by that
    weight, a mean over text."""


def opened(folder: Path, mixture: Mixture, context: int, seed: int, run: Running) -> Mixed:
    """The rows of a folder's shards, mixed, shuffled and endless. A run that goes on must find the same."""
    train = read_split(folder, "train", run.tokenizer.sha256)
    shards = {name: Shards([shard]) for name, shard in train.items()}
    phases = mixture.plan()
    if not phases:
        shards = {WHOLE: Shards([*train.values()])}
    plan = Plan.of(shards, ["concatenate"], phases, context, seed)
    before = run.progress.data.get("fingerprint", plan.fingerprint)
    if before != plan.fingerprint:
        raise ValueError(
            f"the text in {folder} is not what this run has read until step {run.progress.step}: the plan "
            f"was {before[:12]}, and is {plan.fingerprint[:12]}; bring shards and mixture back, or give "
            "another run=... to start over with these"
        )
    run.progress.data = plan.state()
    return Mixed({name: TokenWindows(shards[name], context) for name in plan.schedule.names}, plan)


def beside(
    steps: Iterator[list[Batch]], text: Mixed, rows: int, micro_batch: int, run: Running
) -> Iterator[list[Batch]]:
    """The same steps, each with the next `rows` of text over all ranks.

    The text comes first: the last micro-batch is the one with which all models take their step.
    """
    mesh, state = run.mesh, run.progress.state
    for answers in steps:
        first = state.get("text", 0)
        own = share(text, first, rows, mesh.data_rank, mesh.data)
        # A rank without a row of its own goes along with another's, which counts nothing.
        spare = [] if own else [text[first]]
        batches = [*micro_batches(own, math.ceil(rows / mesh.data), micro_batch, collate, spare=spare)]
        counts = [sum(batch.weight for batch in some) for some in (answers, batches)]
        weight, trained = mesh.sum_tensor(torch.tensor(counts, dtype=torch.float64)).tolist()
        state["text"] = first + rows  # beforehand: once they are taken the run may be saved, and end
        yield [*(_counted(one, weight / trained, mesh.device) for one in batches), *answers]


def text_loss(run: Running, batch: Text, mix: float) -> Losses:
    """`mix` times the mean cross-entropy of the step's text."""
    tokens = batch.tokens
    cost = batch.scale * run.engines["model"](tokens.inputs, tokens.documents, labels=tokens.labels)
    return Losses({"model": mix * cost}, {"text/loss": cost.detach()})


def _counted(tokens: Tokens, scale: float, device: torch.device) -> Text:
    return Text(0.0, tokens.work, tokens.samples, moved(tokens, device), scale)
