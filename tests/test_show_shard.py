"""`tools/show_shard.py` decodes any shard with the tokenizer that wrote it."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from megachat.data.shards import HEADER, MAGIC, ShardWriter
from megachat.files import sha256, write_json
from tests.evals import tiny

TOOL = Path(__file__).parents[1] / "tools" / "show_shard.py"


def show(*arguments: object, status: int = 0) -> str:
    """What the tool prints; of a failure, its message."""
    command = [sys.executable, TOOL, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(TOOL.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr if status else done.stdout


@pytest.fixture
def prefix(run: Path) -> Path:
    """A shard with masks in a run of its own."""
    words = tiny.tokenizer()
    (run / "tokenizer").mkdir(parents=True)
    words.save(run / "tokenizer" / "tokenizer.model")
    with ShardWriter(run / "encode" / "train" / "chat", words.vocab, masked=True) as writer:
        for text in ("ab", "ba"):
            tokens = [words.bos, *words.encode(text), words.end]
            writer.add(tokens, [0, *[1] * (len(tokens) - 1)])
    write_json(run / "encode" / "manifest.json", {"tokenizer": words.sha256})
    return run / "encode" / "train" / "chat"


def test_a_document_is_shown_token_by_token(prefix: Path) -> None:
    words = tiny.tokenizer()
    ids = words.encode("ba")
    first, title, *rows = show(prefix, "--document", 1).splitlines()
    assert first.startswith(f"{prefix}: 2 documents, ")
    assert title == f"--- document 1: {len(ids) + 2} tokens"
    expected = [
        (words.bos, 0, "<s>"),
        *[(token, 1, words.decode([token])) for token in ids],
        (words.end, 1, "<|end|>"),
    ]
    assert rows == [
        f"{place}\t{token}\t{mask}\t{text!r}" for place, (token, mask, text) in enumerate(expected)
    ]
    for ending in ("bin", "idx", "mask.bin"):
        assert "--- document 1" in show(f"{prefix}.{ending}", "--count", 5)
    assert str(prefix) in show(prefix.parents[1])  # a folder of shards


def test_mistakes_say_what_to_do(prefix: Path, run: Path) -> None:
    assert "--count -5: how many documents to show is 1 or more" in show(prefix, "--count", -5, status=2)
    assert "has documents 0 to 1; --document 2 is not one" in show(prefix, "--document", 2, status=2)
    assert "none.idx is missing" in show(prefix.parent / "none", status=2)
    write_json(run / "encode" / "manifest.json", {"tokenizer": "0" * 64})
    assert "has the sha256 000000000000 that its manifest names; name one with --tokenizer" in show(
        prefix, status=2
    )
    assert "document 0" in show(prefix, "--tokenizer", run)


def test_the_tokenizer_may_be_of_the_run_that_the_stage_read(prefix: Path, run: Path) -> None:
    (run / "tokenizer").rename(run.parent / "tokenizer")
    assert "no tokenizer near" in show(prefix, status=2)
    (run / "encode" / "config.yaml").write_text(f"inputs: {run.parent}\n")
    assert "document 0" in show(prefix)


def test_a_shard_or_a_document_with_nothing_in_it_is_shown_as_that(prefix: Path) -> None:
    words = tiny.tokenizer()
    with ShardWriter(prefix.parent / "empty", words.vocab):
        pass
    assert f"{prefix.parent / 'empty'}: 0 documents, 0 tokens\n" == show(prefix.parent / "empty")
    shown = show(prefix.parents[1])
    assert "empty: 0 documents" in shown
    assert "chat: 2 documents" in shown
    # Of two documents the first has no tokens; ours always have two.
    index = HEADER.pack(MAGIC, 1, 8, 2, 3) + struct.pack("<2i2q3q", 0, 1, 0, 0, 0, 1, 2)
    (prefix.parent / "foreign.idx").write_bytes(index)
    (prefix.parent / "foreign.bin").write_bytes(struct.pack("<H", words.bos))
    rows = show(prefix.parent / "foreign", "--count", 2).splitlines()[1:]
    assert rows == ["--- document 0: 0 tokens", "--- document 1: 1 tokens", f"0\t{words.bos}\t-\t'<s>'"]


@pytest.mark.parametrize("kind", ["bin", "idx", "mask.bin"])
def test_verify_names_the_file_that_differs(prefix: Path, kind: str) -> None:
    folder = prefix.parents[1]
    sums = {one: sha256(Path(f"{prefix}.{one}")) for one in ("bin", "idx", "mask.bin")}
    shards = {"train/chat": {"split": "train", "source": "chat", "sha256": sums}}
    write_json(folder / "manifest.json", {"tokenizer": tiny.tokenizer().sha256, "shards": shards})
    for place in (prefix, prefix.parent, folder, folder.parent, f"{prefix}.bin"):
        assert show(place, "--verify") == "all files are what their manifest says\n"
    path = Path(f"{prefix}.{kind}")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for place in (prefix, folder.parent):
        assert show(place, "--verify", status=1).startswith(f"{path} has the sha256 {sha256(path)[:12]}, and")
    path.unlink()
    assert show(folder, "--verify", status=1) == f"{path} is missing\n"
    assert "no manifest.json at" in show(prefix.parent / "other", "--verify", status=2)
