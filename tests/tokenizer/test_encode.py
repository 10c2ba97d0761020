"""Shards hold every document once, on the side its id says, whatever encodes them in how many processes."""

import builtins
import json
from pathlib import Path

import numpy as np
import pytest

from megachat.config import compose, decode
from megachat.data.conversations import share
from megachat.data.document import Document, write_documents
from megachat.data.shards import Shards, read_split
from megachat.files import sha256
from megachat.tokenizer import encode
from megachat.tokenizer.encoders import SentencePiece, encoder
from megachat.tokenizer.tokenizer import FILE
from megachat.tokenizer.train import torture
from tests.tiny_model import finish

DOCUMENTS = [
    Document(
        f"d{i}", f"def f{i}(x):\n    return x + {i}  # 中文\n" * (i % 7 + 1), "code" if i < 35 else "wiki/zh"
    )
    for i in range(60)
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


def both(folder: Path, split: str) -> Shards:
    """The shards of both sources as one."""
    return Shards(list(read_split(folder, split).values()))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_document_is_between_its_ends_on_its_side(run, tokenizer):
    folder = encoded(prepared(run, tokenizer))
    found = {}
    for split in ("train", "validation"):
        shards = both(folder, split)
        rows = np.split(shards.read(0, shards.size), shards.documents[1:-1])
        assert all((row[0], row[-1]) == (tokenizer.bos, tokenizer.eos) for row in rows)
        found[split] = [tokenizer.decode(row.tolist()) for row in rows]
    for split, held in (("train", False), ("validation", True)):
        assert found[split] == [one.text for one in DOCUMENTS if (share(one.id) < 0.2) == held]
    assert 3 <= len(found["validation"]) <= 25  # of 60, 12 expected: four standard deviations


def test_a_shard_holds_one_source_and_the_manifest_says_which(run, tokenizer):
    folder = encoded(prepared(run, tokenizer))
    names = [f"{name}.{kind}" for name in ("code", "wiki%2Fzh") for kind in ("bin", "idx")]
    files = [f"{split}/{name}" for split in ("train", "validation") for name in names]
    assert sorted(contents(folder)) == sorted(["manifest.json", *files])
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["tokenizer"], manifest["vocab"]) == (tokenizer.sha256, tokenizer.vocab)
    assert manifest["encoders"] == {"sentencepiece": 3}  # files of text
    for split in ("train", "validation"):
        shards = read_split(folder, split)
        assert list(shards) == ["code", "wiki/zh"]
        totals = {"documents": 0, "bytes": 0, "tokens": 0}
        for source, shard in shards.items():
            texts = [
                one.text
                for one in DOCUMENTS
                if one.source == source and (share(one.id) < 0.2) == (split == "validation")
            ]
            expected = {"documents": len(texts), "bytes": sum(len(text.encode()) for text in texts)}
            expected["tokens"] = sum(len(tokenizer.encode(text)) + 2 for text in texts)
            sums = {kind: sha256(shard.path.with_suffix(f".{kind}")) for kind in ("bin", "idx")}
            entry = {"split": split, "source": source, **expected, "sha256": sums}
            assert manifest["shards"][f"{split}/{shard.path.stem}"] == entry
            assert (len(shard), len(shard.tokens)) == (expected["documents"], expected["tokens"])
            assert shard.sums == list(sums.values())
            totals = {name: count + expected[name] for name, count in totals.items()}
        assert manifest[split] == totals


def test_more_documents_move_none_to_the_other_side(run, tokenizer):
    some = prepared(run / "some", tokenizer, DOCUMENTS[:40])
    more = prepared(run / "more", tokenizer)
    few, many = both(encoded(some), "validation"), both(encoded(more), "validation")
    assert few.size < many.size
    np.testing.assert_array_equal(few.read(0, few.size), many.read(0, few.size))


@pytest.mark.slow
def test_the_number_of_processes_changes_no_byte(run, tokenizer):
    prepared(run, tokenizer)
    alone, together = (contents(encoded(run, f"processes={count}")) for count in (1, 2))
    assert alone == together


def test_neither_batches_nor_files_of_text_change_a_byte(run, tokenizer, monkeypatch):
    folder = encoded(prepared(run / "three", tokenizer))
    prepared(run / "many", tokenizer)
    write_documents(run / "many" / "clean", DOCUMENTS, per_shard=4)
    monkeypatch.setattr(encode, "BATCH", 500)
    one, other = contents(folder), contents(encoded(run / "many"))
    assert json.loads(other["manifest.json"])["encoders"] == {"sentencepiece": 15}
    assert one | {"manifest.json": b""} == other | {"manifest.json": b""}


def test_gigatoken_writes_what_sentencepiece_writes(run, tokenizer):
    pytest.importorskip("gigatoken")
    odd = [Document(f"odd{i}", text, "odd") for i, text in enumerate(torture(300)) if text]
    prepared(run, tokenizer, [*DOCUMENTS, *odd])
    slow = contents(encoded(run))
    fast = contents(encoded(run, "encoder=gigatoken", "compared=5"))
    assert json.loads(slow.pop("manifest.json"))["encoders"].keys() == {"sentencepiece"}
    assert json.loads(fast.pop("manifest.json"))["encoders"].keys() == {"gigatoken"}
    assert slow == fast


class Wrong(SentencePiece):
    """An encoder that gets documents that speak of f30 wrong."""

    def encode(self, texts):
        ids, lengths = super().encode(texts)
        if "f30(" in texts[0]:
            ids[1] += 1
        return ids, lengths


@pytest.mark.parametrize(("compared", "noticed"), [(5, False), (6, True)])
def test_a_file_of_text_that_gigatoken_gets_wrong_is_encoded_by_sentencepiece(
    run, tokenizer, monkeypatch, capsys, compared, noticed
):
    # Document 30 is the sixth of the second file of 25.
    monkeypatch.setattr(encode, "encoder", lambda name, words: Wrong(words))
    monkeypatch.setattr(encode, "BATCH", 1)
    prepared(run, tokenizer)
    found = contents(encoded(run, "encoder=gigatoken", f"compared={compared}"))
    encoders = json.loads(found.pop("manifest.json"))["encoders"]
    said = "gigatoken's ids of d30 in" in capsys.readouterr().err
    assert said == noticed
    assert encoders == ({"gigatoken": 2, "sentencepiece": 1} if noticed else {"gigatoken": 3})
    monkeypatch.undo()
    right = contents(encoded(run))
    right.pop("manifest.json")
    assert (found == right) == noticed


def test_gigatoken_that_is_not_installed_names_the_extra(tokenizer, monkeypatch):
    install = builtins.__import__

    def missing(name, *rest):
        if name == "gigatoken":
            raise ImportError(name)
        return install(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match=r"pip install 'megachat\[fast\]'"):
        encoder("gigatoken", tokenizer)


def test_a_share_that_leaves_no_validation_says_so_and_keeps_what_was_there(run, tokenizer):
    folder = encoded(prepared(run, tokenizer))
    before = contents(folder)
    with pytest.raises(
        ValueError, match=r"validation=1e-09 leaves none of the 60 documents for validation; use a l"
    ):
        encoded(run, "validation=1e-9")
    assert contents(folder) == before


def test_a_share_that_leaves_nothing_to_train_on_says_so(run, tokenizer):
    prepared(run, tokenizer, DOCUMENTS[:1])
    with pytest.raises(ValueError, match=r"leaves none of the 1 documents for train; use a smaller share"):
        encoded(run, "validation=0.999999")


def test_what_a_killed_encode_left_behind_is_removed(run, tokenizer):
    folder = prepared(run, tokenizer) / "encode"
    for name in ("parts.abc.tmp", "train.123.tmp"):
        (folder / name).mkdir(parents=True)
        (folder / name / "x.bin").write_bytes(b"half")
    assert encoded(run) == folder
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "train", "validation"]


def test_one_process_is_enough_for_a_small_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(encode.os, "sched_getaffinity", lambda _: range(8))
    for size, files, processes in ((1000, 9, 1), (5 << 20, 9, 2), (400 << 20, 9, 8), (400 << 20, 3, 3)):
        texts = [tmp_path / f"text-{number}.jsonl.zst" for number in range(files)]
        for text in texts:
            text.write_bytes(b"")
        with texts[0].open("wb") as file:
            file.truncate(size)
        assert encode.processes_for(texts) == processes
