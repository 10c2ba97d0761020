"""A language model as a folder that transformers, vLLM and many others read: `config.json` and safetensors.

With `qk_norm` it is their Qwen3, without it their Llama: the same computation, under other names.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megachat.files import replacing, write_json
from megachat.model.gpt import GPTConfig

SHARD = 4 * 2**30
"""Bytes of one file, about, at most; more than one are listed in an index."""
TOPS = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
PARTS = {
    "attn_norm": "input_layernorm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "attn.out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
"""Of a block."""


def settings(config: GPTConfig, vocab: int, dtype: torch.dtype) -> dict[str, Any]:
    """What `config.json` says of a model; `dtype` is that of its weights on disk.

    Raises:
        ValueError: what the model computes has no equal there.
    """
    if config.moe is not None:
        raise ValueError(
            "model.moe: a mixture of experts cannot be handed to vLLM or transformers yet; use a model "
            "with moe=null"
        )
    family = "Qwen3" if config.qk_norm else "Llama"
    rope = {"rope_type": "default", "rope_theta": config.rope_base}
    return {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": family.lower(),
        "vocab_size": vocab,
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "rope_theta": config.rope_base,  # where readers older than rope_parameters look
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "dtype": str(dtype).removeprefix("torch."),
    }


def name_of(name: str) -> str:
    """What a parameter is called there.

    Example: blocks.3.attn_norm.weight -> model.layers.3.input_layernorm.weight
    """
    path, _, last = name.rpartition(".")
    if found := re.fullmatch(r"blocks\.(\d+)\.(.+)", path):
        return f"model.layers.{found[1]}.{PARTS[found[2]]}.{last}"
    return f"{TOPS[path]}.{last}"


def write(
    folder: Path,
    config: GPTConfig,
    vocab: int,
    weights: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    shard: int = SHARD,
) -> None:
    """Writes the folder, whole or not at all, from full weights by our names, one after the other."""
    said = settings(config, vocab, dtype)
    with replacing(folder) as temporary:
        temporary.mkdir()
        places: dict[str, str] = {}
        held: dict[str, Tensor] = {}
        files = sizes = total = 0

        def flush(file: str) -> None:
            save_file(held, temporary / file, {"format": "pt"})
            places.update(dict.fromkeys(held, file))
            held.clear()

        for name, weight in weights:
            tensor = weight.detach().to("cpu", dtype).contiguous()
            if held and sizes + tensor.nbytes > shard:
                files += 1
                flush(f"model-{files:05d}.safetensors")
                sizes = 0
            held[name_of(name)] = tensor
            sizes, total = sizes + tensor.nbytes, total + tensor.nbytes
        flush(f"model-{files + 1:05d}.safetensors" if files else "model.safetensors")
        if files:
            write_json(
                temporary / "model.safetensors.index.json",
                {"metadata": {"total_size": total}, "weight_map": places},
            )
        write_json(temporary / "config.json", said)
