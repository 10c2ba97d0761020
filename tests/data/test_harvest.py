"""The embedded corpus: the same on every run, safe to harvest, and rich in plain sentences."""

import subprocess
import sys
from collections import Counter

import pytest

from megachat.data.harvest import Entry, entries, first_sentence, library_documents, public_modules


@pytest.mark.parametrize(
    ("doc", "sentence"),
    [
        ("Greatest Common Divisor.", "Greatest Common Divisor."),
        ("Return the sum of two\nnumbers. Raise nothing.\n\nMore.", "Return the sum of two numbers."),
        ("Return e.g. the first one. Then stop.", "Return e.g. the first one."),
        ("Return the value of Python 3.11 objects.", "Return the value of Python 3.11 objects."),
        ("Return the sum", ""),  # no full stop
        ("Too short.", ""),
        ("Return " + "very " * 30 + "much.", ""),  # over 120 characters
        ("gcd(x, y) -> the greatest divisor.", ""),
        ("Return the café of the day.", ""),
        ("And so on and on...", ""),
        ("", ""),
    ],
)
def test_the_first_sentence_is_plain_prose_or_nothing(doc: str, sentence: str) -> None:
    assert first_sentence(doc) == sentence


def test_a_known_function_class_and_method_have_their_sentences() -> None:
    found = {entry.name: entry for entry in entries()}
    assert found["math.gcd"] == Entry("math.gcd", "function", "Greatest Common Divisor.")
    assert found["argparse.Namespace"].kind == "class"
    assert found["zipfile.ZipFile.namelist"] == Entry(
        "zipfile.ZipFile.namelist", "method", "Return a list of file names in the archive."
    )


def test_entries_are_many_sorted_and_each_name_and_sentence_is_there_once() -> None:
    names = [entry.name for entry in entries()]
    sentences = [entry.sentence for entry in entries()]
    assert len(names) > 2500
    assert names == sorted(set(names))
    assert len(set(sentences)) == len(sentences)
    for entry in entries():
        assert 15 <= len(entry.sentence) <= 120
        assert entry.sentence.isascii()
        assert entry.sentence.endswith(".")
        assert "\n" not in entry.sentence
        assert not any(part.startswith("_") for part in entry.name.split("."))


def test_modules_with_side_effects_are_left_alone() -> None:
    heads = {name.split(".")[0] for name in public_modules()}
    assert heads.isdisjoint({"antigravity", "this", "idlelib", "turtle", "tkinter", "test", "readline"})
    assert {"math", "os", "json", "collections"} <= heads


@pytest.mark.slow
def test_the_corpus_does_not_depend_on_the_hash_seed_and_harvesting_prints_nothing() -> None:
    program = (
        "import hashlib; from megachat.data.harvest import library_documents, entries\n"
        "text = repr([*library_documents()]) + repr(entries())\n"
        "print(hashlib.sha256(text.encode()).hexdigest())"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-W", "error", "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        for seed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout
    assert len(runs[0].stdout) == 65
    assert [run.stderr for run in runs] == ["", ""]


def test_the_documents_are_source_topics_and_reference_with_unique_ids() -> None:
    documents = list(library_documents())
    assert len({document.id for document in documents}) == len(documents)
    assert set(Counter(document.source for document in documents)) == {"library", "topics", "reference"}
    assert sum(len(document.text) for document in documents) > 5_000_000


def test_no_document_names_the_python_that_runs() -> None:
    # platform.architecture's first parameter has sys.executable for its default.
    assert not any(sys.executable in document.text for document in library_documents())


def test_a_reference_page_tells_every_sentence_of_its_module() -> None:
    page = next(document.text for document in library_documents() if document.id == "api/math")
    assert "math.gcd(*integers)\n    Greatest Common Divisor.\n" in page
    assert "The function math.gcd: Greatest Common Divisor.\n" in page
    for entry in entries():
        if entry.name.startswith("math."):
            assert f"The {entry.kind} {entry.name}: {entry.sentence}" in page
