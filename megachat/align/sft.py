"""STAGE sft: supervised fine-tuning. A base model learns to answer, from conversations.

Only what the assistant says is trained on, with the token that ends it: without that token the model never
learns to stop. Conversations are packed into rows of one length and cannot see each other, so a row costs
what its tokens cost and its loss is that of its conversations one by one.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from jaxtyping import Float, Int
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from megachat.align.rows import Rendered, cut, drawn, pack, packed, that_fit
from megachat.align.start import Adapting, language_model
from megachat.data.conversations import Conversations, Encoded, Message, opening, share
from megachat.data.loader import places
from megachat.data.shards import read_split
from megachat.log import say
from megachat.model.blueprint import Blueprint
from megachat.model.cross_entropy import IGNORE
from megachat.model.generate import Sampling, generate
from megachat.model.size import Work
from megachat.tokenizer.chat_format import render, render_prompt
from megachat.tokenizer.encode_chat import Chats
from megachat.train.feed import Fed, fed
from megachat.train.loop import (
    STAYS,
    Batch,
    Losses,
    Running,
    check_shards,
    load_of,
    measured,
    micro_batches,
)


@dataclass(frozen=True)
class Said(Batch):
    """A micro-batch of packed conversations."""

    inputs: Int[Tensor, "batch seq"]
    labels: Int[Tensor, "batch seq"]
    scale: Float[Tensor, "batch seq"] | None
    """How much each label counts; None: all 1."""
    documents: Int[Tensor, "batch seq"] = field(metadata=STAYS)


Set = tuple[Sequence[Rendered], list[int]]
"""Conversations, and how many tokens each has."""


class Packed(Sequence[list[Rendered]]):
    """Rows of conversations, each put together when it is asked for."""

    def __init__(self, conversations: Sequence[Rendered], lengths: Sequence[int], task: "SFT", needed: bool):
        items: Sequence[int] = range(len(lengths))
        if task.too_long == "truncate":
            items = cut(items, lengths.__getitem__, conversations.__getitem__, task.context)
            lengths = [min(length, task.context) for length in lengths]
        fitting = that_fit(items, lengths.__getitem__, task.context, "conversations", needed)
        rows = pack([lengths[item] for item in fitting], task.context)
        self.conversations, self.rows = conversations, [[fitting[item] for item in row] for row in rows]
        self.context = task.context

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[one] for one in range(len(self))[number]]
        whole = [self.conversations[item] for item in self.rows[number]]
        return [(tokens[: self.context], mask[: self.context]) for tokens, mask in whole]


@dataclass
class Material:
    """What SFT trains on."""

    rows: Packed
    held_out: Packed
    """Rows that are only measured."""


class SFT(Fed, Adapting):
    """Imitate the assistant's side of conversations."""

    name: ClassVar[str] = "sft"
    exact: ClassVar[bool] = False

    start: str
    """The stage whose model is trained on."""
    conversations: Conversations
    """What is imitated; `encoded`: what `megachat encode_chat` has written."""
    epochs: PositiveFloat
    """Passes over the conversations."""
    too_long: Literal["drop", "truncate"]
    """What becomes of a conversation that is longer than `context`: it is left out, or its end is cut off. An
    answer that is cut has no stop token, so it never teaches to stop there."""
    prompt_weight: Annotated[float, Field(ge=0, le=1)]
    """How much a token counts that the assistant does not say, or says in a message of the weight 0, beside 1
    (Huerta-Enochian and Ko, 2024, https://arxiv.org/abs/2401.13586); 0: the assistant's side alone."""
    neftune: NonNegativeFloat
    """Noise added to the embeddings in training, the paper's alpha, there 5 to 15 (Jain et al., 2023,
    https://arxiv.org/abs/2310.05914); 0: none."""
    validation: Annotated[float, Field(ge=0, lt=1)]
    """The share of conversations that is only measured; of encoded ones `encode_chat` has kept it apart."""
    question: str
    """What the model is asked when a sample is logged."""

    def reads(self) -> list[str]:
        """The tokenizer and the base model, and perhaps the conversations."""
        return [
            "tokenizer",
            self.start,
            *(["encode_chat"] if isinstance(self.conversations, Encoded) else []),
        ]

    def models(self, run: Running) -> dict[str, Blueprint[Any]]:
        """The base model."""
        start = language_model(self, self.start, run)
        start.model.noise = self.neftune
        return {"model": self.trainee(start)}

    def prepare(self, run: Running) -> int:
        """Packs the conversations."""
        sets = self._sets(run)
        run.data = Material(Packed(*sets[0], self, needed=True), Packed(*sets[1], self, needed=False))
        rows = len(run.data.rows)
        say(f"sft: {len(sets[0][0]):,} conversations in {rows:,} rows of {self.context} tokens")
        return max(1, round(self.epochs * rows / self.batch))

    def _sets(self, run: Running) -> list[Set]:
        """Those to train on and those to measure: rendered here, or mapped from shards."""
        if isinstance(self.conversations, Encoded):
            folder, sha256 = self.input("encode_chat"), run.tokenizer.sha256
            check_shards(folder, run.mesh)
            chats = [
                Chats(shard)
                for split in ("train", "validation")
                for shard in read_split(folder, split, sha256).values()
            ]
            return [(one, one.lengths) for one in chats]
        both: tuple[list[Rendered], list[Rendered]] = [], []
        for conversation in self.conversations.conversations():
            apart = share(opening(conversation)) < self.validation
            both[apart].append(render(conversation, run.tokenizer))
        return [(one, [len(tokens) for tokens, _ in one]) for one in both]

    def batches(self, run: Running) -> Iterator[list[Batch]]:
        """This data rank's share of the rows of each step, which do not depend on the number of ranks."""
        mesh, most = run.mesh, math.ceil(self.batch / run.mesh.data)

        def make(start: int) -> list[Said]:
            own = places(start, self.batch, mesh.data_rank, mesh.data)
            rows = [run.data.rows[index] for index in drawn(len(run.data.rows), self.seed, own)]
            return [*micro_batches(rows, most, self.micro_batch, lambda part: self._collate(part, run))]

        return fed(self, run, make)

    def _collate(
        self, rows: Sequence[list[Rendered]], run: Running, prompt_weight: float | None = None
    ) -> Said:
        weight = self.prompt_weight if prompt_weight is None else prompt_weight
        full = packed(rows, run.tokenizer.pad, self.context, weight)
        return Said(
            weight=full.weight,
            work=Work.of([len(tokens) for row in rows for tokens, _ in row], full.trained),
            samples=len(rows),
            inputs=full.tokens,
            labels=full.labels,
            scale=full.scale,
            documents=full.documents,
        )

    def loss(self, run: Running, batch: Said) -> Losses:
        """-log p, summed over what the assistant says, and over the rest as far as that counts."""
        engine = run.engines["model"]
        return Losses({"model": self._cost(engine, batch)}, load_of(engine.module, batch))

    def _cost(self, model: Callable[..., Tensor], batch: Said) -> Float[Tensor, ""]:
        where = batch.labels != IGNORE
        return model(batch.inputs, batch.documents, where=where, labels=batch.labels, scale=batch.scale)

    def measure(self, run: Running) -> dict[str, float]:
        """The loss per token of the assistant's in conversations that are not trained on."""
        nats = tokens = 0.0
        with run.engines["model"].inference() as model:
            held_out = run.data.held_out
            for batch in measured(
                held_out, self.micro_batch, run, lambda part: self._collate(part, run, 0.0)
            ):
                cost = self._cost(model, batch)
                if batch.samples:
                    nats += cost.item()
                    tokens += batch.weight
        nats, tokens = run.mesh.sum(nats), run.mesh.sum(tokens)
        return {"loss": nats / tokens} if tokens else {}

    def show(self, run: Running) -> str | None:
        """What the model answers to `question`."""
        prompt = render_prompt((Message("user", self.question),), run.tokenizer)
        room = min(64, self.context - len(prompt))
        if room < 1:
            return None
        greedy = Sampling(temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=room)
        with run.engines["model"].inference() as model:
            (new,) = generate(model, [prompt], greedy, {run.tokenizer.end}, synced=run.synced)
        return f"{self.question} {run.tokenizer.decode(new)}"
