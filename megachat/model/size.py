"""How large a model is and what a token costs, by formula: known before anything is allocated."""

from megachat.model.gpt import GPTConfig


def parameters(config: GPTConfig, vocab: int) -> int:
    """Every weight of `config.build(vocab)`."""
    norms = 2 * config.dim + (2 * config.head_dim if config.qk_norm else 0)
    embeddings = vocab * config.dim * (1 if config.tied else 2)
    return config.layers * (_matrices(config) + norms) + config.dim + embeddings


def flops_per_token(config: GPTConfig, vocab: int, seq: int) -> int:
    """Multiplications and additions for one token of a sequence of `seq`, forward and backward.

    A weight costs 2 forward and 4 backward. Attention is counted as the causal half of the square, which is
    all that has to be computed; figures that count the whole square (PaLM's, nanoGPT's) are higher. What
    activation checkpointing computes again is not counted.
    """
    weights = config.layers * _matrices(config) + vocab * config.dim
    # Scores and their weighted sum: 2 products of 2 flops with seq / 2 keys, forward once and backward twice.
    attention = config.layers * 6 * seq * config.heads * config.head_dim
    return 6 * weights + attention


def _matrices(config: GPTConfig) -> int:
    """The weights of one block that tokens are multiplied with."""
    attention = config.dim * config.head_dim * (2 * config.heads + 2 * config.kv_heads)
    return attention + 3 * config.dim * config.hidden
