"""How much memory a rank of a training run needs, by formula: known before anything is allocated.

What lasts (weights, fp32 master weights, moments) is what ZeRO shards (Rajbhandari et al., 2020,
https://arxiv.org/abs/1910.02054, section 5); what a forward pass leaves for the backward pass is counted as
Korthikanti et al. (2022, https://arxiv.org/abs/2205.05198, section 4) do, with the tensors that this model
saves. The rest is what DeepSpeed 0.19.8 allocates on the way. A step has four moments that may be its peak:
the start, when the model is not yet sharded; the end of the last micro-batch's forward pass; the reduction of
the gradients; and the optimizer's own step.

On a CPU only memory that is touched counts, on a GPU what is allocated. `tools/estimate_memory.py --measure`
compares the sum with the peak of real steps.
"""

import math
from dataclasses import dataclass, fields, replace

from megachat.model.gpt import GPTConfig
from megachat.model.size import parameters
from megachat.parallel.engine import Parallel
from megachat.train.optimizers import SGD, Muon, Optimizer

BUCKET = 500_000_000
"""Elements that DeepSpeed reduces at once, its default."""
LIVE = 1_000_000_000
"""Elements that ZeRO 3 leaves gathered at once, its default."""
PERSISTENT = 100_000
"""Elements of the largest parameter that ZeRO 3 never shards, its default."""
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
    """That outlive a micro-batch."""
    activations: int
    """What a forward pass leaves for the backward pass, with what one block adds while it works."""
    head: int
    """The output layer and the loss, at the end of a forward pass."""
    gathered: int
    """Weights of other ranks (ZeRO 3), or cast ones (autocast), during a pass."""
    reduction: int
    """Buffers in which gradients are summed over the ranks."""
    step: int
    """What the optimizer needs while it works."""
    start: int
    """The model in the moment before it is sharded."""

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
        held = self.lasting + self.gradients
        return {
            "forward": held + self.gathered + self.activations + self.head,
            "reduction": held + self.gathered + self.reduction,
            "step": held + self.step,
            "start": self.start,
        }

    def parts(self) -> dict[str, int]:
        """The parts by name, in order."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def memory(run: Run) -> Memory:
    """What one rank of the run needs; of tensor-parallel ranks all need the same."""
    own = parameters_per_rank(run.model, run.vocab, run.parallel.tensor)
    sharded = math.ceil(own / run.replicas)
    zero, width = run.parallel.zero, 4 if run.autocast else run.width
    cut_weights, cut_rest = zero == 3, zero > 0
    weights = width * (sharded if cut_weights else own)
    master = 4 * sharded if zero else 0
    moments = 4 * moments_of(run.optimizer) * (sharded if cut_rest else own)
    if isinstance(run.optimizer, Muon):  # of a block's matrices one number is remembered, not two
        moments -= 4 * math.ceil(_matrices_per_rank(run) / (run.replicas if cut_rest else 1))
    return Memory(
        weights=weights,
        master=master,
        moments=moments,
        gradients=_gradients(run, own, sharded),
        activations=_activations(run),
        head=_head(run),
        gathered=_gathered(run, own),
        reduction=_reduction(run, own, sharded),
        step=_step(run, own, sharded),
        start=width * own + 4 * sharded if cut_weights else 0,
    )


def parameters_per_rank(model: GPTConfig, vocab: int, tensor: int) -> int:
    """Weights that a tensor-parallel rank holds: its share of all matrices, and norms whole.

    Of a vocabulary that cannot be divided, those of the rank with the most words.
    """
    matrices = _matrices(model)
    return parameters(model, words(vocab, tensor)) - model.layers * (matrices - matrices // tensor)


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


def moments_of(optimizer: Optimizer) -> int:
    """How many numbers an optimizer remembers of each weight (Muon of what it leaves to AdamW)."""
    if isinstance(optimizer, SGD):
        return int(optimizer.momentum > 0)
    return 2


def _gradients(run: Run, own: int, sharded: int) -> int:
    """ZeRO 2 and 3 keep a share in fp32; ZeRO 1 in bf16 all of them in fp32, and those of a pass in bf16."""
    if run.parallel.zero >= 2:
        return 4 * sharded
    return (4 + 2 * (run.bf16 and run.parallel.zero == 1)) * own


def _activations(run: Run) -> int:
    """Of all blocks; with checkpointing their inputs, and all of one block."""
    block = run.tokens * block_bytes(run)
    if run.parallel.checkpointing != "none":
        return run.model.layers * run.tokens * run.width * run.model.dim + block
    return run.model.layers * block


def block_bytes(run: Run) -> int:
    """What one block leaves of one token for the backward pass.

    Two norms of width `dim` and those of queries and keys leave their input and what they made, in fp32; then
    what the matrices read (q, k, v and out; gate, up and down), what attention reads and returns, and inside
    the MLP both factors and the activation.
    """
    model, tensor, width = run.model, run.parallel.tensor, run.width
    heads, keys = model.heads * model.head_dim // tensor, model.kv_heads * model.head_dim // tensor
    hidden = model.hidden // tensor
    norms = 2 * 4 * (2 * model.dim + (heads + keys if model.qk_norm else 0))
    read = width * (2 * model.dim + heads + hidden)
    mask = width * run.seq * run.parallel.sequence  # of whole rows
    attention = width * (heads + 2 * keys) + 4 * model.heads // tensor + mask
    return norms + read + attention + width * 3 * hidden


def _head(run: Run) -> int:
    """The gradients that the loss computes with its value (`megachat/model/cross_entropy.py`).

    Those of the output layer in fp32, once more when they are scaled, and cast; those of the states twice.
    """
    states = run.width * run.tokens * run.model.dim
    return (4 + 4 + run.width) * _embedding(run) + 2 * states


def _embedding(run: Run) -> int:
    """The weights of the embedding, or of the output layer, on one tensor-parallel rank."""
    return words(run.vocab, run.parallel.tensor) * run.model.dim


def _gathered(run: Run, own: int) -> int:
    if run.autocast:
        return 2 * own
    return run.width * min(own, LIVE) if run.parallel.zero == 3 else 0


def _reduction(run: Run, own: int, sharded: int) -> int:
    """ZeRO 0 and BF16's ZeRO 1 flatten what they sum; the others copy it into buckets."""
    bucket = BUCKET if run.cuda else min(own, BUCKET)
    if run.parallel.zero == 0 or (run.parallel.zero == 1 and run.bf16):
        return (4 if run.parallel.zero == 0 else 6) * min(own, BUCKET)
    return run.width * bucket * (2 if run.cuda else 1) + run.width * min(own, BUCKET)


def _step(run: Run, own: int, sharded: int) -> int:
    """A flat copy of the gradients (but ZeRO 0 and BF16's ZeRO 1), and two temporaries of a looping Adam."""
    flat = 4 * sharded if run.parallel.zero >= 2 or (run.parallel.zero == 1 and not run.bf16) else 0
    if isinstance(run.optimizer, Muon):
        return flat + _step_of_muon(run, own)
    if run.cuda or not moments_of(run.optimizer):
        return flat
    largest = _embedding(run) if run.parallel.zero == 0 else sharded
    return flat + 2 * 4 * largest


def _step_of_muon(run: Run, own: int) -> int:
    """What data ranks send each other, receive, and have computed; and four copies of the largest matrix."""
    matrices, ranks = _matrices_per_rank(run), run.replicas if run.parallel.zero else 1
    exchanged = 3 * 4 * math.ceil(matrices / ranks) if ranks > 1 else 0
    adam = _embedding(run) if run.parallel.zero == 0 else math.ceil((own - matrices) / ranks)
    return max(exchanged + 4 * 4 * run.model.dim * run.model.hidden, 0 if run.cuda else 2 * 4 * adam)


def largest_micro_batch(run: Run, room: int | float) -> int:
    """The largest micro-batch that fits into `room` bytes; 0 when not even one sample does."""

    def fits(micro_batch: int) -> bool:
        return memory(replace(run, micro_batch=micro_batch)).peak <= room

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high) and high < 2**20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
