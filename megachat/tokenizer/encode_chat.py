"""STAGE encode_chat: conversations as shards of tokens, each with its mask.

A stage of its own, for conversations change without the text, and the text without conversations: neither is
encoded again for the other's sake. `sft conversations=encoded` reads them; the split is the one that `sft`
makes by itself, the tokens and masks are those that it renders.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from megachat.data.conversations import Conversations, opening, share
from megachat.data.shards import Shard, ShardWriter
from megachat.files import sha256, sweep, write_json
from megachat.log import say, track
from megachat.run import Stage
from megachat.tokenizer.chat_format import render
from megachat.tokenizer.tokenizer import Tokenizer

SPLITS = ("train", "validation")


class EncodeChat(Stage):
    """Turns conversations into tokens and masks."""

    name: ClassVar[str] = "encode_chat"

    conversations: Conversations
    """What is encoded."""
    validation: Annotated[float, Field(ge=0, lt=1)]
    """The share of conversations kept from training, to measure the model on."""

    def reads(self) -> list[str]:
        """The tokenizer."""
        return ["tokenizer"]

    def execute(self) -> None:
        """Writes `train.bin`, `.idx`, `.mask.bin`, the same for validation, and `manifest.json`."""
        tokenizer = Tokenizer.load(self.input("tokenizer"))
        entries = {}
        sweep(self.folder)
        with ExitStack() as stack:
            writers = {split: ShardWriter(self.folder / split, tokenizer.vocab, True) for split in SPLITS}
            for writer in writers.values():
                stack.enter_context(writer)
            for conversation in track(self.conversations.conversations(), "encoding", unit="conversation"):
                tokens, mask = render(conversation, tokenizer)
                writers[SPLITS[share(opening(conversation)) < self.validation]].add(tokens, mask)
        for split in SPLITS:
            shard = Shard(self.folder / split)
            assert shard.mask is not None
            files = {
                kind: sha256(Path(f"{self.folder / split}.{kind}")) for kind in ("bin", "idx", "mask.bin")
            }
            counts = {"documents": len(shard), "tokens": len(shard.tokens), "trained": int(shard.mask.sum())}
            entries[split] = {"split": split, "source": "conversations", **counts, "sha256": files}
            say(
                f"{split}: {len(shard):,} conversations, {len(shard.tokens):,} tokens, "
                f"{counts['trained']:,} of them trained on"
            )
        about = {"tokenizer": tokenizer.sha256, "vocab": tokenizer.vocab, "shards": entries}
        write_json(self.folder / "manifest.json", about)


class Chats(Sequence[tuple[list[int], list[int]]]):
    """Tokens and mask of each conversation of a shard, as `render` made them; read when asked for."""

    def __init__(self, shard: Shard) -> None:
        mask = shard.mask
        if mask is None:
            raise ValueError(
                f"{shard.path} has no mask beside it; `megachat encode_chat` writes one with a mask"
            )
        self.shard, self.mask = shard, mask

    def __len__(self) -> int:
        return len(self.shard)

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(f"conversation {number} of {len(self)}")
        start, stop = self.shard.starts(number, number + 2).tolist()
        return self.shard.tokens[start:stop].tolist(), self.mask[start:stop].tolist()

    @property
    def lengths(self) -> list[int]:
        """How many tokens each has."""
        return np.diff(self.shard.documents).tolist()
