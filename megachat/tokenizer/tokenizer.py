"""The tokenizer: text to ids and back, exactly, for every text that Unicode can write.

Around a sentencepiece model, with two differences. Sentencepiece writes a space as U+2581, so a real U+2581
in the text would come back as a space: here it becomes its three UTF-8 bytes. And no token crosses the start
of a word, so words are encoded once and remembered: the same tokens, twice as fast once they come again.
The special tokens cannot be written by anybody: text that says `<|user|>` becomes ordinary tokens.
"""

import codecs
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from megachat.files import replacing

SPACE = "\u2581"
"""What sentencepiece writes for a space."""

PAD, UNKNOWN, BOS, EOS = "<pad>", "<unk>", "<s>", "</s>"
SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
TOOL = "<|tool|>"
CONTROLS = (SYSTEM, USER, ASSISTANT, END, TOOL)
"""The chat format's own symbols: control symbols, because sentencepiece never makes one out of text."""

WORD = re.compile(" *[^ ]+| +")
"""What a token never crosses: spaces and what follows them, to the next space."""

KNOWN = 1 << 24
"""Characters of words whose tokens are remembered."""

FILE = "tokenizer.model"
"""What the file is called in a folder that holds a tokenizer."""


class Tokenizer:
    """A trained tokenizer. Two with the same `sha256` are the same."""

    def __init__(self, model: bytes) -> None:
        """Reads a serialised sentencepiece model that the `tokenizer` stage trained."""
        if not model:
            raise ValueError("the tokenizer's model is empty; train it again with `megachat tokenizer`")
        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab: int = self._processor.get_piece_size()
        self.pad, self.bos, self.eos = self._id(PAD), self._id(BOS), self._id(EOS)
        self.system, self.user, self.assistant, self.end = map(self._id, (SYSTEM, USER, ASSISTANT, END))
        self.tool = self._find(TOOL)
        """None in a tokenizer that was trained before tools could speak."""
        self._bytes = {token: self._bytes_of(token) for token in range(self.vocab)}
        self._space = [self._id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self._known: dict[str, list[int]] = {}
        self._known_size = 0
        if any(b" " in self._bytes[token].lstrip(b" ") for token in range(self.vocab)):
            raise ValueError("the model has tokens that cross words; train it with `megachat tokenizer`")

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Reads a `tokenizer.model`, or the one in a folder."""
        path = Path(path)
        file = path / FILE if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"there is no tokenizer at {file}; `megachat tokenizer` trains one")
        try:
            return cls(file.read_bytes())
        except RuntimeError as error:
            raise ValueError(f"{file} is not a sentencepiece model: {error}; train it again") from None

    def save(self, path: Path) -> None:
        """Writes the model file, whole or not at all."""
        with replacing(path) as temporary:
            temporary.write_bytes(self.model)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without `bos` or `eos`; never a control token."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text; for short texts many times as fast as one by one."""
        # A thread that sees `_known` replaced goes on with the one it has.
        known = self._known
        words = [WORD.findall(text) for text in texts]
        new = [word for word in dict.fromkeys(chain.from_iterable(words)) if word not in known]
        known.update(zip(new, self._encode_words(new), strict=True))
        self._known_size += sum(map(len, new))
        if self._known_size > KNOWN:
            self._known, self._known_size = {}, 0
        return [list(chain.from_iterable(map(known.__getitem__, text))) for text in words]

    def _encode_words(self, words: Sequence[str]) -> Iterator[list[int]]:
        try:
            parts = [word.encode().split(SPACE.encode()) for word in words]
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise ValueError(
                f"the text holds half a surrogate pair, {half!r} in {error.object[:60]!r}, which is not a "
                "character; decode the source with errors='replace'"
            ) from None
        encoded = iter(self._processor.encode([part for word in parts for part in word]))
        for word in parts:
            tokens: list[int] = next(encoded)
            for _ in word[1:]:
                tokens = tokens + self._space + next(encoded)
            yield tokens

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of the tokens; control tokens are no text, bytes that are not UTF-8 become U+FFFD."""
        return b"".join([self._bytes[token] for token in tokens]).decode("utf-8", "replace")

    @property
    def token_bytes(self) -> NDArray[np.int64]:
        """How many bytes of text each token stands for; 0 for control tokens."""
        return np.array([len(self._bytes[token]) for token in range(self.vocab)], dtype=np.int64)

    @cached_property
    def pieces(self) -> list[str]:
        """What sentencepiece calls each token."""
        return [self._processor.id_to_piece(token) for token in range(self.vocab)]

    @property
    def learnt(self) -> list[str]:
        """The pieces that are neither control symbols nor bytes, the first to be merged first."""
        of = self._processor
        tokens = [
            token
            for token in range(self.vocab)
            if not (of.is_control(token) or of.is_unknown(token) or of.is_byte(token))
        ]
        return [of.id_to_piece(token) for token in sorted(tokens, key=lambda token: -of.get_score(token))]

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token stands for, which may be half a character."""
        return self._bytes[token]

    def __repr__(self) -> str:
        """Its size and the first figures of its hash."""
        return f"Tokenizer(vocab={self.vocab}, sha256={self.sha256[:12]})"

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[bytes]]:
        """Pickles as its model, so that a worker process can be sent one."""
        return Tokenizer, (self.model,)

    def _find(self, piece: str) -> int | None:
        token: int = self._processor.piece_to_id(piece)
        return token if self._processor.id_to_piece(token) == piece else None

    def _id(self, piece: str) -> int:
        token = self._find(piece)
        if token is None:
            raise ValueError(f"the sentencepiece model has no {piece}; train it with `megachat tokenizer`")
        return token

    def _bytes_of(self, token: int) -> bytes:
        piece: str = self._processor.id_to_piece(token)
        if self._processor.is_control(token) or self._processor.is_unknown(token):
            return b""
        if self._processor.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode()


class StreamDecoder:
    """Decodes tokens as they come, holding back the bytes of a character until it is whole.

    Example: the three bytes of 中 pushed one at a time -> "", "", "中"
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Starts at the beginning of a text."""
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that this token completes."""
        return self._utf8.decode(self._tokenizer.bytes_of(token))

    def finish(self) -> str:
        """What is left at the end: U+FFFD if the last character never became whole."""
        return self._utf8.decode(b"", final=True)
