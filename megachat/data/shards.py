"""Token ids on disk, as Megatron-LM keeps them: `name.bin` holds ids, `name.idx` says where documents begin.

Megatron, GPT-NeoX and datatrove read and write it too, so token shards can be exchanged with them. Ids are
uint16 while the vocabulary allows, else int32. A reader maps both files into memory and reads of them what it
is asked for: opening a terabyte costs nothing.

The index, little-endian: b"MMIDIDX\\0\\0", version 1 (uint64), kind of ids (uint8), sequences (uint64),
documents + 1 (uint64), then per sequence its length (int32) and the byte it starts at (int64), then per
document its first sequence, and the number of sequences (int64). We write one sequence per document, and read
any. Conversations have a third file beside, which Megatron ignores: `name.mask.bin`, a byte per token that is
1 where the token is trained on.

The stage `encode` writes a shard per split and source, `train/wiki.bin`, and in its `manifest.json` what each
holds, in the order of the corpus.
"""

import json
import mmap
import os
import struct
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megachat.files import replacing, sha256

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
KINDS = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Megatron's code for a type of ids -> NumPy's."""

CHUNK = 1 << 24
"""Tokens copied at a time from shard to shard."""


class ShardWriter:
    """Writes `prefix.bin` and `prefix.idx`, which appear when it is closed; use it in a `with` block.

    Leaving the block by an error discards what was written, and keeps an earlier shard of this name.
    """

    def __init__(self, prefix: Path, vocab: int, masked: bool = False) -> None:
        """With `masked`, every document is added with its mask, and `prefix.mask.bin` is written, too."""
        self.prefix, self.vocab = prefix, vocab
        self.kind = 8 if vocab <= 65_536 else 4
        self.lengths: list[NDArray[np.int32]] = []
        prefix.parent.mkdir(parents=True, exist_ok=True)
        endings = (".bin", ".mask.bin") if masked else (".bin",)
        self.files = {ending: self._temporary(ending).open("wb") for ending in endings}

    def add(self, tokens: Sequence[int] | NDArray[Any], mask: Sequence[int] | None = None) -> None:
        """Appends one document."""
        self.add_many(np.asarray(tokens), [len(tokens)], mask)

    def add_many(
        self,
        tokens: NDArray[Any],
        lengths: Sequence[int] | NDArray[Any],
        mask: Sequence[int] | NDArray[Any] | None = None,
    ) -> None:
        """Appends documents of these lengths, whose tokens (and masks) follow each other."""
        sizes = np.asarray(lengths, dtype="<i4")
        assert sizes.size == 0 or sizes.min() > 0, "a document has no tokens"
        assert sizes.sum(dtype=np.int64) == len(tokens), f"{len(tokens)} tokens are not {lengths}"
        if len(tokens):
            least, most = tokens.min(), tokens.max()
            assert 0 <= least <= most < self.vocab, f"{least} to {most} are not ids below {self.vocab}"
        assert (mask is not None) == (".mask.bin" in self.files), "either all documents have a mask, or none"
        if mask is not None:
            trained = np.asarray(mask, dtype="u1")
            assert len(trained) == len(tokens), f"{len(tokens)} tokens have {len(trained)} places in the mask"
            assert trained.size == 0 or trained.max() <= 1, "a mask is 0 or 1"
            self.files[".mask.bin"].write(trained.tobytes())
        self.files[".bin"].write(tokens.astype(KINDS[self.kind]).tobytes())
        self.lengths.append(sizes)

    def append(self, shard: "Shard") -> None:
        """Appends all documents of another shard."""
        lengths = np.diff(shard.documents)
        first = 0
        while first < len(shard):  # whole documents at a time, but at least one
            start = shard.documents[first]
            last = max(first + 1, int(np.searchsorted(shard.documents, start + CHUNK, side="right")) - 1)
            self.add_many(shard.tokens[start : shard.documents[last]], lengths[first:last])
            first = last

    def close(self) -> None:
        """Puts the shard in its place. The index comes last: a shard without one does not count as there."""
        for file in self.files.values():
            file.close()
        index = Path(f"{self.prefix}.idx")
        index.unlink(missing_ok=True)
        for ending in self.files:
            with replacing(Path(f"{self.prefix}{ending}")) as path:
                os.replace(self._temporary(ending), path)
        with replacing(index) as path, path.open("wb") as file:
            file.writelines(self._index())

    def _temporary(self, ending: str) -> Path:
        return self.prefix.with_name(f"{self.prefix.name}{ending}.{os.getpid()}.part.tmp")

    def _index(self) -> Iterator[bytes]:
        count = sum(map(len, self.lengths))
        yield HEADER.pack(MAGIC, 1, self.kind, count, count + 1)
        yield from (lengths.tobytes() for lengths in self.lengths)
        begin, width = 0, np.dtype(KINDS[self.kind]).itemsize
        for lengths in self.lengths:
            ends = begin + np.cumsum(lengths, dtype="<i8") * width
            yield np.concatenate([[begin], ends[:-1]]).astype("<i8").tobytes() if len(ends) else b""
            begin = int(ends[-1]) if len(ends) else begin
        for first in range(0, count + 1, CHUNK):
            yield np.arange(first, min(first + CHUNK, count + 1), dtype="<i8").tobytes()

    def discard(self) -> None:
        """Forgets what was added."""
        for ending, file in self.files.items():
            file.close()
            self._temporary(ending).unlink(missing_ok=True)

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
    tokens: NDArray[Any]
    """The ids of all documents, one after the other, mapped into memory."""

    def __init__(self, prefix: Path) -> None:
        index, binary = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        self.path, self.index = binary, index
        for path in (index, binary):
            if not path.is_file():
                raise ValueError(f"{path} is missing; `megachat encode` writes it")
        again = "; copy the file again, or delete the folder and run `megachat encode` again"
        with index.open("rb") as file:
            header = file.read(HEADER.size)
            if len(header) < HEADER.size or header[: len(MAGIC)] != MAGIC:
                raise ValueError(f"{index} is not the index of a token shard{again}")
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        _, version, kind, sequences, bounds = HEADER.unpack(header)
        if version != 1 or kind not in KINDS:
            raise ValueError(
                f"{index} has version {version}, ids of kind {kind}; this reads 1 and {[*KINDS]}"
            )
        if len(data) != HEADER.size + 12 * sequences + 8 * bounds:
            raise ValueError(f"{index} holds {len(data)} bytes, which is not what it says of itself{again}")
        # Views of Python's, not NumPy's, which would copy all of them to search: nothing here is aligned.
        lengths, places = data[HEADER.size :][: 4 * sequences].cast("i"), HEADER.size + 4 * sequences
        self._pointers = data[places : places + 8 * sequences].cast("q")
        self._firsts = data[places + 8 * sequences :].cast("q")
        self._width = np.dtype(KINDS[kind]).itemsize
        expected = self._pointers[-1] + lengths[-1] * self._width if sequences else 0
        if binary.stat().st_size != expected:
            raise ValueError(f"{binary} holds {binary.stat().st_size} bytes, its index {expected}{again}")
        # asarray: a slice of a memmap is another memmap, which takes longer to make than to read.
        self.tokens = np.asarray(np.memmap(binary, KINDS[kind], mode="r") if expected else [], KINDS[kind])
        whole = bounds and self._firsts[0] == 0 and self._firsts[-1] == sequences
        if not whole or (sequences and self._pointers[0]):
            raise ValueError(f"{index} has documents that do not cover its tokens{again}")

    def __len__(self) -> int:
        return len(self._firsts) - 1

    @property
    def documents(self) -> NDArray[np.int64]:
        """Where each document begins in `tokens`, and at the end how many tokens there are: read anew."""
        return self.starts(0, len(self) + 1)

    def starts(self, first: int, last: int) -> NDArray[np.int64]:
        """`documents[first:last]`, without reading the others."""
        firsts = np.frombuffer(self._firsts[first:last], "<i8")
        ends = np.searchsorted(firsts, len(self._pointers))  # the end of all, and empty documents there
        begins = np.full(len(firsts), len(self.tokens), np.int64)
        if ends:
            low = int(firsts[0])
            pointers = np.frombuffer(self._pointers[low : int(firsts[ends - 1]) + 1], "<i8")
            begins[:ends] = pointers[firsts[:ends] - low] // self._width
        return begins

    def within(self, start: int, stop: int) -> list[int]:
        """Where documents begin behind token `start` and before token `stop`."""
        sequence = bisect_right(self._pointers, start * self._width) - 1
        first = bisect_right(self._firsts, sequence)
        begins = []
        for number in range(first, len(self)):
            if self._firsts[number] == len(self._pointers):  # an empty document at the end
                break
            begin = self._pointers[self._firsts[number]] // self._width
            if begin >= stop:
                break
            begins.append(begin)
        return begins

    @property
    def mask(self) -> NDArray[np.uint8] | None:
        """1 for each token that is trained on, mapped into memory; None where the shard has no mask."""
        path = self.path.with_name(f"{self.path.name.removesuffix('.bin')}.mask.bin")
        if not path.is_file():
            return None
        size = path.stat().st_size
        if size != len(self.tokens):
            raise ValueError(
                f"{path} holds {size} bytes for {len(self.tokens)} tokens; write the shard again"
            )
        return np.memmap(path, "u1", mode="r") if size else np.empty(0, "u1")

    @cached_property
    def sums(self) -> list[str]:
        """The sha256 of its two files: read in full, unless `read_split` found them in a manifest."""
        return [sha256(self.path), sha256(self.index)]


class Shards:
    """Shards read one after the other, as if they were one."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        assert shards, "no shards"
        self.shards = list(shards)
        self.starts = [*accumulate((len(shard.tokens) for shard in shards), initial=0)]

    def __len__(self) -> int:
        return sum(map(len, self.shards))

    @property
    def documents(self) -> NDArray[np.int64]:
        """Where each document begins, and at the end how many tokens there are: read anew."""
        starts = zip(self.shards, self.starts[:-1], strict=True)
        return np.concatenate([*(shard.documents[:-1] + start for shard, start in starts), self.starts[-1:]])

    def within(self, start: int, stop: int) -> list[int]:
        """Where documents begin behind token `start` and before token `stop`."""
        first = bisect_right(self.starts, start) - 1
        begin, end = self.starts[first], self.starts[first + 1]
        begins = [begin + one for one in self.shards[first].within(start - begin, min(stop, end) - begin)]
        return begins if stop <= end else [*begins, end, *self.within(end, stop)]

    @property
    def size(self) -> int:
        """How many tokens there are."""
        return self.starts[-1]

    @property
    def sums(self) -> list[str]:
        """The sha256 of all their files."""
        return [one for shard in self.shards for one in shard.sums]

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """The tokens from `start` to `stop`, which may lie in several shards."""
        if len(self.shards) == 1:
            return self.shards[0].tokens[start:stop]
        first = bisect_right(self.starts, start) - 1
        begin = self.starts[first]
        found = self.shards[first].tokens[start - begin : stop - begin]
        if begin + len(self.shards[first].tokens) >= stop:
            return found
        return np.concatenate([found, self.read(start + len(found), stop)])


def read_split(folder: Path, split: str, tokenizer: str | None = None) -> dict[str, Shard]:
    """The shards of a split that `encode` wrote to `folder`, by source, in the corpus's order.

    `tokenizer`: the sha256 of the one that is to understand them; shards of another are refused.
    """
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    made_by = manifest["tokenizer"]
    if tokenizer and made_by != tokenizer:
        raise ValueError(
            f"{folder} was encoded with tokenizer {made_by[:12]}, but this run's is {tokenizer[:12]}; "
            "run the stages after `tokenizer` again"
        )
    found = {}
    for prefix, entry in manifest["shards"].items():
        if entry["split"] == split:
            found[entry["source"]] = shard = Shard(folder / prefix)
            shard.sums = list(entry["sha256"].values())
    return found


def written(folder: Path) -> dict[Path, str]:
    """The files of token shards in a folder and their sha256, as the manifest has them."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return {
        folder / f"{prefix}.{kind}": sum_
        for prefix, entry in manifest["shards"].items()
        for kind, sum_ in entry["sha256"].items()
    }


def first_damaged(sums: Mapping[Path, str], share: int = 0, shares: int = 1) -> Path | None:
    """The first file (of this share of them) that is not as it was written, if there is one.

    A file is not divided: the largest one sets how long this takes.
    """
    paths = sorted(sums, key=lambda path: (-path.stat().st_size, path))[share::shares]
    return next((path for path in paths if sha256(path) != sums[path]), None)
