"""Shards hold every document once, on the side its id says, whatever the number of processes."""

import json
from pathlib import Path

import numpy as np
import pytest

from megachat.config import compose, decode
from megachat.data.conversations import share
from megachat.data.document import Document, write_documents
from megachat.data.shards import Shard
from megachat.tokenizer import encode
from megachat.tokenizer.tokenizer import FILE
from tests.tiny_model import finish

DOCUMENTS = [
    Document(f"d{i}", f"def f{i}(x):\n    return x + {i}  # 中文\n" * (i % 7 + 1), "t") for i in range(60)
]


def prepared(run: Path, tokenizer, documents=DOCUMENTS) -> Path:
    """A run folder in which `clean` and `tokenizer` have finished."""
    write_documents(run / "clean", documents, per_shard=25)
    tokenizer.save(run / "tokenizer" / FILE)
    for stage in ("clean", "tokenizer"):
        finish(run / stage)
    return run


def encoded(run: Path, *overrides: str) -> Path:
    """The folder that the stage wrote."""
    stage = decode(compose("encode", [f"run={run}", "validation=0.2", "processes=1", *overrides]))
    stage.execute()
    return stage.folder


def test_every_document_is_between_its_ends_on_its_side(run, tokenizer):
    folder = encoded(prepared(run, tokenizer))
    found = {}
    for split in ("train", "validation"):
        shard = Shard(folder / split)
        rows = np.split(np.asarray(shard.tokens), shard.documents[1:-1])
        assert all((row[0], row[-1]) == (tokenizer.bos, tokenizer.eos) for row in rows)
        found[split] = [tokenizer.decode(row.tolist()) for row in rows]
    for split, held in (("train", False), ("validation", True)):
        assert found[split] == [one.text for one in DOCUMENTS if (share(one.id) < 0.2) == held]
    assert 3 <= len(found["validation"]) <= 25  # of 60, 12 expected: four standard deviations


def test_the_manifest_counts_documents_tokens_and_bytes(run, tokenizer):
    folder = encoded(prepared(run, tokenizer))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["tokenizer"], manifest["vocab"]) == (tokenizer.sha256, tokenizer.vocab)
    for split in ("train", "validation"):
        shard = Shard(folder / split)
        texts = [one.text for one in DOCUMENTS if (share(one.id) < 0.2) == (split == "validation")]
        expected = {"documents": len(texts), "bytes": sum(len(text.encode()) for text in texts)}
        expected["tokens"] = sum(len(tokenizer.encode(text)) + 2 for text in texts)
        assert manifest[split] == expected
        assert (len(shard), len(shard.tokens)) == (expected["documents"], expected["tokens"])


def test_more_documents_move_none_to_the_other_side(run, tokenizer):
    some = prepared(run / "some", tokenizer, DOCUMENTS[:40])
    more = prepared(run / "more", tokenizer)
    few = Shard(encoded(some) / "validation")
    many = Shard(encoded(more) / "validation")
    assert len(few) < len(many)
    np.testing.assert_array_equal(few.tokens, many.tokens[: len(few.tokens)])


@pytest.mark.slow
def test_the_number_of_processes_changes_no_byte(run, tokenizer, monkeypatch):
    monkeypatch.setattr(
        encode, "BATCH", 500
    )  # many batches: they are ready in another order than they were sent
    prepared(run, tokenizer)
    files = [f"{split}.{kind}" for split in ("train", "validation") for kind in ("bin", "idx")]
    alone, together = (
        [(encoded(run, f"processes={count}") / name).read_bytes() for name in files] for count in (1, 2)
    )
    assert alone == together


def test_a_share_that_leaves_no_validation_says_so_and_keeps_what_was_there(run, tokenizer):
    folder = encoded(prepared(run, tokenizer))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(
        ValueError, match=r"validation=1e-09 leaves none of the 60 documents for validation; use a l"
    ):
        encoded(run, "validation=1e-9")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_share_that_leaves_nothing_to_train_on_says_so(run, tokenizer):
    prepared(run, tokenizer, DOCUMENTS[:1])
    with pytest.raises(ValueError, match=r"leaves none of the 1 documents for train; use a smaller share"):
        encoded(run, "validation=0.999999")


def test_one_process_is_enough_for_a_small_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(encode.os, "sched_getaffinity", lambda _: range(8))
    for size, processes in ((1000, 1), (5 << 20, 2), (400 << 20, 8)):
        with (tmp_path / "text-00000.jsonl.zst").open("wb") as file:
            file.truncate(size)
        assert encode.processes_for(tmp_path) == processes
