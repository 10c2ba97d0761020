"""What turns many texts into ids at once: sentencepiece, or gigatoken, which is the same many times as fast.

gigatoken (on PyPI) is given the tokenizer as `tokenizer_json`. It is young, and
its ids are ours only as far as they have been compared: `encode` compares some of every shard.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megachat.tokenizer.tokenizer import SPACE, Tokenizer
from megachat.tokenizer.tokenizer_json import tokenizer_json

Name = Literal["sentencepiece", "gigatoken"]

Ids = tuple[NDArray[np.int32], NDArray[np.int64]]
"""The ids of several texts one after the other, and how many each has."""


class SentencePiece:
    """The tokenizer itself."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> Ids:
        """The ids of each text, between `bos` and `eos`."""
        bos, eos = self.tokenizer.bos, self.tokenizer.eos
        found = [[bos, *ids, eos] for ids in self.tokenizer.encode_many(texts)]
        return np.concatenate([np.array(ids, np.int32) for ids in found]), np.array(
            [len(ids) for ids in found]
        )


class Gigatoken:
    """The tokenizer through gigatoken, but for texts with a U+2581, which only the tokenizer itself keeps."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        try:
            import gigatoken
        except ImportError:
            raise ValueError(
                "encoder=gigatoken needs a package that is not installed: pip install 'megachat[fast]'; "
                "or encoder=sentencepiece"
            ) from None
        self.plain = SentencePiece(tokenizer)
        self.bos, self.eos = tokenizer.bos, tokenizer.eos
        self.backend = gigatoken.Tokenizer.from_json(tokenizer_json(tokenizer))

    def encode(self, texts: Sequence[str]) -> Ids:
        """The ids of each text, between `bos` and `eos`."""
        try:
            data = [text.encode() for text in texts]
        except UnicodeEncodeError:
            return self.plain.encode(texts)  # which says what is wrong
        if any(SPACE.encode() in text for text in data):
            parts = [self.plain.encode([text]) if SPACE in text else self.encode([text]) for text in texts]
            return np.concatenate([ids for ids, _ in parts]), np.concatenate(
                [lengths for _, lengths in parts]
            )
        # One thread: there are as many processes as cores.
        layout = self.backend.encode_batch(data, parallel=False).layout
        offsets, inside = layout.offsets.data, layout.content.data
        lengths = np.diff(offsets) + 2
        ends = np.cumsum(lengths)
        ids = np.empty(ends[-1], np.int32)
        ids[ends - lengths], ids[ends - 1] = self.bos, self.eos
        between = np.ones(len(ids), bool)
        between[ends - lengths] = between[ends - 1] = False
        ids[between] = inside[offsets[0] : offsets[-1]]
        return ids, lengths


Encoder = SentencePiece | Gigatoken


def encoder(name: Name, tokenizer: Tokenizer) -> Encoder:
    """The encoder of that name."""
    return Gigatoken(tokenizer) if name == "gigatoken" else SentencePiece(tokenizer)
