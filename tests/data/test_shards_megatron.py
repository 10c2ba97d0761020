"""Token shards beside megatron-core itself: the same bytes, and each reads what the other wrote."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from megachat.data.shards import KINDS, Shard, ShardWriter
from tests.data.test_shards import MEGATRON

VENV = Path(__file__).parents[2] / ".venv-bench" / "megatron-core"

pytestmark = [
    pytest.mark.slow,  # to import megatron-core takes seconds
    pytest.mark.skipif(
        not (VENV / "ready").exists(),
        reason="megatron-core is not installed: bash tools/bench/setup.sh megatron-core",
    ),
]

PEER = """
import json, sys
import numpy, torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

folder, kind = sys.argv[1:]
builder = IndexedDatasetBuilder(folder + "/theirs.bin", dtype=numpy.dtype(kind).type)
for document in json.load(open(folder + "/documents.json")):
    tokens = [token for sequence in document for token in sequence]
    builder.add_document(torch.tensor(tokens), [len(sequence) for sequence in document])
builder.finalize(folder + "/theirs.idx")
ours = IndexedDataset(folder + "/ours")
read = {"sequences": [ours[n].tolist() for n in range(len(ours))], "bounds": ours.document_indices.tolist()}
json.dump(read, open(folder + "/read.json", "w"))
"""
"""Writes documents of one or several sequences as megatron-core does, and reads our shard with it."""

Read = dict[str, list[list[int]] | list[int]]


def both(folder: Path, documents: list[list[list[int]]], vocab: int) -> Read:
    """Writes documents as `ours` and, by megatron-core, as `theirs`; what megatron-core reads in ours."""
    with ShardWriter(folder / "ours", vocab) as writer:
        for document in documents:
            writer.add([token for sequence in document for token in sequence])
    (folder / "documents.json").write_text(json.dumps(documents))
    done = subprocess.run(
        [VENV / "bin" / "python", "-c", PEER, folder, np.dtype(KINDS[writer.kind]).name],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    read: Read = json.loads((folder / "read.json").read_text())
    return read


def files(prefix: Path) -> tuple[str, str]:
    """Both files of a shard."""
    data, index = (Path(f"{prefix}.{kind}").read_bytes().hex() for kind in ("bin", "idx"))
    return data, index


@pytest.mark.parametrize(("vocab", "second"), [(300, 258), (70_001, 70_000)])
def test_the_recorded_bytes_are_what_megatron_core_writes(tmp_path: Path, vocab: int, second: int) -> None:
    both(tmp_path, [[[1, second, 3]], [[7]]], vocab)
    assert files(tmp_path / "theirs") == MEGATRON[vocab]


@pytest.mark.parametrize("vocab", [300, 65_536, 65_537])
def test_a_shard_of_many_documents_has_megatron_cores_bytes_and_is_read_by_it(
    tmp_path: Path, vocab: int
) -> None:
    draw = np.random.default_rng(0)
    documents = [draw.integers(0, vocab, length).tolist() for length in draw.integers(1, 400, 300)]
    documents.append([0, vocab - 1])
    read = both(tmp_path, [[document] for document in documents], vocab)
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")
    assert read == {"sequences": documents, "bounds": [*range(len(documents) + 1)]}


def test_documents_of_several_sequences_that_megatron_core_wrote_are_read(tmp_path: Path) -> None:
    both(tmp_path, [[[1, 2], [3]], [[4, 5, 6]]], 300)
    shard = Shard(tmp_path / "theirs")
    assert shard.documents.tolist() == [0, 3, 6]
    assert shard.tokens.tolist() == [1, 2, 3, 4, 5, 6]
