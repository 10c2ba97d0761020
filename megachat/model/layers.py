"""The parts of a block: rotary positions, grouped-query attention, SwiGLU, and the cache of keys and values.

Every `nn.Linear` here may be swapped for a sharded one that returns this rank's share of the columns, so no
forward asks how many heads there are: it unflattens with -1. Rotations are made anew in each forward, once
for all layers, so that `model.bfloat16()`, the meta device, and ZeRO find no buffer to spoil.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from megachat.model.attention import attend, look_back
from megachat.model.precision import as_multiplied
from megachat.model.rows import Stretch

try:  # torch 2.9 has none, and the first ones shared no heads
    from torch.nn.attention.varlen import varlen_attn

    VARLEN = {"window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)
except ImportError:
    VARLEN = False

STEP = 64
"""What is remembered is looked at as if it were a multiple of this long."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding (Su et al., 2021, https://arxiv.org/abs/2104.09864), for one forward.

    A head's first half is rotated against its second, as in the published Llama and Qwen checkpoints:
    (a, b) becomes (a cos - b sin, b cos + a sin).
    """

    cos: Float[Tensor, "*rows seq 1 head_dim"]
    sin: Float[Tensor, "*rows seq 1 head_dim"]
    """Of which the first half is negative."""

    @staticmethod
    def at(positions: Int[Tensor, "*rows seq"], head_dim: int, base: float, dtype: torch.dtype) -> "Rope":
        """The rotations of tokens at `positions`. Angles are fp32; bf16 could not tell 4096 from 4097."""
        exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
        angles = positions[..., None, None].float() * base**-exponents
        cos, sin = angles.cos(), angles.sin()
        return Rope(torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype))

    def __call__(
        self, x: Float[Tensor, "batch seq heads head_dim"]
    ) -> Float[Tensor, "batch seq heads head_dim"]:
        """Each head turned by its token's angles."""
        return x * self.cos + x.roll(x.shape[-1] // 2, -1) * self.sin


@dataclass(frozen=True, slots=True)
class Spans:
    """Where the documents of a batch begin when its rows are laid end to end, and where the last one ends.

    With these a GPU computes the pairs that see each other and no others; a mask has it compute the square.
    """

    starts: Int[Tensor, " documents_and_one"]
    longest: int
    """No document has more tokens."""

    @staticmethod
    def of(documents: Int[Tensor, "batch seq"], device: torch.device) -> "Spans":
        """Of documents that are on the CPU: the GPU is not waited for."""
        first = torch.ones_like(documents, dtype=torch.bool)
        first[:, 1:] = documents[:, 1:] != documents[:, :-1]
        starts = torch.cat((first.flatten().nonzero().flatten(), torch.tensor([documents.numel()])))
        return Spans(starts.to(torch.int32).to(device, non_blocking=True), documents.shape[1])

    @staticmethod
    def fit(device: torch.device, dtype: torch.dtype) -> bool:
        """Whether there is a kernel."""
        if not VARLEN or device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
            return False
        return torch.cuda.get_device_capability(device) >= (8, 0)


@dataclass(slots=True)
class Cache:
    """What a model remembers of the texts it reads, so that the next token of each costs one position.

    A text has a slot, with room for at most `capacity` tokens, made as they come. Each begins at the slot's
    beginning, whatever the others do: its keys are rotated as in training, and its numbers do not depend on
    its neighbours.
    """

    slots: int
    capacity: int
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Keys and values of each layer: slots kv_heads room head_dim."""
    room: int = 0
    """Tokens of a text that there is memory for."""

    def read(self, starts: Sequence[int], seq: int, counts: Sequence[int] = (), first: int = 0) -> "Reading":
        """The next `seq` tokens of the texts in the slots from `first` on, of which they have read `starts`.

        Where a text has fewer new tokens, `counts`, its row is padded on the right: nothing that counts sees
        a pad, and what is remembered of it is written over.
        """
        longest = max(starts) + seq
        assert longest <= self.capacity, "a text is longer than its slot"
        # In steps: a CPU kernel is made anew for each length. And better the whole memory than most of it,
        # which it would copy first.
        reach = min(self.capacity, -(-longest // STEP) * STEP)
        self._grow(reach)
        reach = (self.room if 4 * reach > 3 * self.room else reach) if any(starts) else 0
        return Reading(self, first, [*starts], [*counts] if counts and min(counts) < seq else [], reach)

    def _grow(self, room: int) -> None:
        """Makes room for texts of so many tokens."""
        if room <= self.room:
            return
        self.room = room
        for layer, both in self.layers.items():
            k, v = (F.pad(one, (0, 0, 0, room - one.shape[2])) for one in both)
            self.layers[layer] = k, v

    def move(self, source: int, target: int) -> None:
        """What is remembered of the text in one slot goes to another."""
        for k, v in self.layers.values():
            k[target], v[target] = k[source], v[source]

    def of(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer, with room for heads like these."""
        if layer not in self.layers:
            _, heads, _, head_dim = k.shape
            shape = self.slots, heads, self.room, head_dim
            # Zeros, for a weight of 0 does not hide a NaN.
            self.layers[layer] = k.new_zeros(shape), v.new_zeros(shape)
        return self.layers[layer]


@dataclass(frozen=True, slots=True)
class Reading:
    """What one forward pass reads of the texts in a cache: a row of tokens for each.

    In plain numbers, because DeepSpeed compares what tensor ranks are given, and cannot compare tensors here.
    """

    cache: Cache
    first: int
    """The slot of the first row's text; the others follow."""
    starts: list[int]
    """How many tokens of each text were read before."""
    counts: list[int]
    """How many tokens of each row are of its text; of none: all."""
    reach: int
    """The longest text ends here or before; 0 where nothing was read before."""

    def places(self, seq: int, device: torch.device) -> Int[Tensor, "rows seq"]:
        """Where in its text each token stands."""
        return torch.tensor(self.starts, device=device)[:, None] + torch.arange(seq, device=device)

    def mask(self, places: Int[Tensor, "rows seq"]) -> Bool[Tensor, "rows 1 seq past"] | None:
        """Which remembered tokens each sees; None where all are new, and attention is plainly causal."""
        if not self.reach:
            return None
        return (torch.arange(self.reach, device=places.device) <= places[..., None])[:, None]

    def last(self, x: Float[Tensor, "rows seq dim"]) -> Float[Tensor, "rows 1 dim"]:
        """What stands at the last token of each text."""
        if not self.counts:
            return x[:, -1:]
        return x[range(len(x)), [count - 1 for count in self.counts]][:, None]


@dataclass(frozen=True, slots=True)
class Past:
    """What one layer remembers of the texts that are read."""

    reading: Reading
    layer: int
    places: Int[Tensor, "rows seq"]
    """Where in its text each token that is read stands."""

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Remembers keys and values (rows kv_heads seq head_dim), and returns all that may be seen."""
        keys, values = self.reading.cache.of(self.layer, k, v)
        first = self.reading.first
        here = slice(first, first + len(k))
        if not self.reading.reach:
            keys[here, :, : k.shape[2]], values[here, :, : k.shape[2]] = k, v
            return k, v
        rows = torch.arange(first, first + len(k), device=k.device)[:, None]
        keys[rows, :, self.places], values[rows, :, self.places] = k.transpose(1, 2), v.transpose(1, 2)
        return keys[here, :, : self.reading.reach], values[here, :, : self.reading.reach]


class Attention(nn.Module):
    """Causal self-attention; groups of query heads share a key head (https://arxiv.org/abs/2305.13245).

    With `qk_norm`, queries and keys are normalised per head before they are rotated, as Qwen3 does.
    """

    def __init__(self, dim: int, heads: int, kv_heads: int, head_dim: int, qk_norm: bool, eps: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.stretch: Stretch | None = None
        """Which tokens of each row are here; None: all."""
        self.group = heads // kv_heads
        self.q = nn.Linear(dim, heads * head_dim, bias=False)
        self.k = nn.Linear(dim, kv_heads * head_dim, bias=False)
        self.v = nn.Linear(dim, kv_heads * head_dim, bias=False)
        self.q_norm = nn.RMSNorm(head_dim, eps) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim, eps) if qk_norm else nn.Identity()
        self.out = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch seq dim"],
        rope: Rope,
        mask: Bool[Tensor, "rows 1 queries past"] | Spans | None = None,
        past: Past | None = None,
    ) -> Float[Tensor, "batch seq dim"]:
        """What each token gathers from those it sees: by `mask`, or without one, all up to itself."""
        # -1, not a number of heads: under tensor parallelism this rank holds only its own share of them.
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (self.q(x), self.k(x), self.v(x)))
        q, k = rope(self.q_norm(q)), rope(self.k_norm(k))
        if self.stretch is not None and past is None:
            y = self.stretch.attend(self._gather, q, k, v, mask)
        else:
            y = self._gather(q, k, v, mask, past)
        gathered: Tensor = self.out(y.flatten(-2))
        return gathered

    def _gather(
        self,
        q: Float[Tensor, "batch seq heads head_dim"],
        k: Float[Tensor, "batch seq kv_heads head_dim"],
        v: Float[Tensor, "batch seq kv_heads head_dim"],
        mask: Tensor | Spans | None,
        past: Past | None = None,
    ) -> Float[Tensor, "batch seq heads head_dim"]:
        """Over whole rows, of the heads that are here."""
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # batch heads seq head_dim
        # Fewer query heads per key head would pair heads that were not trained together, without a word.
        assert q.shape[1] == self.group * k.shape[1], f"{q.shape[1]} query heads for {k.shape[1]} key heads"
        if past is not None:
            q, k, v = (as_multiplied(t) for t in (q, k, v))
            k, v = past.extend(k, v)
        if isinstance(mask, Spans):
            y = self._attend_within(q, k, v, mask)
        elif q.device.type != "cpu":
            y = self._attend(q, k, v, mask)
        elif past is not None and mask is not None:
            y = look_back(q, k, v, mask)
        else:
            y = attend(q, k, v, mask)
        return y.transpose(1, 2)

    def _attend_within(
        self, q: Tensor, k: Tensor, v: Tensor, spans: Spans
    ) -> Float[Tensor, "batch heads seq head_dim"]:
        """Each document by itself."""
        batch = len(q)
        # Autocast does not know this kernel. Then: batch x seq, heads, head_dim.
        q, k, v = (as_multiplied(t).transpose(1, 2).flatten(0, 1) for t in (q, k, v))
        starts, longest = spans.starts, spans.longest
        y: Tensor = varlen_attn(
            q, k, v, starts, starts, longest, longest, window_size=(-1, 0), enable_gqa=self.group > 1
        )  # type: ignore[assignment]
        return y.unflatten(0, (batch, -1)).transpose(1, 2)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Float[Tensor, "batch heads seq head_dim"]:
        """By torch's kernels, on a GPU."""
        shared = self.group > 1
        if shared and mask is not None and q.is_cuda:
            # With a mask, CUDA shares heads only in the kernel that holds all scores in memory.
            k, v = (t.repeat_interleave(self.group, dim=1) for t in (k, v))
            shared = False
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=shared)


class MLP(nn.Module):
    """SwiGLU (Shazeer, 2020, https://arxiv.org/abs/2002.05202)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq dim"]:
        """Each token by itself."""
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y
