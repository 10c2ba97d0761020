"""Token ids on disk, as Megatron-LM keeps them: `name.bin` holds ids, `name.idx` says where documents begin.

Megatron, GPT-NeoX and datatrove read and write it too, so token shards can be exchanged with them. Ids are
uint16 while the vocabulary allows, else int32. A reader maps the file into memory: opening a terabyte costs
nothing.

The index, little-endian: b"MMIDIDX\\0\\0", version 1 (uint64), kind of ids (uint8), sequences (uint64),
documents + 1 (uint64), then per sequence its length (int32) and the byte it starts at (int64), then per
document its first sequence, and the number of sequences (int64). We write one sequence per document, and read
any.
"""

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megachat.files import replacing

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
KINDS = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Megatron's code for a type of ids -> NumPy's."""


class ShardWriter:
    """Writes `prefix.bin` and `prefix.idx`, which appear when it is closed; use it in a `with` block.

    Leaving the block by an error discards what was written, and keeps an earlier shard of this name.
    """

    def __init__(self, prefix: Path, vocab: int) -> None:
        self.prefix, self.vocab = prefix, vocab
        self.kind = 8 if vocab <= 65_536 else 4
        self.lengths: list[int] = []
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = prefix.with_name(f"{prefix.name}.bin.{os.getpid()}.tmp")
        self.file = self.temporary.open("wb")

    def add(self, tokens: Sequence[int] | NDArray[Any]) -> None:
        """Appends one document."""
        ids = np.asarray(tokens)
        assert len(ids), "a document has no tokens"
        assert 0 <= ids.min() <= ids.max() < self.vocab, (
            f"{ids.min()} to {ids.max()} are not ids below {self.vocab}"
        )
        self.file.write(ids.astype(KINDS[self.kind]).tobytes())
        self.lengths.append(len(ids))

    def close(self) -> None:
        """Puts the shard in its place. The index comes last: a shard without one does not count as there."""
        self.file.close()
        prefix = str(self.prefix)
        index = Path(prefix + ".idx")
        index.unlink(missing_ok=True)
        with replacing(Path(prefix + ".bin")) as path:
            os.replace(self.temporary, path)
        with replacing(index) as path:
            path.write_bytes(self._index())

    def _index(self) -> bytes:
        count = len(self.lengths)
        lengths = np.array(self.lengths, dtype="<i4")
        sizes = lengths.astype("<i8") * np.dtype(KINDS[self.kind]).itemsize
        pointers = np.concatenate([[0], np.cumsum(sizes)[:-1]])[:count].astype("<i8")
        header = HEADER.pack(MAGIC, 1, self.kind, count, count + 1)
        return header + lengths.tobytes() + pointers.tobytes() + np.arange(count + 1, dtype="<i8").tobytes()

    def discard(self) -> None:
        """Forgets what was added."""
        self.file.close()
        self.temporary.unlink(missing_ok=True)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.discard()


class Shard:
    """A shard to read."""

    path: Path
    """The file of the ids."""
    documents: NDArray[np.int64]
    """Where each document begins in `tokens`, and at the end how many tokens there are."""
    tokens: NDArray[Any]
    """The ids of all documents, one after the other, mapped into memory."""

    def __init__(self, prefix: Path) -> None:
        index, binary = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        self.path = binary
        for path in (index, binary):
            if not path.is_file():
                raise ValueError(f"{path} is missing; `megachat encode` writes it")
        again = "; run `megachat encode` again, or copy the file again"
        data = index.read_bytes()
        if len(data) < HEADER.size or data[: len(MAGIC)] != MAGIC:
            raise ValueError(f"{index} is not the index of a token shard{again}")
        _, version, kind, sequences, bounds = HEADER.unpack_from(data)
        if version != 1 or kind not in KINDS:
            raise ValueError(
                f"{index} has version {version}, ids of kind {kind}; this reads 1 and {[*KINDS]}"
            )
        if len(data) != HEADER.size + 12 * sequences + 8 * bounds:
            raise ValueError(f"{index} holds {len(data)} bytes, which is not what it says of itself{again}")
        lengths = np.frombuffer(data, "<i4", sequences, HEADER.size)
        firsts = np.frombuffer(data, "<i8", bounds, HEADER.size + 12 * sequences)
        starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        expected = int(starts[-1]) * np.dtype(KINDS[kind]).itemsize
        if binary.stat().st_size != expected:
            raise ValueError(f"{binary} holds {binary.stat().st_size} bytes, its index {expected}{again}")
        self.documents = starts[firsts]
        self.tokens = np.memmap(binary, KINDS[kind], mode="r") if expected else np.empty(0, KINDS[kind])
        if self.documents[0] or self.documents[-1] != len(self.tokens):
            raise ValueError(f"{index} has documents that do not cover its tokens{again}")

    def __len__(self) -> int:
        return len(self.documents) - 1
