"""Conversations read back from shards are those that `sft` renders and splits."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megachat.__main__ import main
from megachat.config import compose, decode
from megachat.data.conversations import JsonConversations, opening, share
from megachat.data.shards import Shard, ShardWriter
from megachat.run import finished
from megachat.tokenizer.chat_format import render
from megachat.tokenizer.encode_chat import Chats
from megachat.tokenizer.tokenizer import FILE
from tests.tiny_model import finish
from tests.tiny_run import environment

OF_THE_RUN = {"done.json", "config.yaml"}
"""What names the folder."""


def chats(folder: Path) -> Path:
    """A file of conversations."""
    path = folder / "chats.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(40):
            said = [("system", "简短。")] * (number % 2) + [
                ("user", f"What is {number}？"),
                ("assistant", "A number."),
            ]
            said += [("user", "Sure?"), ("assistant", "")] * (number % 3)
            messages = [{"role": role, "content": content} for role, content in said]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def test_what_is_read_back_is_what_sft_computes(run, tokenizer, tmp_path):
    path = chats(tmp_path)
    tokenizer.save(run / "tokenizer" / FILE)
    finish(run / "tokenizer")
    settings = ["conversations=json", f"conversations.path={path}", "validation=0.3"]
    stage = decode(compose("encode_chat", [f"run={run}", *settings]))
    stage.execute()
    manifest = json.loads((stage.folder / "manifest.json").read_text())
    conversations = JsonConversations(path=str(path)).conversations()
    for split in ("train", "validation"):
        # As SFT.prepare splits and SFT._packed renders.
        expected = [
            render(one, tokenizer)
            for one in conversations
            if (share(opening(one)) < 0.3) == (split == "validation")
        ]
        assert list(Chats(Shard(stage.folder / split))) == expected
        entry = manifest["shards"][split]
        assert entry["documents"] == len(expected) > 3
        assert entry["tokens"] == sum(len(tokens) for tokens, _ in expected)
        assert entry["trained"] == sum(sum(mask) for _, mask in expected)
        assert entry["sha256"].keys() == {"bin", "idx", "mask.bin"}


KILLED = """
import os, signal, sys
from megachat.__main__ import main
from megachat.data import shards
close = shards.ShardWriter.close
def killed(writer):
    os.kill(os.getpid(), signal.SIGKILL) if writer.prefix.name == sys.argv[1] else close(writer)
shards.ShardWriter.close = killed
main(sys.argv[2:])
"""


@pytest.mark.slow
def test_one_that_is_killed_is_done_again_to_the_same_bytes_and_leaves_nothing(run, tokenizer, tmp_path):
    settings = ["conversations=json", f"conversations.path={chats(tmp_path)}", "validation=0.3"]
    written = []
    for name in ("whole", "killed"):
        tokenizer.save(run / name / "tokenizer" / FILE)
        finish(run / name / "tokenizer")
        command = ["encode_chat", f"run={run / name}", "log.wandb=disabled", *settings]
        for split in ("train", "validation") if name == "killed" else ():
            program = [sys.executable, "-c", KILLED, split, *command]
            assert subprocess.run(program, env=environment(), check=False).returncode == -signal.SIGKILL
            assert not finished(run / name / "encode_chat")
        main(command)
        files = (run / name / "encode_chat").iterdir()
        written.append({path.name: path.read_bytes() for path in files if path.name not in OF_THE_RUN})
    assert written[0].keys() >= {"train.bin", "train.mask.bin", "validation.idx", "manifest.json"}
    assert written[0] == written[1]


def test_a_shard_of_text_is_no_shard_of_conversations(tmp_path):
    with ShardWriter(tmp_path / "x", 300) as writer:
        writer.add([1])
    with pytest.raises(ValueError, match=r"x\.bin has no mask beside it; `megachat encode_chat`"):
        Chats(Shard(tmp_path / "x"))
