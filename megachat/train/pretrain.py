"""STAGE pretrain: a language model from token shards.

Validation is in bits per byte, which no tokenizer can flatter.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Int
from pydantic import NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor, nn

from megachat.data.loader import TokenWindows, Window, order, share
from megachat.data.shards import Shard
from megachat.evals.bits import spread, token_bits
from megachat.model.generate import Sampling, generate
from megachat.model.gpt import GPTConfig
from megachat.parallel.tensor import check_fits
from megachat.tokenizer.encode import check_tokenizer
from megachat.train.loop import Batch, Losses, Running, Task, parts
from megachat.train.losses import cross_entropy

if TYPE_CHECKING:
    import grain


@dataclass(frozen=True)
class Tokens(Batch):
    """Windows of text: predict `labels` from `tokens`, seeing only the own document."""

    inputs: Int[Tensor, "batch seq"]
    labels: Int[Tensor, "batch seq"]
    documents: Int[Tensor, "batch seq"]


@dataclass
class Corpus:
    """What pretraining reads."""

    order: "grain.MapDataset[Window]"
    """The training windows, shuffled and endless."""
    validation: TokenWindows
    """The windows that are only measured."""


class Pretrain(Task):
    """Predict the next token of every document."""

    name: ClassVar[str] = "pretrain"

    model: GPTConfig
    """The shape of the model."""
    tokens: PositiveInt | None
    """The budget in tokens; give this or `epochs`."""
    epochs: NonNegativeFloat | None
    """The budget in passes over the training shard; give this or `tokens`."""
    validation_windows: PositiveInt
    """At most so many windows of the validation shard are measured."""
    prompt: str
    """What the samples during training continue."""

    @model_validator(mode="after")
    def _consistent(self) -> "Pretrain":
        if (self.tokens is None) == (self.epochs is None):
            raise ValueError(
                f"give a budget either as tokens ({self.tokens}) or as epochs ({self.epochs}), the other null"
            )
        if self.context > self.model.context:
            raise ValueError(
                f"context ({self.context}) is longer than the model's (model.context={self.model.context})"
            )
        check_fits(self.model, self.parallel.tensor)
        return self

    def reads(self) -> list[str]:
        """The tokenizer and the shards."""
        return ["tokenizer", "encode"]

    def models(self, run: Running) -> dict[str, nn.Module]:
        """A fresh model."""
        return {"model": self.model.build(run.tokenizer.vocab)}

    def prepare(self, run: Running) -> int:
        """Opens the shards; the budget in whole steps."""
        folder = self.input("encode")
        check_tokenizer(folder, run.tokenizer)
        source = TokenWindows(Shard(folder / "train"), self.context)
        validation = TokenWindows(Shard(folder / "validation"), self.context)
        run.data = Corpus(order(source, self.seed), validation)
        tokens = (
            self.tokens if self.tokens is not None else int((self.epochs or 0.0) * len(source) * self.context)
        )
        return max(1, tokens // (self.batch * self.context))

    def batches(self, run: Running) -> Iterator[list[Batch]]:
        """The next windows of the one global order, whatever the number of ranks."""
        while True:
            rows = share(run.data.order, run.progress.samples, self.batch, run.mesh.data_rank, run.mesh.data)
            yield [_collate(part, run.mesh.device) for part in parts(rows, self.micro_batch)]

    def loss(self, run: Running, batch: Tokens) -> Losses:
        """Cross-entropy summed over tokens."""
        logits = run.engines["model"](batch.inputs, batch.documents)
        return Losses({"model": cross_entropy(logits, batch.labels)})

    def measure(self, run: Running) -> dict[str, float]:
        """Bits per byte of held-out documents: of the same windows on any number of ranks."""
        windows = run.data.validation
        chosen = spread(len(windows), self.validation_windows)
        mesh, lengths = run.mesh, torch.as_tensor(run.tokenizer.token_bytes, device=run.mesh.device)
        # Equally many forwards on every rank, for ZeRO-3: a rank that has run out repeats one, uncounted.
        places = range(mesh.data_rank, math.ceil(len(chosen) / mesh.data) * mesh.data, mesh.data)
        sums = torch.zeros(2, dtype=torch.float64, device=mesh.device)  # bits, bytes
        with run.engines["model"].inference() as model:
            for part in parts(places, self.micro_batch):
                batch = _collate([windows[chosen[place % len(chosen)]] for place in part], mesh.device)
                counts = torch.tensor([place < len(chosen) for place in part], device=mesh.device)
                labels = batch.labels.clamp(min=0)
                weights = torch.where((batch.labels >= 0) & counts[:, None], lengths[labels], 0)
                bits = token_bits(model(batch.inputs, batch.documents), labels)
                sums += torch.stack([bits[weights > 0].double().sum(), weights.double().sum()])
        bits_total, bytes_total = run.mesh.sum_tensor(sums).tolist()
        return {"bits_per_byte": bits_total / bytes_total} if bytes_total else {}

    def show(self, run: Running) -> str:
        """How the model goes on from `prompt`."""
        sampling = Sampling(temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=min(40, self.context // 2))
        room = self.context - sampling.max_new_tokens
        tokens = [run.tokenizer.bos, *run.tokenizer.encode(self.prompt)][:room]
        with run.engines["model"].inference() as model:
            (new,) = generate(
                model, [tokens], sampling, {run.tokenizer.eos}, pad=run.tokenizer.pad, synced=run.synced
            )
        return self.prompt + run.tokenizer.decode(new)


def _collate(rows: Sequence[Window], device: torch.device) -> Tokens:
    tokens = torch.stack([torch.as_tensor(row["tokens"]) for row in rows]).to(device)
    documents = torch.stack([torch.as_tensor(row["documents"]) for row in rows]).to(device)
    # The first token of a document cannot be predicted from the one before it.
    labels = tokens[:, 1:].masked_fill(documents[:, 1:] != documents[:, :-1], -100)
    return Tokens(
        weight=float((labels != -100).sum()),
        tokens=labels.numel(),
        samples=len(rows),
        inputs=tokens[:, :-1].contiguous(),
        labels=labels,
        documents=documents[:, :-1].contiguous(),
    )
