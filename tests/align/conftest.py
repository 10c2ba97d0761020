"""Folders to start from for all tests of alignment: nothing writes to them."""

import json
import shutil
from pathlib import Path
from random import Random

import pytest

from tests.align import tiny


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, a model that knows nothing in place of SFT's, and a reward model in place of RM's."""
    return tiny.make(tmp_path_factory.mktemp("align") / "inputs")


@pytest.fixture(scope="session")
def half_right(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose SFT model has learnt from answers with six letters in ten right, the others random."""
    folder = tmp_path_factory.mktemp("half_right") / "inputs"
    shutil.copytree(inputs, folder)
    random = Random(0)
    lines = (folder / "conversations.jsonl").read_text().splitlines() * 10
    with (folder / "conversations.jsonl").open("w") as file:
        for line in lines:
            asked, answered = json.loads(line)["messages"]
            said = [
                letter if random.random() < 0.6 else random.choice(tiny.LETTERS)
                for letter in answered["content"]
            ]
            file.write(json.dumps({"messages": [asked, answered | {"content": "".join(said)}]}) + "\n")
    trained = folder.parent / "trained"
    settings = ["batch=16", "micro_batch=16", "epochs=20", "validation=0"]
    tiny.stage("sft", folder, trained, *settings).execute()
    shutil.rmtree(folder / "sft")
    shutil.copytree(trained / "sft", folder / "sft")
    return folder
