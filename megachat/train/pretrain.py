"""STAGE pretrain: a language model from token shards.

What is read is decided by three settings: the mixture of sources, how documents are packed into rows, and the
seed. A checkpoint remembers them with the sums of the shards, so a run never goes on with other data by
accident. Validation is in bits per byte, which no tokenizer can flatter.
"""

import hashlib
import math
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Int
from pydantic import NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor

from megachat.data.loader import (
    WHOLE,
    Mixed,
    OnChange,
    Plan,
    TokenWindows,
    Window,
    documents_of,
    share,
)
from megachat.data.mixture import Mixture
from megachat.data.packing import PackedRows, Packing, losses, pack
from megachat.data.shards import Shards, read_split
from megachat.evals.bits import spread
from megachat.log import say
from megachat.model.blueprint import Blueprint
from megachat.model.generate import Sampling, generate
from megachat.model.gpt import GPTConfig
from megachat.model.size import Work
from megachat.parallel.sequence import check_rows
from megachat.parallel.tensor import check_fits
from megachat.tokenizer.tokenizer import Tokenizer
from megachat.train.feed import Fed, fed
from megachat.train.forecast import (
    Encoded,
    Finding,
    Job,
    check_corpus,
    check_memory,
    check_tokens,
    check_vocabulary,
    room_here,
)
from megachat.train.loop import (
    STAYS,
    Batch,
    Losses,
    Running,
    check_shards,
    load_of,
    micro_batches,
    moved,
    parts,
)


@dataclass(frozen=True)
class Tokens(Batch):
    """Windows of text: predict `labels` from `tokens`, seeing only the own document."""

    inputs: Int[Tensor, "batch seq"]
    labels: Int[Tensor, "batch seq"]
    documents: Int[Tensor, "batch seq"] = field(metadata=STAYS)


@dataclass
class Corpus:
    """What pretraining reads."""

    order: Mixed
    """The training samples, mixed, shuffled and endless."""
    validation: TokenWindows
    """The windows that are only measured."""


class Pretrain(Fed):
    """Predict the next token of every document."""

    name: ClassVar[str] = "pretrain"
    shares_rows: ClassVar[bool] = True

    model: GPTConfig
    """The shape of the model."""
    tokens: PositiveInt | None
    """The budget in tokens; give this or `epochs`."""
    epochs: NonNegativeFloat | None
    """The budget in passes over as many tokens as the sources hold; give this or `tokens`."""
    mixture: Mixture
    """How often each source is read."""
    packing: Literal["concatenate", "best_fit"]
    """`concatenate`: rows are cut from the text as it comes; `best_fit`: whole documents, and padding."""
    on_changed_data: OnChange
    """A run that goes on (with resume=any) and finds other shards, sources, weights or packing: `refuse`; or
    `extend`: sources that are unchanged go on where they stand; or `restart`: all from their beginning."""
    verify_shards: bool
    """Read all token shards at the start and compare their sums: at 1 to 2 GB/s on each rank, but a file is
    not divided. Without it a flipped bit is trained on."""
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
        check_fits(self.model, self.parallel.tensor, self.parallel.expert)
        check_rows(self.model, self.parallel.sequence, self.context)
        return self

    neutral: ClassVar[tuple[str, ...]] = (*Fed.neutral, "on_changed_data", "verify_shards")

    def reads(self) -> list[str]:
        """The tokenizer and the shards."""
        return ["tokenizer", "encode"]

    def foresee(self, run: Running) -> None:
        """By arithmetic: whether the corpus and the vocabulary are right, and the memory suffices.

        What `megachat doctor` calls a problem ends the run, all that is wrong at once; a warning is said.
        """
        mesh = run.mesh
        job = self.job(run.tokenizer.vocab, mesh.world, self.parallel.bf16, mesh.device.type == "cuda")
        host = socket.gethostname()
        room, where = room_here(Counter(mesh.gather(host))[host])
        room = min(mesh.each(room))
        found = mesh.lead(lambda: [check_memory(job, room, where), *self._data(job, run.tokenizer)])
        for finding in found:
            if finding.level == "warning":
                say(f"{self.name}: WARNING: {finding}")
        wrong = [str(finding) for finding in found if finding.level == "problem"]
        if wrong:
            remedy = "`megachat doctor` with the same settings says more; preflight=false goes on regardless"
            raise ValueError("\n".join([*wrong, remedy]))

    def _data(self, job: Job, tokenizer: Tokenizer) -> list[Finding]:
        """Of the manifest alone."""
        encoded = Encoded.read(self.input("encode"), self.mixture)
        found = [check_vocabulary(job), *check_corpus(encoded, tokenizer.vocab, tokenizer.sha256)]
        budget = self.budget(encoded.tokens)
        if budget is not None and encoded.tokens:
            found += [one for one in check_tokens(job, budget, encoded.tokens) if one.about == "corpus"]
        return found

    def models(self, run: Running) -> dict[str, Blueprint[Any]]:
        """A fresh model."""
        return {"model": self.model.blueprint(run.tokenizer.vocab, run.mesh.device)}

    def prepare(self, run: Running) -> int:
        """Opens the shards; the budget in whole steps."""
        folder, phases = self.input("encode"), self.mixture.plan()
        train, held_out = (
            read_split(folder, split, run.tokenizer.sha256) for split in ("train", "validation")
        )
        if self.verify_shards:
            check_shards(folder, run.mesh)
        shards = {name: Shards([shard]) for name, shard in train.items()}
        validation = Shards(list(held_out.values()))
        if phases:
            used = {name for phase in phases for name in phase.weights}
            if unread := [name for name in shards if name not in used]:
                say(f"pretrain: the mixture leaves out {', '.join(unread)}")
        else:
            used = {WHOLE}
            shards = {WHOLE: Shards([shard for one in shards.values() for shard in one.shards])}
        plan = Plan.of(shards, [self.packing], phases, self.context, self.seed)
        plan = plan.continued(run.progress.data, run.progress.samples, self.on_changed_data)
        run.progress.data = plan.state()
        sources = {name: self._rows(name, shards[name], run) for name in shards if name in used}
        run.data = Corpus(Mixed(sources, plan), TokenWindows(validation, self.context))
        rows = sum(len(source) for source in sources.values())
        tokens = self.tokens if self.tokens is not None else int((self.epochs or 0.0) * rows * self.context)
        return max(1, tokens // (self.batch * self.context))

    def job(self, vocab: int, ranks: int, bf16: bool, cuda: bool) -> Job:
        """The run as arithmetic sees it."""
        return Job(
            model=self.model,
            vocab=vocab,
            parallel=self.parallel,
            optimizer=self.optimizer,
            batch=self.batch,
            micro_batch=self.micro_batch,
            seq=self.context,
            ranks=ranks,
            bf16=bf16,
            cuda=cuda,
        )

    def budget(self, corpus: int | None) -> int | None:
        """Tokens to train on; of epochs it is not known without a corpus."""
        tokens = self.tokens
        if tokens is None and corpus is not None:
            tokens = int((self.epochs or 0.0) * corpus)
        step = self.batch * self.context
        return tokens if tokens is None or self.max_steps is None else min(tokens, self.max_steps * step)

    def _rows(self, name: str, shards: Shards, run: Running) -> TokenWindows | PackedRows:
        if self.packing == "concatenate":
            return TokenWindows(shards, self.context)
        digest = hashlib.sha256(f"{shards.sums} {self.context}".encode()).hexdigest()
        folder = self.folder / "packing" / digest[:16]
        if run.mesh.rank == 0 and not folder.is_dir():
            packing = pack(shards.documents, self.context)
            padding, cut = losses(shards.documents, packing, self.context)
            say(
                f"packing {name}: {len(packing.rows) - 1:,} rows, {padding:.2%} of them padding; "
                f"{cut:,} of {len(shards):,} documents are longer than a row and are cut"
            )
            packing.save(folder)
        run.mesh.barrier()
        return PackedRows(shards, self.context, Packing.load(folder))

    def batches(self, run: Running) -> Iterator[list[Batch]]:
        """The next samples of the one global order, whatever the number of ranks."""
        mesh, most = run.mesh, math.ceil(self.batch / run.mesh.data)

        def make(start: int) -> list[Tokens]:
            rows = share(run.data.order, start, self.batch, mesh.data_rank, mesh.data)
            return [*micro_batches(rows, most, self.micro_batch, collate)]

        return fed(self, run, make)

    def shifts(self, run: Running) -> bool:
        """Where a phase of a curriculum begins."""
        first = run.progress.samples
        return bool(run.data.order.schedule.shifts(first, first + self.batch - 1))

    def samples_of(self, run: Running, first: int, last: int) -> str:
        """The rows of the first few samples."""
        shown = [run.data.order.name(number) for number in range(first, min(last, first + 7) + 1)]
        return ", ".join([*shown, "..."] if last - first > 7 else shown)

    def loss(self, run: Running, batch: Tokens) -> Losses:
        """Cross-entropy summed over tokens."""
        engine = run.engines["model"]
        loss = engine(batch.inputs, batch.documents, labels=batch.labels)
        return Losses({"model": loss}, load_of(engine.module, batch))

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
                run.pause()
                rows = [windows[chosen[place % len(chosen)]] for place in part]
                batch = moved(collate(rows), mesh.device)
                counts = torch.tensor([place < len(chosen) for place in part], device=mesh.device)
                labels = batch.labels.clamp(min=0)
                weights = torch.where((batch.labels >= 0) & counts[:, None], lengths[labels], 0)
                bits = model(batch.inputs, batch.documents, labels=labels, each=True) / math.log(2)
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


def collate(rows: Sequence[Window]) -> Tokens:
    """Rows of text as a micro-batch."""
    length = len(rows[0].tokens) - 1
    tokens = np.concatenate([row.tokens for row in rows]).reshape(-1, length + 1)
    labels = tokens[:, 1:].astype(np.int64)
    # The first token of a document cannot be predicted from the one before it, and padding is no document.
    unseen = {
        number * length + place - 1
        for number, (_, edges) in enumerate(rows)
        for place in chain(edges[1:-1], range(edges[-1], length + 1))
    }
    labels.ravel()[[*unseen]] = -100
    inputs, documents = tokens[:, :-1].astype(np.int64), documents_of(rows)[:, :-1].copy()
    lengths = [size for _, edges in rows for size in np.diff(np.minimum(edges, length)).tolist()]
    trained = labels.size - len(unseen)
    return Tokens(
        weight=float(trained),
        work=Work.of(lengths, trained),
        samples=len(rows),
        inputs=torch.from_numpy(inputs),
        labels=torch.from_numpy(labels),
        documents=torch.from_numpy(documents),
    )
