"""What turns many texts into ids at once: sentencepiece, or gigatoken, which is the same many times as fast.

gigatoken (on PyPI) is given the tokenizer as `tokenizer_json`. It is young, and its ids are ours only as far
as they have been compared: `Checked` compares some of every batch.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megachat.data.conversations import share
from megachat.data.document import Document
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


class Mistake(Exception):
    """The fast encoder failed, or its ids are not sentencepiece's."""


class Checked:
    """A fast encoder, some of whose ids are compared with sentencepiece's; a difference is a `Mistake`."""

    def __init__(self, fast: Encoder, plain: SentencePiece, vocab: int, compared: float) -> None:
        """`compared` is the share of documents that are, besides the first of each batch."""
        self.fast, self.plain, self.vocab, self.compared = fast, plain, vocab, compared
        self.count = 0
        """Documents that were compared."""

    def encode(self, batch: Sequence[Document]) -> Ids:
        """The ids of each text, between `bos` and `eos`."""
        texts = [document.text for document in batch]
        try:
            ids, lengths = self.fast.encode(texts)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as why:  # a panic of Rust is no Exception
            raise Mistake(f"gigatoken failed at {batch[0].id} or after it: {why!r}") from None
        fit = len(lengths) == len(texts) and lengths.min() > 0 and lengths.sum() == len(ids)
        if not fit or ids.min() < 0 or ids.max() >= self.vocab:
            raise Mistake(f"gigatoken's ids of {batch[0].id} and those after it are none of this vocabulary")
        # Not the hash that decides on validation: of that, all of one side would be compared, or none.
        chosen = [
            row for row, document in enumerate(batch) if not row or share(f"= {document.id}") < self.compared
        ]
        right, sizes = self.plain.encode([texts[row] for row in chosen])
        stops = np.cumsum(lengths)
        for row, expected in zip(chosen, np.split(right, np.cumsum(sizes)[:-1]), strict=True):
            found = ids[stops[row] - lengths[row] : stops[row]]
            if not np.array_equal(found, expected):
                same = min(len(found), len(expected))
                at = int(np.append(np.flatnonzero(found[:same] != expected[:same]), same)[0])
                raise Mistake(f"gigatoken's ids of {batch[row].id} differ from sentencepiece's at token {at}")
        self.count += len(chosen)
        return ids, lengths
