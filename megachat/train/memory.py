"""How much memory a rank of a training run needs, by formula: known before anything is allocated.

What lasts (weights, fp32 master weights, moments) is what ZeRO shards (Rajbhandari et al., 2020,
https://arxiv.org/abs/1910.02054, section 5); what a forward pass leaves for the backward pass is counted as
Korthikanti et al. (2022, https://arxiv.org/abs/2205.05198, section 4) do, with the tensors that this model
saves. The rest is what DeepSpeed 0.19.8 allocates on the way. Four moments may be the peak: the start, where
ZeRO 3 shards what was cut before; the end of the last micro-batch's forward pass; the reduction of the
gradients; and the optimizer's own step.

On a CPU only memory that is touched counts, on a GPU what is allocated. `tools/estimate_memory.py --measure`
compares the sum with the peak of real steps.
"""

import math
from dataclasses import dataclass, fields, replace

from megachat.model.attention import BLOCK
from megachat.model.cross_entropy import rows_at_once
from megachat.model.gpt import GPTConfig
from megachat.model.size import parameters
from megachat.parallel.engine import Parallel
from megachat.parallel.volume import LIVE
from megachat.train.optimizers import SGD, Muon, Optimizer

ALL_REDUCE = 500_000_000
"""Numbers that DeepSpeed flattens at once where it has no bucket, in ZeRO 0 and its `BF16_Optimizer`."""
ROUTED = 24
"""Bytes that a router leaves of each token and expert: scores, probabilities, picks in fp32, and copies."""
ROOM = 0.92
"""The share of a GPU's memory that tensors may fill: CUDA, NCCL, and gaps between tensors take the rest."""


@dataclass(frozen=True)
class Run:
    """All that decides what a rank needs."""

    model: GPTConfig
    vocab: int
    parallel: Parallel
    optimizer: Optimizer
    data: int
    """Data-parallel ranks."""
    micro_batch: int
    seq: int
    accumulated: int
    """Micro-batches of a step on one rank."""
    bf16: bool
    """Whether it computes in bf16: `auto` is for the machine to say that it will run on."""
    cuda: bool
    """Whether it will run on GPUs."""

    @property
    def width(self) -> int:
        """Bytes of a number that is computed with."""
        return 2 if self.bf16 else 4

    @property
    def autocast(self) -> bool:
        """ZeRO 0 in bf16: fp32 weights, cast anew in each forward."""
        return self.bf16 and self.parallel.zero == 0

    @property
    def tokens(self) -> int:
        """Of one micro-batch, that this rank has of its rows."""
        return self.micro_batch * self.seq // self.parallel.sequence

    @property
    def replicas(self) -> int:
        """Ranks with the same weights, over which ZeRO shards them."""
        return self.data * self.parallel.sequence


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by what they hold. The first four last; the others are each a moment's."""

    weights: int
    """That are computed with; under ZeRO 3 this rank's share."""
    master: int
    """This rank's share of the fp32 copy that is optimized."""
    moments: int
    """Of the optimizer, fp32."""
    gradients: int
    """In a forward pass: those of the step's micro-batches before it."""
    bucket: int
    """In which ZeRO 3 sums gradients; it stays."""
    activations: int
    """What a forward pass leaves for the backward pass."""
    head: int
    """More at the end of a forward pass: the output layer and the loss, or one block's backward pass."""
    gathered: int
    """Weights of other ranks (ZeRO 3), or cast ones (autocast), during a pass."""
    reduction: int
    """Gradients at the end of a backward pass, and the buffers in which they are summed over the ranks."""
    step: int
    """Gradients during the optimizer's step, and what it needs while it works."""
    start: int
    """Of a model that is cut before ZeRO 3 shards it, all that is this rank's: others come sharded."""

    @property
    def lasting(self) -> int:
        """There between two steps."""
        return self.weights + self.master + self.moments

    @property
    def moment(self) -> str:
        """When the peak is: "forward", "reduction", "step", or "start"."""
        return max(self._moments(), key=lambda name: self._moments()[name])

    @property
    def peak(self) -> int:
        """The most that is there at once."""
        return max(self._moments().values())

    def _moments(self) -> dict[str, int]:
        held = self.lasting + self.bucket
        return {
            "forward": held + self.gradients + self.gathered + self.activations + self.head,
            "reduction": held + self.gathered + self.reduction,
            "step": held + self.step,
            "start": self.start,
        }

    def parts(self) -> dict[str, int]:
        """The parts by name, in order."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def memory(run: Run) -> Memory:
    """What one rank of the run needs; of tensor-parallel ranks all need the same.

    Of a GPU's rank: what is offloaded is the host's. A CPU is both.
    """
    own = parameters_per_rank(run.model, run.vocab, run.parallel.tensor, run.parallel.expert)
    # An expert that fewer ranks hold is sharded over fewer, so that a share is as large as without.
    sharded = math.ceil(parameters_per_rank(run.model, run.vocab, run.parallel.tensor) / run.replicas)
    zero, width = run.parallel.zero, 4 if run.autocast else run.width
    cut_weights, cut_rest = zero == 3, zero > 0
    cut_before = run.parallel.tensor > 1 or run.parallel.expert > 1
    weights = width * (sharded if cut_weights else own)
    master = 4 * sharded if zero else 0
    moments = 4 * moments_of(run.optimizer) * (sharded if cut_rest else own)
    if isinstance(run.optimizer, Muon):  # of a block's matrices one number is remembered, not two
        moments -= 4 * math.ceil(_matrices_per_rank(run) / (run.replicas if cut_rest else 1))
    needed = Memory(
        weights=weights,
        master=master,
        moments=moments,
        gradients=_gradients(run, own, sharded),
        bucket=run.width * _bucket(run, own) if zero == 3 else 0,
        activations=_activations(run),
        head=_head(run),
        gathered=_gathered(run, own),
        reduction=_reduction(run, own, sharded),
        step=_step(run, own, sharded),
        start=width * own + 4 * sharded if cut_weights and cut_before else 0,
    )
    if not run.cuda or run.parallel.offload == "none":
        return needed
    away = 4 * sharded  # gradients: a share of them in fp32
    left = replace(needed, master=0, moments=0, gradients=0, reduction=needed.reduction - away, step=0)
    return replace(left, weights=0) if run.parallel.offload == "parameters" else left


def parameters_per_rank(model: GPTConfig, vocab: int, tensor: int, expert: int = 1) -> int:
    """Weights that one rank holds before ZeRO shards them: its share of what is cut, and norms whole.

    Tensor-parallel ranks share all matrices (of a vocabulary that cannot be divided, those of the rank with
    the most words), expert-parallel ones the experts alone.
    """
    matrices = _matrices(model)
    held = parameters(model, words(vocab, tensor)) - model.layers * (matrices - matrices // tensor)
    if model.moe is not None:
        elsewhere = model.moe.experts - model.moe.experts // expert
        held -= model.layers * elsewhere * 3 * model.dim * model.hidden
    return held


def words(vocab: int, tensor: int) -> int:
    """The most words of a vocabulary that a tensor-parallel rank has."""
    return math.ceil(vocab / tensor)


def _matrices(model: GPTConfig) -> int:
    """The weights in one block's matrices."""
    norms = model.dim + 2 * model.dim + (2 * model.head_dim if model.qk_norm else 0)
    return parameters(model.model_copy(update={"layers": 1}), 0) - norms


def _matrices_per_rank(run: Run) -> int:
    """Of all blocks, before ZeRO shards them."""
    return run.model.layers * (_matrices(run.model) // run.parallel.tensor)


def host_bytes(run: Run) -> int:
    """What one rank on a GPU keeps in its host's memory for training: what is offloaded there."""
    if run.parallel.offload == "none":
        return 0
    sharded = math.ceil(parameters_per_rank(run.model, run.vocab, run.parallel.tensor) / run.replicas)
    weights = run.width if run.parallel.offload == "parameters" else 0
    return sharded * (weights + 4 * (2 + moments_of(run.optimizer)))  # fp32: master, gradients, moments


def moments_of(optimizer: Optimizer) -> int:
    """How many numbers an optimizer remembers of each weight (Muon of what it leaves to AdamW)."""
    if isinstance(optimizer, SGD):
        return int(optimizer.momentum > 0)
    return 2


def _embedding(run: Run) -> int:
    """The weights of the embedding, or of the output layer, on one tensor-parallel rank."""
    return words(run.vocab, run.parallel.tensor) * run.model.dim


def _largest(run: Run) -> int:
    """The weights of the largest matrix that a rank holds."""
    stacked = 1 if run.model.moe is None else run.model.moe.experts // run.parallel.expert
    return max(_embedding(run), stacked * run.model.dim * run.model.hidden // run.parallel.tensor)


def _master_apart(run: Run) -> bool:
    """DeepSpeed's ZeRO 1 in bf16 is its `BF16_Optimizer`: gradients are added up in fp32, whole."""
    return run.parallel.zero == 1 and run.bf16


# What a forward pass leaves.


def _activations(run: Run) -> int:
    """Of all blocks, of the last norm, and the mask, a byte for each pair; a GPU's kernel in bf16 has none.

    With checkpointing what a block keeps is its input; `selective` also what its products give, and on a GPU
    its attention.
    """
    ends = run.tokens * (
        _norm_bytes(run, run.model.dim) + (0 if run.cuda and run.bf16 else run.seq * run.parallel.sequence)
    )
    kept = block_bytes(run)
    if run.parallel.checkpointing != "none":
        kept = _residual(run) * run.model.dim
    if run.parallel.checkpointing == "selective":
        heads, keys, hidden = _widths(run)
        attention = run.width * heads + 4 * heads // run.model.head_dim if run.cuda else 0
        kept += run.width * (heads + 2 * keys + 2 * hidden + 2 * run.model.dim) + attention
    return run.model.layers * run.tokens * kept + ends


def _widths(run: Run) -> tuple[int, int, int]:
    """Numbers of a token in this rank's queries, keys, and MLP, or in all experts that it passes through."""
    model, tensor = run.model, run.parallel.tensor
    passed = 1 if model.moe is None else model.moe.per_token
    return (
        model.heads * model.head_dim // tensor,
        model.kv_heads * model.head_dim // tensor,
        passed * model.hidden // tensor,
    )


def _residual(run: Run) -> int:
    """Bytes of a number between blocks: autocast leaves what it adds up in fp32."""
    return 4 if run.autocast else run.width


def _norm_bytes(run: Run, count: int) -> int:
    """What an RMSNorm of so many numbers keeps of its own: on a GPU a kernel takes its input as it is.

    Elsewhere, and under autocast, it is put together: its input, and that over its root mean square, in fp32.
    """
    return run.width * count if run.cuda and not run.autocast else 8 * count


def block_bytes(run: Run) -> int:
    """What one block leaves of one token for the backward pass: all that autograd saves in it.

    Four norms; what they give the products of q, k, v and of gate and up to read, under autocast a cast copy
    for each; q, k, v and the result in attention, and the result once more as `out` reads it; and in the MLP
    both factors, the activation, and the product that `down` reads. Of a mixture the same in each expert that
    the token passes through, with its input and what it gave, and what the router knows of all of them.
    """
    model, width = run.model, run.width
    heads, keys, hidden = _widths(run)
    norms = 2 * _norm_bytes(run, model.dim) + (_norm_bytes(run, heads + keys) if model.qk_norm else 0)
    read = width * model.dim * (5 if run.autocast else 2)
    routed = 0
    if model.moe is not None:
        routed = 2 * width * model.dim * model.moe.per_token + ROUTED * model.moe.experts
    return norms + read + _attention(run, heads, keys) + width * (heads + 4 * hidden) + routed


def _attention(run: Run, heads: int, keys: int) -> int:
    """A CPU's (`megachat/model/attention.py`) keeps a mask of a byte a pair, and for short rows the shares.

    Those are what each head takes of each key: half of the square, and half of the blocks on its diagonal. A
    GPU's kernel keeps a number of each head; that for fp32 has a mask, as numbers, and keys are repeated.
    """
    model, width = run.model, run.width
    if run.cuda:
        of_heads = 4 * heads // model.head_dim
        if run.bf16:
            return width * (2 * heads + 2 * keys) + of_heads
        return width * 4 * heads + of_heads + width * run.seq * run.parallel.sequence
    kept = run.seq <= 8 * model.head_dim
    shares = heads // model.head_dim * width * (run.seq + min(run.seq, BLOCK)) // 2 if kept else 0
    return width * (2 * heads + 2 * keys) + run.seq * run.parallel.sequence + shares


def _head(run: Run) -> int:
    """What is there for a moment, besides the activations: the more of the following.

    The output layer and its loss compute the gradients with the value (`megachat/model/cross_entropy.py`), of
    the states, and of the layer in fp32. To the latter each chunk of logits adds a product, which a CPU makes
    as wide first; under autocast the layer is cast. In the backward pass it is scaled, which is a copy, and
    cast to the layer's dtype.

    Or one block's backward pass, with the output layer's gradient still there: two numbers for each inside
    the MLP (the gradients of its factors), and the residual's. Checkpointing computes the block again first.
    """
    weight, states = _embedding(run), run.width * run.tokens * run.model.dim
    own_words = words(run.vocab, run.parallel.tensor)
    rows = min(run.tokens, rows_at_once(own_words, "cuda" if run.cuda else "cpu"))
    chunk = own_words * rows * (2 + 4 + 4 if run.bf16 else 4 + 4)
    widened = 4 if run.bf16 and not run.cuda else 0
    product = (run.width + widened) * weight + run.width * own_words * rows
    forward = (2 if run.autocast else 0) * weight + max(chunk, product) + states
    own = 0 if run.autocast else run.width
    backward = (4 + (own if own < 4 else 0)) * weight + 2 * states
    work = run.tokens * (run.width * 2 * _widths(run)[2] + 2 * 4 * run.model.dim)
    if run.parallel.checkpointing != "none":
        work += run.tokens * block_bytes(run)
    return max(4 * weight + max(forward, backward), (own or 4) * weight + work)


def _gathered(run: Run, own: int) -> int:
    """Under autocast the blocks' matrices in bf16; under ZeRO 3 what has not been given back.

    That is nothing that will be used again within a billion numbers: small models stay whole. A rank alone
    has all of it in any case.
    """
    if run.autocast:
        return 2 * _matrices_per_rank(run)
    return run.width * min(own, LIVE) if run.parallel.zero == 3 and run.replicas > 1 else 0


# Gradients, from one micro-batch to the next, when they are reduced, and in the step.


def _gradients(run: Run, own: int, sharded: int) -> int:
    """In the last forward pass of a step, from the micro-batches before it.

    ZeRO 0 and 1 keep all of them, ZeRO 1 in bf16 in fp32 beside those of a pass; ZeRO 2 and 3 a share in
    fp32. ZeRO 3 and ZeRO 1 in bf16 keep the room for them from step to step.
    """
    zero, several = run.parallel.zero, run.accumulated > 1
    if zero == 3:
        return 4 * sharded
    if _master_apart(run):
        return (4 + 2 * several) * own
    if not several:
        return 0
    return 4 * (sharded if zero == 2 else own)


def _bucket(run: Run, own: int) -> int:
    """Numbers in a bucket: on a GPU it is there as a whole, on a CPU as far as it is written to."""
    return run.parallel.bucket if run.cuda else min(own, run.parallel.bucket)


def _reduction(run: Run, own: int, sharded: int) -> int:
    """Gradients when the backward pass comes to the embedding, or when they are summed, if that is more.

    The embedding's are added to those of the output layer that it is tied to, and to those of the
    micro-batches before. To be summed, ZeRO 0 and BF16's ZeRO 1 flatten them, a group that is large by itself
    but for that, and the latter casts them. The others copy them into a bucket, of which the slices are
    flattened once more, and keep what this rank will step: ZeRO 1 and 2 in fp32 a copy of it; ZeRO 2 in bf16
    its share in fp32, to which slices are added that are made fp32 one by one. Of ZeRO 3's bucket a share is
    made fp32; where the bucket is scattered, gloo copies it.
    """
    zero, width = run.parallel.zero, run.width
    before = _gradients(run, own, sharded)
    if zero == 0:
        last = 4 * _embedding(run) * (2 if run.accumulated > 1 else 1)
        return 4 * own + max(4 * min(own, ALL_REDUCE), last)
    if _master_apart(run):
        return (4 + 2) * own + (4 + 2 if own <= ALL_REDUCE else 2) * own
    flattened = min(own, run.parallel.bucket)
    if zero == 3:  # the bucket is one of the parts that stay
        share = 4 * math.ceil(flattened / run.replicas) if run.bf16 else 0
        return before + width * flattened + max(share, 0 if run.cuda else width * flattened)
    overlapped = run.cuda if run.parallel.overlap == "auto" else run.parallel.overlap
    bucket = _bucket(run, own) * (2 if overlapped else 1)
    if zero == 2 and run.bf16:
        return 4 * sharded + width * (bucket + flattened) + 4 * min(_largest(run), sharded)
    kept = before if zero == 2 else 0
    return kept + width * bucket + max(width * flattened, 4 * sharded)


def _step(run: Run, own: int, sharded: int) -> int:
    """The gradients; then a norm of each in fp64, or a flat copy that ZeRO 1 in fp32, 2 in fp32, and 3 make.

    ZeRO 0's norm is computed here, without a copy.
    """
    zero, norm = run.parallel.zero, 8 * min(_largest(run), sharded)
    held = 4 * sharded
    temporary = max(norm, 4 * sharded)
    if zero == 0:
        held, temporary = 4 * own, 0
    elif _master_apart(run):
        held, temporary = (4 + 2) * own, 0
    elif zero == 2 and run.bf16:
        temporary = norm
    if isinstance(run.optimizer, Muon):
        temporary = max(temporary, _step_of_muon(run))
    return held + temporary


def _step_of_muon(run: Run) -> int:
    """What data ranks send each other, receive, and have computed; and four copies of the largest matrix."""
    matrices, ranks = _matrices_per_rank(run), run.replicas if run.parallel.zero else 1
    exchanged = 3 * 4 * math.ceil(matrices / ranks) if ranks > 1 else 0
    return exchanged + 4 * 4 * run.model.dim * run.model.hidden


def largest_micro_batch(run: Run, room: int | float) -> int:
    """The largest micro-batch that fits into `room` bytes; 0 when not even one sample does."""
    samples = run.micro_batch * run.accumulated  # of a step: fewer at once are more micro-batches

    def fits(micro_batch: int) -> bool:
        accumulated = math.ceil(samples / micro_batch)
        return memory(replace(run, micro_batch=micro_batch, accumulated=accumulated)).peak <= room

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high) and high < 2**20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
