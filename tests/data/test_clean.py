"""The clean stage: what it keeps, what it says of the rest, and that a mistake leaves nothing behind."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from megachat.config import compose, decode
from megachat.data import clean
from megachat.data.clean import Clean
from megachat.data.document import Document, read_documents
from megachat.data.sources import Source

WORDS = ["the", "and", "of", "model", "language", "data", "train", "token", "learn", "weight", "loss", "step"]


class Fixed(Source):
    """Documents given in a test."""

    given: list[tuple[str, str]]
    """Ids and texts."""

    def documents(self) -> Any:
        return (Document(id=name, text=text, source="fixed") for name, text in self.given)


def prose(seed: int, words: int = 150) -> str:
    rng = random.Random(seed)
    return "\n".join(" ".join(rng.choices(WORDS, k=10)) for _ in range(words // 10))


def stage(run: Path, documents: dict[str, list[tuple[str, str]]], *overrides: str) -> Clean:
    """The stage as composed from conf/, with other sources."""
    built: Clean = decode(compose("clean", [f"run={run}", *overrides]))
    return built.model_copy(
        update={"corpus": {name: Fixed(given=given) for name, given in documents.items()}}
    )


def report(run: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((run / "clean" / "report.json").read_text())
    return read


def removed(run: Path) -> dict[str, int]:
    return {row["step"]: row["documents_removed"] for row in report(run)["rows"] if row["documents_removed"]}


def test_each_document_is_removed_for_its_own_reason_and_the_report_says_so(run: Path) -> None:
    first = prose(1)
    documents = [
        ("first", first),
        ("empty", "\x00\n"),
        ("short", "the and"),
        ("russian", "Языковая модель читает много текста. " * 5),
        ("again and again", "the data and the model\n" * 30),
        ("spam", " ".join(f"offer{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(60))),
        ("exact", "\ufeff" + first.upper().replace("\n", "\r\n") + "\n\n"),
        ("near", first.replace("weight", "mass", 1)),
        ("last", prose(2)),
    ]
    stage(run, {"mine": documents}).execute()
    kept = list(read_documents(run / "clean"))
    assert [(document.id, document.language) for document in kept] == [("first", "en"), ("last", "en")]
    assert removed(run) == {
        "normalise": 1,
        "script": 1,
        "length": 1,
        "repetition": 1,
        "words": 1,
        "exact copies": 1,
        "near copies": 1,
    }
    rows = {row["step"]: row for row in report(run)["rows"]}
    assert rows["exact copies"]["examples"] == ["exact = first"]
    assert rows["near copies"]["examples"] == ["near ~ first"]
    assert rows["length"]["examples"] == ["short: 'the and'"]
    assert rows["length"]["bytes_removed"] == len("the and")
    assert rows["normalise"]["documents_in"] == 9
    for before, after in zip(report(run)["rows"], report(run)["rows"][1:], strict=False):
        assert after["documents_in"] == before["documents_in"] - before["documents_removed"]
    size = len(first) + len(prose(2))
    assert report(run)["languages"] == {"en": {"documents": 2, "bytes": size}}
    assert report(run)["sources"] == {"fixed": {"documents": 2, "bytes": size}}
    assert (report(run)["documents"], report(run)["bytes"]) == (2, size)


def test_of_two_copies_the_one_from_the_earlier_source_stays(run: Path) -> None:
    stage(run, {"z": [("from z", prose(1))], "a": [("from a", prose(1))]}).execute()
    assert [document.id for document in read_documents(run / "clean")] == ["from z"]


def test_near_copies_stay_when_only_exact_ones_are_wanted(run: Path) -> None:
    texts = [("a", prose(1)), ("b", prose(1).replace("weight", "mass", 1)), ("c", prose(1))]
    stage(run, {"mine": texts}, "dedup=exact").execute()
    assert [document.id for document in read_documents(run / "clean")] == ["a", "b"]
    assert [row["step"] for row in report(run)["rows"]][-1] == "exact copies"


def test_texts_too_short_for_a_shingle_are_only_compared_exactly(run: Path) -> None:
    given = [("a", "three words here"), ("b", "three words there"), ("c", "three words here")]
    stage(run, {"mine": given}, "filters=none").execute()
    assert [document.id for document in read_documents(run / "clean")] == ["a", "b"]


@pytest.mark.slow
def test_the_number_of_processes_changes_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clean, "BATCH", 5_000)
    path = run.parent / "corpus.jsonl"
    path.parent.mkdir(parents=True)
    texts = [prose(n % 40) for n in range(100)] + ["short"] * 5
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    read = []
    for processes in (1, 2):
        settings = ["corpus=[json_lines]", f"corpus.json_lines.paths=[{path}]", f"processes={processes}"]
        folder = run / str(processes)
        decode(compose("clean", [f"run={folder}", "documents_per_shard=7", *settings])).execute()
        read.append({file.name: file.read_bytes() for file in (folder / "clean").iterdir()})
    assert read[0] == read[1]
    assert len(read[0]) == -(-40 // 7) + 1


def test_a_broken_line_far_into_the_corpus_leaves_nothing_behind(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clean, "BATCH", 1_000)
    path = run.parent / "corpus.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps({"text": prose(n)}) + "\n" for n in range(20)) + "{broken\n")
    settings = ["corpus=[json_lines]", f"corpus.json_lines.paths=[{path}]", "processes=1"]
    with pytest.raises(ValueError, match=r"corpus\.jsonl:21: not JSON"):
        decode(compose("clean", [f"run={run}", *settings])).execute()
    assert not list((run / "clean").iterdir())


def test_a_failed_second_run_keeps_what_the_first_one_wrote(run: Path) -> None:
    stage(run, {"mine": [("a", prose(1))]}).execute()
    before = {path.name: path.read_bytes() for path in (run / "clean").iterdir()}
    with pytest.raises(ValueError, match="no document is left"):
        stage(run, {"mine": [("b", "short")]}).execute()
    assert {path.name: path.read_bytes() for path in (run / "clean").iterdir()} == before


def test_a_corpus_of_which_nothing_is_left_shows_what_removed_it(run: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)no document is left; loosen .*\nlength +1 +1 "):
        stage(run, {"mine": [("a", "short")]}, "~filters.script").execute()
    assert not list((run / "clean").iterdir())


def test_an_empty_source_is_named(run: Path) -> None:
    with pytest.raises(ValueError, match=r"corpus\.theirs: holds no document; leave it out or mend"):
        stage(run, {"mine": [("a", prose(1))], "theirs": []}).execute()
    with pytest.raises(ValueError, match="names no source"):
        stage(run, {}).execute()


@pytest.mark.slow
def test_the_quickstart_keeps_most_of_the_library_and_drops_its_copied_tables(run: Path) -> None:
    decode(compose("clean", ["experiment=quickstart", f"run={run}"])).execute()
    told = report(run)
    assert told["bytes"] > 5_000_000
    assert set(told["languages"]) == {"code", "en"}
    near = next(row for row in told["rows"] if row["step"] == "near copies")
    assert near["documents_removed"] > 10
    assert near["examples"][0].startswith("lib/encodings/")
    assert told["documents"] > 0.8 * told["rows"][0]["documents_in"]
    assert len(list(read_documents(run / "clean"))) == told["documents"]
