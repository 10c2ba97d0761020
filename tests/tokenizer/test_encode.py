"""Shards hold every document once, on the side its id says, whoever encodes them and however often killed."""

import builtins
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megachat.__main__ import main
from megachat.config import compose, decode
from megachat.data.conversations import share
from megachat.data.document import Document, write_documents
from megachat.data.shards import Shards, read_split
from megachat.files import sha256
from megachat.run import Stage, finished, perform
from megachat.tokenizer import encode
from megachat.tokenizer.encoders import Checked, Mistake, SentencePiece, encoder
from megachat.tokenizer.tokenizer import FILE
from megachat.tokenizer.train import torture
from tests.tiny_model import finish
from tests.tiny_run import environment

DOCUMENTS = [
    Document(
        f"d{i}", f"def f{i}(x):\n    return x + {i}  # 中文\n" * (i % 7 + 1), "code" if i < 35 else "wiki/zh"
    )
    for i in range(60)
]


def prepared(run: Path, tokenizer, documents=DOCUMENTS, per_shard=25) -> Path:
    """A run folder in which `clean` and `tokenizer` have finished."""
    write_documents(run / "clean", documents, per_shard)
    tokenizer.save(run / "tokenizer" / FILE)
    for stage in ("clean", "tokenizer"):
        finish(run / stage)
    return run


def encoded(run: Path, *overrides: str) -> Path:
    """The folder that the stage wrote."""
    stage = decode(compose("encode", settings(run, *overrides)))
    stage.execute()
    return stage.folder


def settings(run: Path, *overrides: str) -> list[str]:
    """Those of all encoding here."""
    return [f"run={run}", "validation=0.2", "executor.processes=1", "log.wandb=disabled", *overrides]


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
    assert sorted(contents(folder)) == sorted(["manifest.json", "notes.json", *files])
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["tokenizer"], manifest["vocab"]) == (tokenizer.sha256, tokenizer.vocab)
    notes = json.loads((folder / "notes.json").read_text())
    assert notes == {"encoders": {"sentencepiece": 3}, "compared": 0, "mistakes": []}  # files of text
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
def test_whoever_does_the_work_not_a_byte_changes(run, tokenizer):
    prepared(run, tokenizer)
    alone, together = (contents(encoded(run, f"executor.processes={count}")) for count in (1, 2))
    assert alone == together


@pytest.mark.slow
def test_ray_writes_what_one_process_writes(run, tokenizer):
    ray = pytest.importorskip("ray")
    prepared(run, tokenizer)
    alone = contents(encoded(run))
    try:
        others = ["executor=ray", "executor.address=local"]
        stage = decode(compose("encode", [f"run={run}", "validation=0.2", *others]))
        stage.execute()
    finally:
        ray.shutdown()
    assert contents(stage.folder) == alone


def test_neither_batches_nor_files_of_text_change_a_byte(run, tokenizer, monkeypatch):
    folder = encoded(prepared(run / "three", tokenizer))
    prepared(run / "many", tokenizer, per_shard=4)
    monkeypatch.setattr(encode, "BATCH", 500)
    one, other = contents(folder), contents(encoded(run / "many"))
    assert json.loads(one.pop("notes.json"))["encoders"] == {"sentencepiece": 3}
    assert json.loads(other.pop("notes.json"))["encoders"] == {"sentencepiece": 15}
    assert one == other


def test_nothing_is_trained_again_because_of_who_encoded_the_same_tokens(run, tokenizer, monkeypatch):
    monkeypatch.setattr(encode, "encoder", lambda name, words: SentencePiece(words))
    for name, per_shard, kind in (("one", 25, "sentencepiece"), ("other", 4, "gigatoken")):
        prepared(run / name, tokenizer, per_shard=per_shard)
        perform(Stage.of(compose("encode", settings(run / name, f"encoder={kind}"))))
    one, other = (finished(run / name / "encode")["outputs"] for name in ("one", "other"))
    assert len(one) == 9  # four shards of two files, and the manifest
    assert one == other


def test_gigatoken_writes_what_sentencepiece_writes(run, tokenizer):
    pytest.importorskip("gigatoken")
    odd = [Document(f"odd{i}", text, "odd") for i, text in enumerate(torture(300)) if text]
    prepared(run, tokenizer, [*DOCUMENTS, *odd])
    slow = contents(encoded(run))
    fast = contents(encoded(run, "encoder=gigatoken", "compared=0.1"))
    assert json.loads(slow.pop("notes.json"))["encoders"].keys() == {"sentencepiece"}
    notes = json.loads(fast.pop("notes.json"))
    assert notes["encoders"].keys() == {"gigatoken"}
    assert notes["compared"] > 15
    assert slow == fast


class Panic(BaseException):
    """What Rust's panics look like from Python: no Exception."""


class Planted(SentencePiece):
    """An encoder with a mistake of one kind."""

    def __init__(self, tokenizer, kind):
        super().__init__(tokenizer)
        self.kind = kind

    def encode(self, texts):
        ids, lengths = super().encode(texts)
        starts = np.cumsum(lengths) - lengths
        if self.kind == "batches" and len(texts) > 1:  # each text alone is encoded as it should be
            ids[starts[1:] + 1] = 4
        for start, text in zip(starts, texts, strict=True):
            if self.kind == "late Chinese" and text.startswith("第"):
                ids[start + 1] = 4
            if self.kind == "panic" and "f36(" in text:
                raise Panic("index out of bounds")
        if self.kind == "lost":
            lengths = lengths[:-1]
        if self.kind == "unknown":
            ids[-1] = self.tokenizer.vocab
        return ids, lengths


@pytest.mark.parametrize(
    ("kind", "why", "wrong"),
    [
        ("batches", r"gigatoken's ids of d\d+ differ from sentencepiece's at token 1$", 2),
        ("late Chinese", r"gigatoken's ids of z\d+ differ from sentencepiece's at token 1$", 1),
        ("panic", r"gigatoken failed at d\d+ or after it: Panic\('index out of bounds'\)$", 1),
        ("lost", "gigatoken's ids of d0 and those after it are none of this vocabulary$", 2),
        ("unknown", "gigatoken's ids of d0 and those after it are none of this vocabulary$", 2),
    ],
)
def test_a_file_of_text_that_gigatoken_gets_wrong_is_encoded_by_sentencepiece(
    run, tokenizer, monkeypatch, capsys, kind, why, wrong
):
    late = [Document(f"z{i}", f"第{i}个函数是做什么的？", "zh") for i in range(100)]
    documents = [Document(f"d{i}", f"def f{i}(): pass", "code") for i in range(300)]
    prepared(run, tokenizer, [*documents[:200], *late, *documents[200:]], per_shard=300)
    monkeypatch.setattr(encode, "encoder", lambda name, words: Planted(words, kind))
    found = contents(encoded(run, "encoder=gigatoken", "compared=0.05"))
    notes = json.loads(found.pop("notes.json"))
    assert notes["encoders"].get("sentencepiece", 0) == len(notes["mistakes"]) == wrong
    assert re.search(rf"text-00000\.jsonl\.zst: {why}", notes["mistakes"][0])
    assert f"{notes['mistakes'][0]}; sentencepiece encoded all of it" in capsys.readouterr().err
    monkeypatch.undo()
    right = contents(encoded(run))
    right.pop("notes.json")
    assert found == right


def test_both_encode_the_share_of_documents_asked_for_and_the_first_of_each_batch(tokenizer):
    documents = [Document(f"d{i}", "x", "test") for i in range(2000)]
    plain = SentencePiece(tokenizer)
    checked = Checked(plain, plain, tokenizer.vocab, 0.1)
    checked.encode(documents)
    assert 150 < checked.count < 250  # 200 expected, with a standard deviation of 13
    none = Checked(Planted(tokenizer, "late Chinese"), plain, tokenizer.vocab, 0.0)
    none.encode(documents[:10])
    assert none.count == 1
    with pytest.raises(Mistake, match="ids of a differ"):
        none.encode([Document("a", "第一", "test"), *documents])


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
    for name in ("train.123.tmp", f"validation.{os.getpid()}.tmp"):
        (folder / name).mkdir(parents=True)
        (folder / name / "x.bin").write_bytes(b"half")
    (folder / "config.yaml.12.tmp").write_text("se")
    (run / "work" / "encode-0123456789ab").mkdir(parents=True)  # of other settings
    assert encoded(run) == folder
    names = ["manifest.json", "notes.json", "train", "validation"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert not any((run / "work").iterdir())


KILLED = """
import os, signal, sys
from megachat.__main__ import main
from megachat.data import shards, steps
from megachat.tokenizer import encode
place, arguments = sys.argv[1], sys.argv[2:]
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
work, close, rmtree = encode.EncodeTexts.work, shards.ShardWriter.close, encode.shutil.rmtree
def killed_work(step, task):
    record = work(step, task)
    return record if task < 1 else die()            # its shards are there, its record is not
def killed_close(writer):
    die() if "00002-" in str(writer.prefix) else close(writer)
def killed_merge(writer):
    die() if writer.prefix.parent.name.startswith("validation") else close(writer)
def killed_rmtree(path, *rest, **named):
    if "encode-" in str(path):
        for shard in path.glob("*.bin"):
            shard.unlink()
        die()
    rmtree(path, *rest, **named)
if place == "work":
    encode.EncodeTexts.work = killed_work
elif place == "write":
    shards.ShardWriter.close = killed_close
elif place == "merge":
    shards.ShardWriter.close = killed_merge
elif place == "manifest":
    encode.write_json = die
else:
    encode.shutil.rmtree = killed_rmtree
main(arguments)
"""


@pytest.mark.slow
def test_an_encode_killed_at_any_place_goes_on_to_the_same_bytes(run, tokenizer):
    whole = prepared(run / "whole", tokenizer)
    perform(Stage.of(compose("encode", settings(whole))))
    prepared(run / "killed", tokenizer)
    arguments = ["encode", *settings(run / "killed")]
    first = {}
    for place in ("work", "write", "merge", "manifest", "remove"):
        command = [sys.executable, "-c", KILLED, place, *arguments]
        done = subprocess.run(command, env=environment(), check=False)
        assert done.returncode == -signal.SIGKILL, place
        records = {path.name: path.stat().st_mtime_ns for path in run.glob("killed/work/encode-*/*.json")}
        if place != "remove":
            assert records.items() >= first.items()  # what was done has not been done again
            first = records
    assert sorted(first) == ["00000.json", "00001.json", "00002.json"]
    main(arguments)
    one, other = (contents(run / name / "encode") for name in ("whole", "killed"))
    for name in ("config.yaml", "done.json"):  # they name the run, and the time
        del one[name], other[name]
    assert one == other
    outputs = [finished(run / name / "encode")["outputs"] for name in ("whole", "killed")]
    assert outputs[0] == outputs[1]
