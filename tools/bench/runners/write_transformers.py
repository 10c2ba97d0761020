"""`write_transformers.py ASK.json RESULT.json`: transformers' `generate`, with Qwen3's or Llama's model."""

import sys
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM, set_seed

from tools.bench.ask import Ask, until

NAMES = {
    "embed": "model.embed_tokens", "blocks": "model.layers", "attn": "self_attn", "q": "q_proj",
    "k": "k_proj", "v": "v_proj", "out": "o_proj",
    "gate": "gate_proj", "up": "up_proj", "down": "down_proj",
    "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "norm": "model.norm",
    "head": "lm_head",
}  # fmt: skip
"""What a part of a parameter's name is called there."""


def build(ask: Ask) -> Any:
    """The model with the weights that are asked for."""
    shape = ask.model
    settings = {
        "vocab_size": ask.vocab, "hidden_size": shape["dim"], "intermediate_size": shape["hidden"],
        "num_hidden_layers": shape["layers"], "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"], "head_dim": shape["head_dim"],
        "max_position_embeddings": shape["context"], "rms_norm_eps": shape["norm_eps"],
        "tie_word_embeddings": shape["tied"], "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape["rope_base"]},
    }  # fmt: skip
    model = (
        Qwen3ForCausalLM(Qwen3Config(**settings))
        if shape["qk_norm"]
        else LlamaForCausalLM(LlamaConfig(**settings))
    )
    weights = {
        ".".join(NAMES.get(part, part) for part in name.split(".")): value
        for name, value in load_file(ask.weights).items()
    }
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert missing == (["lm_head.weight"] if shape["tied"] else []), missing
    return model.to(getattr(torch, ask.precision)).eval()


def main() -> None:
    """Answers."""
    ask = Ask.read(sys.argv[1])
    model = build(ask)
    longest = max(map(len, ask.prompts))
    pads = [longest - len(prompt) for prompt in ask.prompts]
    tokens = torch.tensor([[0] * n + prompt for n, prompt in zip(pads, ask.prompts, strict=True)])
    real = torch.tensor([[0] * n + [1] * (longest - n) for n in pads])
    # Without top_k, which is 50 unless said otherwise.
    sampled = {"do_sample": True, "temperature": ask.temperature, "top_k": 0, "top_p": 1.0}

    def answer(number: int) -> list[list[int]]:
        set_seed(number)
        written = model.generate(
            tokens,
            attention_mask=real,
            max_new_tokens=ask.new,
            pad_token_id=0,
            eos_token_id=ask.stop or None,
            **(sampled if ask.temperature else {"do_sample": False}),
        )
        return [until(row, ask.stop) for row in written[:, longest:].tolist()]

    ask.answered(answer, sys.argv[2])


if __name__ == "__main__":
    main()
