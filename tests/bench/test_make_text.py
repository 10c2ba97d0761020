"""The generated corpus: its bytes, its truth, and its looks."""

import hashlib
import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import zstandard

from tools.bench.make_text import documents, generated, write
from tools.bench.planted import KINDS, chinese, jaccard, shingles


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of four megabytes."""
    made = tmp_path_factory.mktemp("corpus") / "text"
    write(made, 4e6, seed=0, compressed=False)
    return made


@pytest.fixture(scope="module")
def texts(folder: Path) -> dict[str, str]:
    """Its documents by their ids."""
    files = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("text-*.jsonl"))]
    rows = [json.loads(line) for file in files for line in file.splitlines()]
    return {row["id"]: row["text"] for row in rows}


@pytest.fixture(scope="module")
def truth(folder: Path) -> list[dict[str, object]]:
    """What is known of its copies."""
    return [json.loads(line) for line in (folder / "_truth.jsonl").read_text().splitlines()]


def test_the_bytes_are_those_of_every_other_machine(folder: Path):
    names = sorted((path.name for path in folder.iterdir()), key=lambda name: name.lstrip("_"))
    digest = hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()
    assert len(names) == 17
    assert digest[:16] == "7462dbe0b2a9c50a"


def test_a_fifth_is_copies_and_each_is_as_alike_as_the_truth_says(texts, truth):
    assert 0.17 < len(truth) / len(texts) < 0.23
    for pair in truth[:200]:
        alike = jaccard(shingles(texts[pair["of"]]), shingles(texts[pair["id"]]))
        assert pair["jaccard"] == pytest.approx(alike, abs=1e-6), pair


def test_the_copies_are_of_all_kinds_and_of_all_degrees(truth):
    assert set(Counter(pair["kind"] for pair in truth)) == set(KINDS)
    assert all(pair["jaccard"] == 1 for pair in truth if pair["kind"] == "retyped")
    assert sum(pair["jaccard"] < 0.7 for pair in truth) > 10
    assert sum(pair["jaccard"] > 0.9 for pair in truth) > 10


def test_retyped_copies_differ_from_their_originals_in_letters(texts, truth):
    retyped = [pair for pair in truth if pair["kind"] == "retyped"]
    same = sum(texts[pair["of"]] == texts[pair["id"]] for pair in retyped)
    assert same < len(retyped) / 10  # a short text may have no comma to leave out


def test_some_clusters_are_large():
    copies = Counter(made.of for made in islice(documents(0), 10_000) if made.of)
    assert max(copies.values()) >= 15


def test_documents_are_as_long_as_those_of_the_web_and_words_as_those_of_english(texts):
    english = [text for text in texts.values() if not chinese(text)]
    assert 0.6 < len(english) / len(texts) < 0.7
    sizes = sorted(len(text.encode()) for text in texts.values())
    assert 2900 < sum(sizes) / len(sizes) < 4100
    assert 1500 < sizes[len(sizes) // 2] < 2500
    words = Counter(word for text in english for word in text.lower().split())
    assert 4 < sum(len(word) * count for word, count in words.items()) / words.total() < 6
    assert words.most_common(1)[0][0] == "the"


def test_two_generated_texts_have_next_to_nothing_in_common():
    for name in ("en", "zh"):
        several = [shingles(text) for text in generated(name, 40_000)]
        assert max(jaccard(one, other) for one in several for other in several if one is not other) < 0.02


def test_compressed_files_hold_the_same(folder: Path, tmp_path: Path):
    write(tmp_path / "text", 4e6, seed=0, compressed=True)
    with (tmp_path / "text" / "text-03.jsonl.zst").open("rb") as file:
        assert (
            zstandard.ZstdDecompressor().stream_reader(file).read() == (folder / "text-03.jsonl").read_bytes()
        )


def test_a_folder_that_holds_something_is_refused(folder: Path):
    with pytest.raises(ValueError, match="text is not empty; empty it, or name another folder with --out"):
        write(folder, 1e6, seed=0, compressed=False)
