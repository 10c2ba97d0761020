"""sentencepiece itself, a thread: `SentencePieceProcessor.encode` of megachat's model."""

from collections.abc import Callable
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from tools.bench.clock import serve_encoder

Ids = list[list[int]]


def make(tokenizer: Path) -> Callable[[list[str]], Ids]:
    """Reads the model."""
    processor = SentencePieceProcessor(model_file=str(tokenizer))
    return lambda texts: processor.encode(texts, num_threads=1)


def ids(encoded: Ids) -> Ids:
    """They are there."""
    return encoded


if __name__ == "__main__":
    serve_encoder(make, ids)
