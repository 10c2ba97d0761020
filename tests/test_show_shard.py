"""`tools/show_shard.py` decodes any shard with the tokenizer that wrote it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megachat.data.shards import ShardWriter
from megachat.files import write_json
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
    assert "--- document 1" in show(f"{prefix}.bin", "--count", 5)
    assert str(prefix) in show(prefix.parents[1])  # a folder of shards


def test_mistakes_say_what_to_do(prefix: Path, run: Path) -> None:
    assert "has 2 documents; --document 2 is not below that" in show(prefix, "--document", 2, status=2)
    assert "none.idx is missing" in show(prefix.parent / "none", status=2)
    write_json(run / "encode" / "manifest.json", {"tokenizer": "0" * 64})
    assert "has the sha256 000000000000 that its manifest names; name one with --tokenizer" in show(
        prefix, status=2
    )
    assert "document 0" in show(prefix, "--tokenizer", run)
