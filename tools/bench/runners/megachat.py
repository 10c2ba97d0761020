"""megachat itself: with the numba kernel where the environment says COMPILED=1, else with NumPy."""

import os
from functools import partial
from pathlib import Path

import numpy as np

from megachat.config import compose, decode
from megachat.data import dedup
from tools.bench.clock import serve, texts


def megachat_removed(path: Path, compiled: bool) -> list[int]:
    """What megachat removes as a copy, exact or near, with the settings of `conf/dedup/default.yaml`."""
    if hasattr(dedup, "removed"):
        found: list[int] = dedup.removed(path, compiled)
        return found
    rules, read = settings(compiled), texts(path)
    exact = dedup.exact_copies(map(dedup.digest, read))
    signed = [(number, rules.signature(text)) for number, text in enumerate(read) if exact[number] == number]
    signed = [(number, signature) for number, signature in signed if signature is not None]
    near = rules.near_copies(np.array([signature for _, signature in signed]))
    copies = [signed[row][0] for row in np.flatnonzero(near != np.arange(len(near)))]
    return [*np.flatnonzero(exact != np.arange(len(exact))).tolist(), *copies]


def megachat_signatures(read: list[str], compiled: bool) -> object:
    """The MinHash of each text."""
    if hasattr(dedup, "signatures"):
        found: object = dedup.signatures(read, compiled)
        return found
    return list(map(settings(compiled).signature, read))


def settings(compiled: bool) -> dedup.Dedup:
    """The default settings of deduplication."""
    if compiled:
        raise ImportError("megachat.data.dedup has no compiled kernel")
    found: dedup.Dedup = decode(compose("clean")["dedup"])
    return found


if __name__ == "__main__":
    compiled = os.environ.get("COMPILED") == "1"
    serve(partial(megachat_removed, compiled=compiled), partial(megachat_signatures, compiled=compiled))
