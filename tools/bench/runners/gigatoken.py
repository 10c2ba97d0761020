"""gigatoken itself, a thread: `encode_batch` of megachat's tokenizer as a `tokenizer.json`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gigatoken

from tools.bench.clock import serve_encoder


def make(tokenizer: Path) -> Callable[[list[str]], Any]:
    """Reads the file beside the model."""
    reader = gigatoken.Tokenizer.from_json(tokenizer.with_name("tokenizer.json").read_text(encoding="utf-8"))
    return lambda texts: reader.encode_batch([text.encode() for text in texts], parallel=False)


def ids(encoded: Any) -> list[list[int]]:
    """The rows of the array that `encode_batch` returns."""
    rows: list[list[int]] = encoded.to_list()
    return rows


if __name__ == "__main__":
    serve_encoder(make, ids)
