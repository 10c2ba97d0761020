"""The language model: a decoder of pre-norm blocks with rotary positions, grouped queries, and SwiGLU.

With `qk_norm` it computes what Qwen3 computes, without it what Llama does; the tests compare the logits.
How long the vocabulary is, is the tokenizer's to say, so it is an argument of `build` and not a setting.
Logits are most of a small model's work and most of any model's memory, so `forward` computes those that are
asked for: with a cache the last position's, with `where` those of some positions, and with `labels` none that
outlive their loss.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megachat.config import Config
from megachat.model.blueprint import Blueprint, drawn
from megachat.model.cross_entropy import IGNORE
from megachat.model.layers import MLP, VARLEN, Attention, Past, Reading, Rope, Spans
from megachat.model.moe import MoE, MoEConfig, routing
from megachat.model.precision import dtype_of_products
from megachat.model.rows import Stretch
from megachat.model.vocabulary import Embedding, Output, output

Checkpointing = Literal["none", "selective", "full"]
"""What a block computes again in the backward pass instead of remembering it: nothing; all but its products
of matrices and its attention; or everything but its input."""

PRODUCTS = {
    getattr(torch.ops.aten, name).default
    for name in (
        "mm", "_scaled_mm", "_grouped_mm", "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_efficient_attention",
    )
} | ({torch.ops.torch_attn._varlen_attn.default} if VARLEN else set())  # fmt: skip
"""What `selective` remembers. Attention on a CPU is many small products, which are computed again."""


class GPTConfig(Config):
    """The shape of a model."""

    dim: PositiveInt
    """Numbers that represent a token between blocks."""
    layers: PositiveInt
    """Blocks, each attention then MLP."""
    heads: PositiveInt
    """Query heads of each block."""
    kv_heads: PositiveInt
    """Key and value heads of each block; it divides `heads`, and tensor parallelism divides it."""
    head_dim: PositiveInt
    """Numbers in one head; even, because positions rotate pairs of them."""
    hidden: PositiveInt
    """Numbers inside the MLP, or inside each of the experts."""
    moe: MoEConfig | None
    """A mixture of experts in the place of each block's MLP; null for none."""
    context: PositiveInt
    """The longest sequence, in tokens."""
    rope_base: PositiveFloat
    """The base of the rotation wavelengths; longer contexts use larger ones."""
    qk_norm: bool
    """Whether queries and keys are normalised per head, which keeps large learning rates stable."""
    tied: bool
    """Whether the output layer is the token embedding; it saves vocab x dim parameters."""
    norm_eps: PositiveFloat
    """Added under the root of RMSNorm."""
    dropout: Annotated[float, Field(ge=0, lt=1)]
    """The share of each block's output that is dropped while training."""

    @model_validator(mode="after")
    def _consistent(self) -> "GPTConfig":
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary positions need an even one")
        return self

    def blueprint(self, vocab: int, device: torch.device | str = "cpu") -> "Blueprint[GPT]":
        """A model whose weights will be drawn on `device`; they follow from `torch.manual_seed` now."""
        with torch.device("meta"):
            model = GPT(self, vocab)
        return Blueprint(model, drawn(model, model.distribution, device))

    def build(self, vocab: int) -> "GPT":
        """A model with fresh weights, which follow from `torch.manual_seed`."""
        return self.blueprint(vocab).whole()


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.checkpointing: Checkpointing = "none"
        self.train_forward: Callable[..., tuple[Tensor, Tensor | None]] = self._train_forward
        self.attn_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attn = Attention(
            config.dim, config.heads, config.kv_heads, config.head_dim, config.qk_norm, config.norm_eps
        )
        self.mlp_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.routed = config.moe is not None
        self.mlp: nn.Module
        if config.moe is None:
            self.mlp = MLP(config.dim, config.hidden)
        else:
            self.mlp = MoE(config.dim, config.hidden, config.moe)

    def forward(
        self,
        x: Float[Tensor, "batch seq dim"],
        rope: Rope,
        mask: Bool[Tensor, "rows 1 queries past"] | Spans | None = None,
        past: Past | None = None,
    ) -> tuple[Float[Tensor, "batch seq dim"], Float[Tensor, "batch seq experts"] | None]:
        """The states one block later, and in training the scores of the router, where there is one."""
        if self.training and past is None and torch.is_grad_enabled():
            return self.train_forward(x, rope, mask)
        return self._forward(x, rope, mask, past)

    def compile(self, *arguments: Any, **named: Any) -> None:
        """From now on training runs what `torch.compile` makes of the block: its forward alone, so that hooks
        on the block itself, such as those that gather its weights (ZeRO 3), are called around it.
        """
        self.train_forward = torch.compile(self._train_forward, *arguments, **named)

    def _train_forward(
        self, x: Tensor, rope: Rope, mask: Tensor | Spans | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.checkpointing == "none":
            return self._forward(x, rope, mask)
        again = partial(checkpoint, use_reentrant=False)
        if self.checkpointing == "selective":
            again = partial(again, context_fn=partial(create_selective_checkpoint_contexts, _policy))
        y: tuple[Tensor, Tensor | None] = again(self._forward, x, rope, mask)
        return y

    def _forward(
        self,
        x: Tensor,
        rope: Rope,
        mask: Tensor | Spans | None,
        past: Past | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        x = x + F.dropout(self.attn(self.attn_norm(x), rope, mask, past), self.dropout, self.training)
        inputs = self.mlp_norm(x)
        x = x + F.dropout(self.mlp(inputs), self.dropout, self.training)
        return x, self.scores(inputs) if self.routed and self.training else None

    def scores(self, inputs: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq experts"]:
        """How the router sees the experts.

        Computed a second time, for next to nothing: DeepSpeed's layer, which takes the place of ours where
        experts are spread over ranks, keeps them to itself, and its router in a module named `gate`.
        """
        router = self.mlp.get_submodule("router")
        scores: Tensor = getattr(router, "gate", router)(inputs)
        return scores


def _policy(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


class GPT(nn.Module):
    """Tokens in, logits of each next token out."""

    tensor_plan: ClassVar[dict[str, str]] = {
        "blocks.*.attn.q": "column", "blocks.*.attn.k": "column", "blocks.*.attn.v": "column",
        "blocks.*.attn.out": "row",
        "blocks.*.mlp.gate": "column", "blocks.*.mlp.up": "column",
        "blocks.*.mlp.down": "row",
        # Whole on every rank, but each uses them on its own heads: their gradients are summed over the ranks.
        "blocks.*.attn.q_norm": "replicate-sum", "blocks.*.attn.k_norm": "replicate-sum",
        "embed": "vocab", "head": "vocab",
    }  # fmt: skip
    """How tensor parallelism cuts each module; what is not listed stays whole on every rank."""

    def __init__(self, config: GPTConfig, vocab: int) -> None:
        super().__init__()
        self.config = config
        self.vocab = vocab
        self.stretch: Stretch | None = None
        """Which tokens of each row are here; None: all."""
        self.noise = 0.0
        """Of the embeddings in training (`noisy`)."""
        self.load: Tensor | None = None
        """Of the experts, in the last forward pass of training with labels (`Routing.load`)."""
        self.embed = Embedding(vocab, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tied else Output(config.dim, vocab, bias=False)

    def distribution(self, name: str) -> tuple[float, float]:
        """Mean and deviation of fresh weights: normal of deviation 0.02, norms 1.

        What writes to the residual stream is drawn smaller by sqrt(2 x layers), so that its sum is as large
        in a deep model as in a shallow one (Radford et al., 2019).
        """
        if name.endswith("norm.weight"):
            return 1.0, 0.0
        if name.endswith(("attn.out.weight", "mlp.down.weight", "mlp.experts.down")):
            return 0.0, 0.02 / (2 * self.config.layers) ** 0.5
        return 0.0, 0.02

    def forward(
        self,
        tokens: Int[Tensor, "batch seq"],
        documents: Int[Tensor, "batch seq"] | None = None,
        cache: Reading | None = None,
        where: Bool[Tensor, "batch seq"] | None = None,
        labels: Int[Tensor, "batch seq"] | None = None,
        each: bool = False,
        scale: Float[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, "batch out vocab"] | Float[Tensor, "chosen vocab"] | Float[Tensor, "*batch"]:
        """Logits of the token after each, in the model's dtype.

        With a cache, after the last of each text alone; with `where`, after those that it marks, row by row.
        With `labels` not these, but the sum of -log p(label) in nats over the labels that are not `IGNORE`,
        each times its `scale`; with `each`, which has no gradient, its terms. Where ranks share rows, all
        give and get them whole. In training the sum's gradient is with the penalties of routers.
        """
        stretch = None if cache is not None else self.stretch
        assert stretch is None or (labels is not None and where is None and scale is None), (
            "rows are shared for their loss only"
        )
        x, scores = self._states(tokens, documents, cache)
        penalty = None
        if self.config.moe is not None and labels is not None and scores:
            assert stretch is None, "penalties are of whole rows"
            routed = routing(torch.stack(scores), labels != IGNORE, self.config.moe)
            penalty, self.load = routed.penalty, routed.load
            if scale is not None:  # the penalty is a sum over tokens, and is divided by what they count
                penalty = penalty * scale.sum() / (labels != IGNORE).sum().clamp(min=1)
        if stretch is not None and labels is not None:
            labels = stretch.own(labels)
        if cache is not None:
            x = cache.last(x)
        if where is not None:
            # In few different lengths: a CPU kernel is made anew for each, which took a sixth of the time.
            count = int(where.sum())
            x = F.pad(x[where], (0, 0, 0, -count % 128))
            labels = None if labels is None else F.pad(labels[where], (0, -count % 128), value=IGNORE)
            scale = None if scale is None else F.pad(scale[where], (0, -count % 128))
        if self.head is None:
            y = output(x, self.embed.weight, labels, each, self.embed.share, scale)
        else:
            y = self.head(x, labels, each, scale)
        if stretch is not None:
            return stretch.join(y) if each else stretch.sum(y)
        if penalty is not None and not each:
            y = y + (penalty - penalty.detach()).to(y.dtype)  # its gradient alone
        return y if where is None or y.ndim == 0 else y[:count]

    def hidden(
        self,
        tokens: Int[Tensor, "batch seq"],
        documents: Int[Tensor, "batch seq"] | None = None,
        cache: Reading | None = None,
    ) -> Float[Tensor, "batch here dim"]:
        """The normalised states that `forward` reads logits from; where ranks share rows, of the tokens here.

        With `documents`, a token sees only its own document. Positions are relative, so they run on. They
        are best left on the CPU: they are turned there into what a GPU's kernel wants, without waiting.
        """
        return self._states(tokens, documents, cache)[0]

    def _states(
        self, tokens: Tensor, documents: Tensor | None, cache: Reading | None
    ) -> tuple[Float[Tensor, "batch here dim"], list[Tensor]]:
        """The states, and in training the scores of each block's router."""
        assert documents is None or cache is None, "a cache holds one document per row"
        seq = tokens.shape[1]
        needed = seq if cache is None else cache.cache.capacity
        if needed > self.config.context:
            raise ValueError(
                f"a sequence of {needed} tokens is longer than the model's context={self.config.context}; "
                "shorten it (prompt plus max_new_tokens), or use a model with a longer context"
            )
        first = 0
        if cache is None and self.stretch is not None:
            first, tokens = self.stretch.start(seq), self.stretch.own(tokens)
        x = self.embed(tokens)
        if self.noise and self.training and torch.is_grad_enabled():
            assert self.stretch is None, "noise depends on how long a whole row is"
            x = noisy(x, torch.zeros_like(tokens) if documents is None else documents, self.noise)
        positions = torch.arange(first, first + tokens.shape[1], device=tokens.device)
        if cache is not None:
            positions = cache.places(seq, x.device)
        rope = Rope.at(positions, self.config.head_dim, self.config.rope_base, x.dtype)
        mask: Tensor | Spans | None = None
        if cache is not None:
            mask = cache.mask(positions)
        elif (
            documents is not None
            and documents.device.type == "cpu"
            and Spans.fit(x.device, dtype_of_products(x))
        ):
            mask = Spans.of(documents, x.device)
        elif documents is not None:
            mask = same_document(documents.to(x.device))
        routed = []
        for index, block in enumerate(self.blocks):
            x, scores = block(x, rope, mask, cache and Past(cache, index, positions))
            routed.append(scores)
        states: Tensor = self.norm(x)
        return states, [scores for scores in routed if scores is not None]


def noisy(
    x: Float[Tensor, "batch seq dim"], documents: Int[Tensor, "batch seq"], alpha: float
) -> Float[Tensor, "batch seq dim"]:
    """Embeddings with the noise of NEFTune (Jain et al., 2023, https://arxiv.org/abs/2310.05914).

    A document of `seq` tokens gets uniform noise of up to alpha / sqrt(seq dim) in each number, whatever else
    is in its row: the sum of its squares is alpha^2 / 3 on average, however long the document is.
    """
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    place = begins.flatten().cumsum(0) - 1
    lengths = place.bincount()[place].view(documents.shape)
    most = (alpha / (lengths * x.shape[-1]) ** 0.5).to(x)
    return x + (torch.rand_like(x) * 2 - 1) * most[..., None]


def same_document(documents: Int[Tensor, "batch seq"]) -> Bool[Tensor, "batch 1 seq seq"]:
    """Causal attention that does not cross from one document into another."""
    return (documents[:, :, None] == documents[:, None, :]).tril()[:, None]
