"""Near copies one document at a time, as a crawler meets them: datasketch's own index, in memory or in Redis.

It asks of a document what `megachat clean` asks, with the same signatures, and takes some 5 kB for each; it
is for small collections, and for processes that share what they have seen. Two that add the same text at the
same moment may both be told that it is new. A corpus that lies there is what `megachat clean` is for.

    seen = Online(decode(compose("clean")).dedup, redis={"host": "localhost"})
    if (known := seen.add("page-7", text)) is not None:
        print(f"a copy of {known}")
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from datasketch import MinHash, MinHashLSH
from datasketch.storage import unordered_storage

from megachat.data.dedup import Dedup
from megachat.data.index import Sketches, agreement, digests, sketches
from megachat.data.minhash import SCHEME, Texts


class Online:
    """The documents that were new when they came."""

    def __init__(self, dedup: Dedup, redis: Mapping[str, Any] | None = None) -> None:
        """`redis`: the arguments of `redis.Redis`; None: in memory.

        What other settings of shingles or bands have put into the same Redis is not seen.
        """
        self.dedup = dedup
        name = f"megachat-{dedup.words}-{dedup.characters}-{dedup.bands}x{dedup.rows}".encode()
        storage = {"type": "redis", "redis": dict(redis)} if redis is not None else {"type": "dict"}
        self._index = MinHashLSH(
            num_perm=dedup.bands * dedup.rows,
            params=(dedup.bands, dedup.rows),
            storage_config=storage | {"basename": name},
            prepickle=False,  # what comes back from a server that others write to is not to be unpickled
        )
        self._sketches = unordered_storage(storage, name + b"_sketches")
        self._same = unordered_storage(storage, name + b"_same")

    def add(self, id: str, text: str) -> str | None:
        """Takes a document in, or names the one it is a copy of; one that comes again changes nothing.

        Raises ValueError for an id that another text has.
        """
        texts, key = Texts.of([text]), id.encode()
        digest = digests(texts, fast=False)[0].tobytes()
        if (same := min(self._same.get(digest), default=None)) is not None:
            return None if same == key else same.decode()
        signatures, signed = self.dedup.signer.sign(texts, fast=False)
        if signed[0] and self.dedup.near:
            minhash = MinHash(num_perm=signatures.shape[1], scheme=SCHEME, hashvalues=signatures[0])
            own = sketches(signatures)
            known, share = self._most_alike(minhash, own)
            if share >= self.dedup.threshold and known != key:
                return known.decode()
            if self._sketches.get(key) - {own.tobytes()}:
                raise ValueError(f"the id {id!r} has another text in this index; give each text its own")
            # In this order: what a killed process leaves unfinished, adding the document again finishes.
            self._sketches.insert(key, own.tobytes())
            if known != key:
                self._index.insert(key, minhash)
        self._same.insert(digest, key)
        return None

    def _most_alike(self, minhash: MinHash, own: Sketches) -> tuple[bytes, float]:
        """Of those that share a band the most alike, and how much of the MinHash it has; else (b"", -1)."""
        found = sorted(self._index.query(minhash))
        if not found:
            return b"", -1.0
        stored = [np.frombuffer(min(self._sketches.get(key)), np.uint8) for key in found]
        shares = agreement(own, np.stack(stored))
        best = int(shares.argmax())
        return found[best], float(shares[best])
