"""The parts of a block: rotary positions, grouped-query attention, SwiGLU, and the cache of keys and values.

Every `nn.Linear` here may be swapped for a sharded one that returns this rank's share of the columns, so no
forward asks how many heads there are: it unflattens with -1. Rotations are made anew in each forward, once
for all layers, so that `model.bfloat16()`, the meta device, and ZeRO find no buffer to spoil.
"""

import inspect
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from megachat.model.attention import attend
from megachat.model.precision import as_multiplied
from megachat.model.rows import Stretch

try:  # torch 2.9 has none, and the first ones shared no heads
    from torch.nn.attention.varlen import varlen_attn

    VARLEN = {"window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)
except ImportError:
    VARLEN = False


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding (Su et al., 2021, https://arxiv.org/abs/2104.09864), for one forward.

    A head's first half is rotated against its second, as in the published Llama and Qwen checkpoints:
    (a, b) becomes (a cos - b sin, b cos + a sin).
    """

    cos: Float[Tensor, "seq 1 head_dim"]
    sin: Float[Tensor, "seq 1 head_dim"]
    """Of which the first half is negative."""

    @staticmethod
    def at(positions: Int[Tensor, " seq"], head_dim: int, base: float, dtype: torch.dtype) -> "Rope":
        """The rotations of tokens at `positions`. Angles are fp32; bf16 could not tell 4096 from 4097."""
        exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
        angles = positions[:, None, None].float() * base**-exponents
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
class Past:
    """The keys and values one layer has seen, allocated for as many heads as the first key has."""

    capacity: int
    k: Tensor | None = None
    v: Tensor | None = None

    def extend(self, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores what stands at `start` and after, and returns everything up to there."""
        if self.k is None or self.v is None:
            batch, heads, _, head_dim = k.shape
            self.k = k.new_empty(batch, heads, self.capacity, head_dim)
            self.v = v.new_empty(batch, heads, self.capacity, head_dim)
        end = start + k.shape[2]
        self.k[:, :, start:end] = k
        self.v[:, :, start:end] = v
        return self.k[:, :, :end], self.v[:, :, :end]


@dataclass(slots=True)
class Cache:
    """What a model remembers of the tokens it has read, so that the next one costs one position.

    Rows of different lengths are padded on the left: `padding` counts a row's pads, which nothing attends to.
    Rotary positions are relative, so it does not matter that a padded row starts late.
    """

    capacity: int
    padding: Int[Tensor, " batch"] | None = None
    length: int = 0
    layers: dict[int, Past] = field(default_factory=dict)

    def layer(self, index: int) -> Past:
        """The past of layer `index`."""
        return self.layers.setdefault(index, Past(self.capacity))

    def mask(self, seq: int, device: torch.device) -> Bool[Tensor, "rows 1 seq past"] | None:
        """Which keys the next `seq` tokens see; None where plain causal attention, or all of it, is right.

        Pads see pads, or their softmax would have nothing to sum and fill the cache with NaN.
        """
        if self.padding is None and (seq == 1 or self.length == 0):
            return None
        keys = torch.arange(self.length + seq, device=device)
        queries = keys[self.length :]
        visible = (keys <= queries[:, None])[None]
        if self.padding is not None:
            real = keys >= self.padding[:, None]
            visible = visible & (real[:, None, :] == real[:, self.length :, None])
        return visible[:, None]

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Forgets every row but `rows`."""
        if self.padding is not None:
            self.padding = self.padding[rows]
        for past in self.layers.values():
            assert past.k is not None, "rows are forgotten after they were read"
            assert past.v is not None
            past.k, past.v = past.k[rows], past.v[rows]


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
        start: int = 0,
    ) -> Float[Tensor, "batch seq dim"]:
        """What each token gathers from those it sees: by `mask`, or without one, all up to itself."""
        # -1, not a number of heads: under tensor parallelism this rank holds only its own share of them.
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (self.q(x), self.k(x), self.v(x)))
        q, k = rope(self.q_norm(q)), rope(self.k_norm(k))
        if self.stretch is not None and past is None:
            y = self.stretch.attend(self._gather, q, k, v, mask)
        else:
            y = self._gather(q, k, v, mask, past, start)
        gathered: Tensor = self.out(y.flatten(-2))
        return gathered

    def _gather(
        self,
        q: Float[Tensor, "batch seq heads head_dim"],
        k: Float[Tensor, "batch seq kv_heads head_dim"],
        v: Float[Tensor, "batch seq kv_heads head_dim"],
        mask: Tensor | Spans | None,
        past: Past | None = None,
        start: int = 0,
    ) -> Float[Tensor, "batch seq heads head_dim"]:
        """Over whole rows, of the heads that are here."""
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # batch heads seq head_dim
        # Fewer query heads per key head would pair heads that were not trained together, without a word.
        assert q.shape[1] == self.group * k.shape[1], f"{q.shape[1]} query heads for {k.shape[1]} key heads"
        if isinstance(mask, Spans):
            y = self._attend_within(q, k, v, mask)
        elif past is None and q.device.type == "cpu":
            y = attend(q, k, v, mask)
        else:
            y = self._attend(q, k, v, mask, past, start)
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
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, past: Past | None, start: int
    ) -> Float[Tensor, "batch heads seq head_dim"]:
        """By torch's kernels: on a GPU, and where there is a past."""
        if past is not None:
            k, v = past.extend(start, k, v)
        causal = mask is None and q.shape[2] == k.shape[2]
        shared = self.group > 1
        if shared and mask is not None and q.is_cuda:
            # With a mask, CUDA shares heads only in the kernel that holds all scores in memory.
            k, v = (t.repeat_interleave(self.group, dim=1) for t in (k, v))
            shared = False
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=shared)


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
