"""From a model's size to its tokens, batch, learning rate and weight decay: rules that others have fitted.

A YAML writes `${derived:optimal_batch,${model},${tokens},${context}}` for what `optimal_batch` below makes of
these settings, as `conf/experiment/depth/` does. What is derived is written down as a plain number with all
other settings. A setting that is given is not derived, and what follows from it follows from what was given.

- Shape: 64 numbers wide for every block, as nanochat's dial has it; how wide and how deep matters little for
  the same size (Kaplan et al., 2020, https://arxiv.org/abs/2001.08361, section 3.1).
- Tokens: 20 for every parameter (Hoffmann et al., 2022, https://arxiv.org/abs/2203.15556, table 3).
  Of a mixture of experts those count, here and below, that a token passes through.
- Batch and learning rate: 0.2920 C^0.3271 tokens and 0.3118 C^-0.1250, where C is the compute of the whole
  run (DeepSeek LLM, 2024, https://arxiv.org/abs/2401.02954, section 3.1), with AdamW, betas 0.9 and 0.95,
  weight decay 0.1, norms of gradients clipped at 1, and a rate that stays at its peak for most of the run.
  Fitted between 1e17 and 2e19 FLOPs; beyond is extrapolated, as they did themselves to 8e22 and 1e24.
- A batch smaller than that: the learning rate shrinks with its square root (Malladi et al., 2022,
  https://arxiv.org/abs/2205.10287). With a larger one it stays, for past the critical batch a step gets no
  better (McCandlish et al., 2018, https://arxiv.org/abs/1812.06162).
- Weight decay: 0.1 at 20 tokens a parameter. Elsewhere the share of the run that AdamW averages over,
  batch / (learning rate x weight decay x tokens), falls with the tokens a parameter to the power of -0.527
  (Bergsma et al., 2025, https://arxiv.org/abs/2505.13738). They fitted it with another parametrization, so
  that the exponent alone is taken from there.
"""

import math

from pydantic import PositiveFloat, PositiveInt, validate_call

from megachat.model.gpt import GPTConfig
from megachat.model.size import active_parameters

ASPECT = 64
"""Numbers of width for every block."""
TOKENS_PER_PARAMETER = 20
DECAY = 0.1
"""The weight decay with which batch and learning rate were fitted."""


@validate_call
def dim(layers: PositiveInt, head_dim: PositiveInt) -> int:
    """64 for every block, in whole heads.

    Example: dim(13, 128) -> 896, for 832 is six and a half
    """
    return math.ceil(ASPECT * layers / head_dim) * head_dim


@validate_call
def heads(dim: PositiveInt, head_dim: PositiveInt) -> int:
    """As many as fit; one at least."""
    return max(1, dim // head_dim)


@validate_call
def hidden(dim: PositiveInt) -> int:
    """8/3 of the width, in multiples of 256: three matrices of SwiGLU then weigh as much as two of width 4
    (Touvron et al., 2023, https://arxiv.org/abs/2302.13971).
    """
    return math.ceil(8 * dim / 3 / 256) * 256


@validate_call
def optimal_tokens(model: GPTConfig, vocab: PositiveInt) -> int:
    """Compute-optimal: 20 for every parameter that a token passes through."""
    return TOKENS_PER_PARAMETER * active_parameters(model, vocab)


@validate_call
def optimal_batch(model: GPTConfig, tokens: PositiveInt, context: PositiveInt) -> int:
    """Rows of one step: a power of 2, which any number of GPUs one is likely to have divides."""
    best = 0.2920 * compute(model, tokens, context) ** 0.3271
    return int(2 ** max(0, round(math.log2(best / context))))


@validate_call
def learning_rate(model: GPTConfig, tokens: PositiveInt, context: PositiveInt, batch: PositiveInt) -> float:
    """The peak, to three digits, for a batch of so many rows."""
    smaller = min(1.0, math.sqrt(batch / optimal_batch(model, tokens, context)))
    return float(f"{0.3118 * compute(model, tokens, context) ** -0.1250 * smaller:.3g}")


@validate_call
def weight_decay(
    model: GPTConfig,
    vocab: PositiveInt,
    tokens: PositiveInt,
    context: PositiveInt,
    batch: PositiveInt,
    lr: PositiveFloat,
) -> float:
    """As much as leaves AdamW the same memory as at 20 tokens a parameter, but for their power law."""
    usual = TOKENS_PER_PARAMETER * active_parameters(model, vocab)
    usual_rows = optimal_batch(model, usual, context)
    usual_lr = learning_rate(model, usual, context, usual_rows)
    share = (batch / (lr * tokens)) / (usual_rows / (usual_lr * usual))
    return float(f"{DECAY * share * (tokens / usual) ** 0.527:.3g}")


def compute(model: GPTConfig, tokens: int, context: int) -> float:
    """FLOPs of the run as DeepSeek LLM counts them: without embedding and head, attention as a whole square.

    Example: their 7B, 30 blocks of 4,096 with rows of 4,096, costs 72 x 30 x 4096^2 + 12 x 30 x 4096 x 4096
    for each token.
    """
    attention = 12 * model.layers * model.heads * model.head_dim * context
    return float((6 * active_parameters(model, 0) + attention) * tokens)
