"""Data sets by name: the loading path of `datasets` itself, on a local folder."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megachat.data.document import Broken, Document
from megachat.data.sources import HuggingFace


def source(dataset: Path, **settings: Any) -> HuggingFace:
    given = {"name": "hub", "dataset": str(dataset), "config": None, "folder": None, "split": "train"}
    given |= {"revision": None, "text": "text", "id": None, "language": None, "on_error": "stop"}
    return HuggingFace(**given | settings)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set with two configurations, of three files and one."""
    root = tmp_path / "set"
    for config, files in (("en", 3), ("zh", 1)):
        (root / config).mkdir(parents=True)
        for file in range(files):
            rows = [
                {"text": f"{config} {file} {n}", "uid": f"{config}{file}{n}", "lang": config}
                for n in range(4)
            ]
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / config / f"{file}.parquet")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in ("en", "zh"))
    (root / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return root


def test_each_file_is_a_part_and_rows_keep_their_order(folder: Path) -> None:
    english = source(folder, config="en")
    parts = english.parts()
    assert [part.name for part in parts] == [f"shard-0000{number}-of-00003" for number in range(3)]
    texts = [[found.text for found in english.read(part) if isinstance(found, Document)] for part in parts]
    assert texts == [[f"en {file} {n}" for n in range(4)] for file in range(3)]
    documents = list(english.documents())
    assert [document.text for document in documents] == [*texts[0], *texts[1], *texts[2]]
    assert documents[5].id == "shard-00001-of-00003:2"


def test_a_configuration_a_folder_and_columns_can_be_chosen(folder: Path) -> None:
    chosen = source(folder, config="zh", id="uid", language="lang")
    assert next(chosen.documents()) == Document("zh00", "zh 0 0", "hub", "zh")
    (folder / "README.md").unlink()
    assert len(list(source(folder, folder="zh").documents())) == 4


def test_columns_that_nobody_wants_are_not_read(folder: Path, tmp_path: Path) -> None:
    assert next(iter(source(folder, config="en", id="uid")._stream())).keys() == {"text", "uid"}
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "a.jsonl").write_text('{"text": "one", "n": 1}\n')
    assert [document.text for document in source(tmp_path / "json").documents()] == ["one"]


def test_a_missing_column_and_a_missing_data_set_are_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no column 'body' among \['text', 'uid', 'lang'\]"):
        list(source(folder, config="en", text="body").documents())
    with pytest.raises(ValueError, match=r"dataset '.*/none': .*none"):
        source(folder / "none").parts()


def test_a_row_without_text_is_named_and_set_aside(tmp_path: Path) -> None:
    rows: list[dict[str, str | None]] = [{"text": "one"}, {"text": None}, {"text": "three"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"shard-00000-of-00001:2: null is no text"):
        list(source(tmp_path).documents())
    quarantine = source(tmp_path, on_error="quarantine")
    found = list(quarantine.read(quarantine.parts()[0]))
    assert [type(item) for item in found] == [Document, Broken, Document]


def test_a_damaged_file_stops_with_its_place(folder: Path) -> None:
    path = folder / "en" / "1.parquet"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"/shard-00001-of-00003:1: cannot be read"):
        list(source(folder, config="en", on_error="quarantine").documents())


@pytest.mark.slow
def test_torch_is_not_loaded_for_it(folder: Path) -> None:
    code = (
        "import sys; from megachat.data.sources import HuggingFace\n"
        f"source = HuggingFace(**{source(folder, config='en').model_dump()!r})\n"
        "print(len(list(source.documents())), 'torch' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["12", "False"]
