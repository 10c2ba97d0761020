"""What a training step sends, in bytes, by formula: known before anything runs.

ZeRO's volumes are those of Rajbhandari et al. (2020, https://arxiv.org/abs/1910.02054), those of tensor
parallelism of Shoeybi et al. (2019, https://arxiv.org/abs/1909.08053) and Narayanan et al. (2021,
https://arxiv.org/abs/2104.04473), where DeepSpeed 0.19.8 does as they say. It does not in four places, which
`tools/bench/volume.py` counts:

- ZeRO 1 and 2 sum gradients by an all-reduce and not by a reduce-scatter, so that with the all-gather of the
  weights a rank sends 3 elements a parameter, where the paper has 2.
- ZeRO 2 and 3 do so after every micro-batch, ZeRO 0 and 1 once in a step.
- Every matrix that is cut by columns sums the gradient of its input by itself: five all-reduces in the
  backward pass of a block (q, k, v, gate, up), where Megatron has two.
- In bf16 gradients travel as bf16, whatever they are accumulated in; under ZeRO 0, which computes under
  autocast, as fp32.

The vocabulary is ours (`megachat/model/vocabulary.py`): a sum of states behind the embedding and one of their
gradients before the output layer, and a number a token for the loss, where Megatron has three.

Norms, the loss, and counts of tokens are left out: they are kilobytes.
"""

import math
from dataclasses import dataclass
from typing import Literal

from megachat.model.cross_entropy import rows_at_once
from megachat.model.gpt import GPT, GPTConfig
from megachat.model.size import parameters

Kind = Literal["all_reduce", "reduce_scatter", "all_gather", "all_to_all"]

LIVE = 10**9
"""Parameters that ZeRO 3 keeps gathered for another use soon (DeepSpeed's `stage3_max_live_parameters` and
`stage3_max_reuse_distance`)."""
PERSISTENT = 100_000
"""Parameters of at most so many elements it keeps all the step (`stage3_param_persistence_threshold`)."""
BUCKET, PREFETCH = 5e8, 5e7
"""Elements that travel together (`reduce_bucket_size`, `stage3_prefetch_bucket_size`)."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a step is spread, as far as it decides what is sent."""

    zero: int
    data: int
    tensor: int
    micro_batches: int
    """Of one data rank in one step."""
    micro_batch: int
    """Rows of each."""
    seq: int
    """Tokens of a row."""
    bf16: bool
    checkpointing: bool
    """Whether whole blocks are computed again in the backward pass."""
    sequence: int = 1
    """Ranks that share each row."""

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.data * self.sequence * self.tensor

    @property
    def tokens(self) -> int:
        """Of one step, over all ranks."""
        return self.data * self.micro_batches * self.micro_batch * self.seq


@dataclass(frozen=True, slots=True)
class Sent:
    """The collectives of one kind and purpose in one optimizer step, as one rank takes part in them."""

    what: str
    axis: Literal["data", "sequence", "tensor"]
    kind: Kind
    ranks: int
    calls: float
    """How many there are: of what is put into buckets, how many buckets."""
    payload: int
    """Bytes of the whole tensors, before they are cut and after they are gathered, over all calls; of an
    all-to-all, of what one rank has."""

    @property
    def wire(self) -> float:
        """Bytes that a rank sends in a ring, where an all-reduce is a reduce-scatter and an all-gather.

        Example: an all-reduce of 100 bytes over 4 ranks sends 150.
        """
        return (2 if self.kind == "all_reduce" else 1) * self.payload * (self.ranks - 1) / self.ranks


def held(config: GPTConfig, vocab: int, tensor: int) -> int:
    """Parameters on one tensor rank: its share of all matrices, and the whole norms."""
    share = {name: getattr(config, name) // tensor for name in ("heads", "kv_heads", "hidden")}
    return parameters(config.model_copy(update=share), math.ceil(vocab / tensor))


def volume(config: GPTConfig, vocab: int, layout: Layout, live: int = LIVE) -> list[Sent]:
    """Everything that one rank takes part in during one optimizer step."""
    ends = [*_tensor_volume(config, vocab, layout), *_sequence_volume(config, layout)]
    found = [*ends, *_data_volume(config, vocab, layout, live)]
    return [sent for sent in found if sent.ranks > 1 and sent.payload]


def _tensor_volume(config: GPTConfig, vocab: int, layout: Layout) -> list[Sent]:
    """Partial sums after each matrix cut by rows, gradients of the inputs of those cut by columns; words."""
    cuts = [cut for name, cut in GPT.tensor_plan.items() if name.startswith("blocks.")]
    rows, columns = cuts.count("row"), cuts.count("column")
    # The last product of a block is not needed again: its backward reads its inputs alone.
    again = rows - 1 if layout.checkpointing else 0
    elements = layout.micro_batch * layout.seq * config.dim
    blocks = layout.micro_batches * config.layers
    forward, backward = (2 if layout.bf16 else 4), (2 if layout.bf16 and layout.zero else 4)
    ranks, micro_batches, tokens = layout.tensor, layout.micro_batches, layout.micro_batch * layout.seq
    chunks = math.ceil(tokens / rows_at_once(math.ceil(vocab / ranks), "cuda"))
    # Under autocast the embedding's states are fp32; the output layer's are what it multiplies.
    ends = (4 if layout.bf16 and not layout.zero else forward) + forward
    return [
        *(
            Sent("activations", "tensor", "all_reduce", ranks, float(calls * blocks), calls * blocks * size)
            for calls, size in [(rows + again, forward * elements), (columns, backward * elements)]
        ),
        Sent("words", "tensor", "all_reduce", ranks, 2.0 * micro_batches, micro_batches * ends * elements),
        Sent(
            "loss", "tensor", "all_gather", ranks, float(micro_batches * chunks),
            micro_batches * 4 * tokens * ranks,
        ),
    ]  # fmt: skip


def _sequence_volume(config: GPTConfig, layout: Layout) -> list[Sent]:
    """Queries, keys, values and what was gathered: tokens for heads in each block, and back again."""
    times = layout.micro_batches * config.layers * (3 if layout.checkpointing else 2)
    size = 2 if layout.bf16 else 4
    turned = 4 if layout.bf16 and not layout.zero else size  # rotated by angles of the embedding's dtype
    heads = (config.heads + config.kv_heads) * config.head_dim
    elements = layout.micro_batch * layout.seq // layout.sequence * heads
    exchanged = times * (turned + size) * elements
    return [Sent("heads", "sequence", "all_to_all", layout.sequence, 4.0 * times, exchanged)]


def _data_volume(config: GPTConfig, vocab: int, layout: Layout, live: int) -> list[Sent]:
    """Gradients, and the weights that other ranks have updated or hold."""
    zero, micro_batches = layout.zero, layout.micro_batches
    size = 2 if layout.bf16 and zero else 4
    own, replicas = held(config, vocab, layout.tensor), layout.data * layout.sequence

    def sent(what: str, kind: Kind, elements: int, times: int, bucket: float = BUCKET) -> Sent:
        calls = times * max(1.0, elements / bucket)
        return Sent(what, "data", kind, replicas, calls, times * size * elements)

    gradients: Kind = "reduce_scatter" if zero == 3 else "all_reduce"
    found = [sent("gradients", gradients, own, micro_batches if zero >= 2 else 1)]
    if zero in (1, 2):
        found.append(sent("weights", "all_gather", own, 1))
    if zero == 3:
        large = sum(count for count in _matrices(config, vocab, layout.tensor) if count > PERSISTENT)
        # Forward and backward, but for what is still there from the one when the other begins.
        found.append(sent("weights", "all_gather", 2 * large - min(large, live), micro_batches, PREFETCH))
        found.append(sent("small weights", "all_gather", own - large, 1, PREFETCH))
    return found


def _matrices(config: GPTConfig, vocab: int, tensor: int) -> list[int]:
    """Elements of each matrix on one tensor rank."""
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    block = [config.dim * width // tensor for width in (queries, queries, keys, keys)]
    if config.moe is None:
        block += [config.dim * config.hidden // tensor] * 3
    else:  # the experts' matrices are stacked
        block += [config.dim * config.moe.experts, *[config.moe.experts * config.dim * config.hidden] * 3]
    words = math.ceil(vocab / tensor) * config.dim
    return [*block * config.layers, *[words] * (1 if config.tied else 2)]
