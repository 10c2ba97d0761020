"""`write_megachat.py ASK.json RESULT.json`: megachat's own `generate`."""

import sys

import torch
from safetensors.torch import load_file

from megachat.model.generate import Sampling, generate
from megachat.model.gpt import GPTConfig
from tools.bench.ask import Ask


def main() -> None:
    """Answers."""
    ask = Ask.read(sys.argv[1])
    model = GPTConfig(**ask.model).build(ask.vocab)
    model.load_state_dict(load_file(ask.weights))
    model = model.to(getattr(torch, ask.precision)).eval()
    sampling = Sampling(temperature=ask.temperature, top_k=0, top_p=1.0, max_new_tokens=ask.new)
    count = len(ask.prompts)

    def answer(number: int) -> list[list[int]]:
        seeds = range(number * count, (number + 1) * count)
        return generate(model, ask.prompts, sampling, set(ask.stop), seeds)

    ask.answered(answer, sys.argv[2])


if __name__ == "__main__":
    main()
