"""Hugging Face's tokenizers, a thread: `encode_batch_fast` of megachat's tokenizer as a `tokenizer.json`."""

import os
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer

from tools.bench.clock import serve_encoder

Ids = list[list[int]]


def make(tokenizer: Path) -> Callable[[list[str]], Ids]:
    """Reads the file beside the model."""
    reader = Tokenizer.from_file(str(tokenizer.with_name("tokenizer.json")))
    # Getting at the ids makes lists of them: without that, nobody has any.
    return lambda texts: [one.ids for one in reader.encode_batch_fast(texts)]


def ids(encoded: Ids) -> Ids:
    """They are there."""
    return encoded


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    serve_encoder(make, ids)
