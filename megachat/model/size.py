"""How large a model is and what training it takes, by formula: known before anything is allocated."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megachat.model.gpt import GPTConfig

Number = int | float


def parameters(config: GPTConfig, vocab: int) -> int:
    """Every weight of `config.build(vocab)`."""
    norms = 2 * config.dim + (2 * config.head_dim if config.qk_norm else 0)
    embeddings = vocab * config.dim * (1 if config.tied else 2)
    experts = 1 if config.moe is None else config.moe.experts
    return config.layers * (_matrices(config, experts) + norms) + config.dim + embeddings


def active_parameters(config: GPTConfig, vocab: int) -> int:
    """Those that have a part in what becomes of one token: all, but for the experts it does not pass through.

    Example: of 8 experts of 3 x 256 x 256 a token passes through 2, so that in each block 6 are left out.
    """
    if config.moe is None:
        return parameters(config, vocab)
    idle = config.moe.experts - config.moe.per_token
    return parameters(config, vocab) - config.layers * idle * 3 * config.dim * config.hidden


@dataclass(frozen=True)
class Work:
    """What a batch asks of a model. Padding is nothing."""

    tokens: Number
    """How many go in."""
    pairs: Number
    """How many pairs there are of a token and one that it sees: itself, or one before it in its document."""
    logits: Number
    """After how many of them it is asked for the next one's logits."""

    @classmethod
    def of(cls, lengths: Sequence[int], logits: Number) -> "Work":
        """Of documents so many tokens long, none of which sees another.

        Example: Work.of([3, 2], 4) -> Work(tokens=5, pairs=9, logits=4): 1 + 2 + 3 and 1 + 2.
        """
        return cls(sum(lengths), sum(length * (length + 1) // 2 for length in lengths), logits)


NOTHING = Work(0, 0, 0)


def forward_flops(config: GPTConfig, vocab: int, work: Work) -> Number:
    """Multiplications and additions of a forward pass.

    2 for each token and weight of the blocks' matrices, among which grouped queries make those of keys and
    values smaller; of a mixture of experts those count that the token passes through, and the router. 4 for
    each pair, head and number in it (the score, and the value added by it); 2 for each logit and number in a
    state, whether the output layer is tied or not. Looking up an embedding takes none, and norms, rotations,
    softmax and SwiGLU's product are left out: below 1 % of models worth the question.
    """
    active = 1 if config.moe is None else config.moe.per_token
    blocks = 2 * _matrices(config, active) * work.tokens + 4 * config.heads * config.head_dim * work.pairs
    return config.layers * blocks + 2 * config.dim * vocab * work.logits


@dataclass(frozen=True)
class Flops:
    """What it takes to train a model: the numerators of MFU and HFU, over all ranks.

    A weight costs 2 forward and 4 backward, so training takes as much as three forward passes. Attention is
    counted by the pairs that see each other, which is all that has to be computed: figures that count the
    causal half of the whole row, or all of it (PaLM's, nanoGPT's), are higher. What is computed and does not
    have to be is not counted: padding, pairs that are masked, what was done for a step that is then skipped.
    """

    config: GPTConfig
    vocab: int
    """0 for a model that gives no logits."""
    passes: int
    """Forward passes that a step takes as much as."""
    recomputed: Literal["none", "attention", "blocks"]
    """What is computed again in the backward pass."""
    frozen: bool = False
    """Whether the weights stay as they are (LoRA): then a weight costs 2 backward, for what is before it. The
    small matrices are left out: rank x (1/inputs + 1/outputs) as much, 0.8 % of rank 16 at 4096 x 4096."""

    def of_model(self, work: Work) -> Number:
        """What the losses and gradients take, however they are computed."""
        needed = self.passes * forward_flops(self.config, self.vocab, work)
        if self.frozen:
            needed -= forward_flops(self.config, self.vocab, replace(work, pairs=0))
        return needed

    def of_hardware(self, work: Work) -> Number:
        """With what activation checkpointing computes again: of whole blocks not their last product.

        Of a mixture of experts that, too: how much an expert counts has a gradient, which is made of what the
        expert gave.
        """
        config, needed = self.config, self.of_model(work)
        if self.recomputed == "none":
            return needed
        if self.recomputed == "attention":
            return needed + 4 * config.layers * config.heads * config.head_dim * work.pairs
        last = 0 if config.moe else 2 * config.layers * config.hidden * config.dim * work.tokens
        return needed + forward_flops(config, 0, work) - last


def flops_per_token(config: GPTConfig, vocab: int, seq: int) -> int:
    """What training takes for a token of rows of `seq` that are one document each."""
    return round(Flops(config, vocab, 3, "none").of_model(Work(1, seq / 2, 1)))


def _matrices(config: GPTConfig, experts: int) -> int:
    """The weights of one block in matrices, of so many experts; without a mixture the MLP counts as one."""
    attention = config.dim * config.head_dim * (2 * config.heads + 2 * config.kv_heads)
    router = 0 if config.moe is None else config.dim * config.moe.experts
    return attention + router + experts * 3 * config.dim * config.hidden
