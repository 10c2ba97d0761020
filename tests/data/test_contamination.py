"""Contamination: what of a benchmark is found in a document, and how much of it."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megachat.config import compose, decode
from megachat.data import contamination
from megachat.data.contamination import Benchmarks, Hit, Overlaps, hashed, runs, tokens

QUESTION = (
    "A farmer has seventeen sheep and sells all but nine of them at the market on Monday. "
    "How many sheep does she still have?"
)  # 24 words: 12 runs of 13
CHINESE = "一个农民有十七只羊，星期一她在市场上卖掉了其中的八只，请问她现在还剩下几只羊？"
"""36 characters: 17 runs of 20."""


def benchmarks(*paths: Path, **settings: Any) -> Benchmarks:
    rules: Benchmarks = decode(compose("benchmarks/none")["benchmarks"])
    return rules.model_copy(update={"paths": [str(path) for path in paths], **settings})


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_a_run_does_not_mind_case_and_punctuation() -> None:
    assert list(tokens("Don't, 我们GO!")) == ["don", "t", "我", "们", "go"]


def test_runs_depend_on_the_order_of_their_tokens() -> None:
    sizes = dict(runs(hashed("a b c a b b a".split()), [1, 2, 3]))
    assert [len(found) for found in sizes.values()] == [7, 6, 5]
    assert sizes[2][0] == sizes[2][3]  # a b
    assert len(np.unique(sizes[2])) == 5  # ab bc ca ab bb ba
    assert [len(found) for _, found in runs(hashed(["a"]), [2, 13])] == [0, 0]


def test_the_share_of_an_item_that_a_document_has(tmp_path: Path) -> None:
    rules = benchmarks(write(tmp_path / "sheep" / "test.jsonl", {"question": QUESTION}))
    index = rules.index()
    assert len(index.hashes) == 12
    (hit,) = index.hits("Before. " + QUESTION.upper().replace(",", ";") + " After.")
    assert (hit.benchmark, hit.item, hit.share) == ("sheep/test", "sheep/test.jsonl:1 question", 1.0)
    assert hit.text == "a farmer has seventeen sheep and sells all but nine of them at"
    assert rules.contaminated([hit])
    # The last 15 words of 24 are 3 runs of 13.
    (part,) = index.hits("So: " + " ".join(QUESTION.split()[-15:]))
    assert part.share == 3 / 12
    assert not rules.contaminated([part])
    assert index.hits(" ".join(QUESTION.split()[:12])) == []
    assert index.hits("") == []


def test_chinese_is_found_by_its_characters(tmp_path: Path) -> None:
    index = benchmarks(write(tmp_path / "zh.jsonl", {"question": CHINESE})).index()
    assert len(index.hashes) == 36 - 20 + 1
    (hit,) = index.hits("题目：" + CHINESE.replace("，", " ") + "答案")
    assert hit.share == 1.0
    assert index.hits(CHINESE[:20]) == []  # a comma is among them: 19 characters


def test_a_question_has_leaked_without_its_choices_and_without_its_answer(tmp_path: Path) -> None:
    answer = "She sells eight of her seventeen sheep, so that nine of them are left. " * 4
    path = write(
        tmp_path / "exam.jsonl",
        {"question": QUESTION, "choices": ["eight of them", "nine of them", "ten of them", "none"]},
        {"question": QUESTION.replace("sheep", "goats"), "answer": answer},
    )
    rules = benchmarks(path, keys=["question", "choices", "answer"])
    index = rules.index()
    lettered = f"1. {QUESTION}\nA. eight of them\nB. nine of them\nC. ten of them\nD. none"
    for leaked, item in (
        (lettered, "exam.jsonl:1 question"),
        (QUESTION.replace("sheep", "goats"), "exam.jsonl:2 question"),
        (f"The solution: {answer}", "exam.jsonl:2 answer"),
    ):
        hits = index.hits(leaked)
        assert (hits[0].item, hits[0].share) == (f"{tmp_path.name}/{item}", 1.0)
        assert rules.contaminated(hits)


def test_short_items_are_found_whole_and_shorter_ones_not_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(
        tmp_path / "short.jsonl",
        {"question": "Which planet is the largest of them all?"},  # eight words
        {"question": "Which planet is red?"},
    )
    index = benchmarks(path).index()
    assert index.sizes == [8]
    assert index.skipped == {f"{tmp_path.name}/short": 1}
    assert "1 of 2 records of" in capsys.readouterr().err
    (hit,) = index.hits("He asked which planet is the largest of them all, and nobody knew.")
    assert (hit.item.split(":")[-1], hit.share) == ("1 question", 1.0)


def test_a_template_of_many_items_is_not_looked_for(tmp_path: Path) -> None:
    template = "Read the following text with great care and then choose the one best answer to it:"
    records = [{"question": f"{template} number {i} {'abcdefghij'[i]} and so on we go"} for i in range(5)]
    path = write(tmp_path / "many.jsonl", *records)
    assert {hit.share < 1 for hit in benchmarks(path, shared=5).index().hits(template)} == {True}
    assert benchmarks(path, shared=4).index().hits(template) == []
    assert benchmarks(path, shared=4).index().hits(records[2]["question"])[0].share == 1.0


def test_formats_and_keys(tmp_path: Path) -> None:
    record = {"question": QUESTION, "choices": {"text": ["eight", "nine"]}, "answer": "nine"}
    write(tmp_path / "a" / "x.jsonl", record)
    with gzip.open(tmp_path / "a" / "y.jsonl.gz", "wt") as file:
        file.write(json.dumps(record))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "a" / "z.parquet")
    (tmp_path / "a" / "w.txt").write_text(f"\n{QUESTION} nine\n")
    hits = benchmarks(tmp_path / "a" / "*").index().hits(f"{QUESTION} nine")
    assert [(hit.item, hit.share) for hit in hits] == [
        ("a/w.txt:2", 1.0), ("a/x.jsonl:1 question", 1.0), ("a/y.jsonl.gz:1 question", 1.0),
        ("a/z.parquet:1 question", 1.0),
    ]  # fmt: skip
    # A list, or a list under a key, is one text: nine words.
    long = {"choices": {"text": ["eight of the sheep", "nine", "none of the goats"]}}
    write(tmp_path / "b.jsonl", record | long)
    (hit,) = (
        benchmarks(tmp_path / "b.jsonl", keys=["choices"])
        .index()
        .hits("(eight of the sheep; nine; none of the goats)")
    )
    assert hit.share == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "a"}\n{"query": "b"}\n', r"bad.jsonl:2: no text under question, answer, only query"),
        ("{", r"bad.jsonl:1: not JSON"),
        ("[1]", r"bad.jsonl:1: no JSON object but '\[1\]'"),
    ],
)
def test_a_bad_item_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        benchmarks(path).index()


def test_a_missing_key_or_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "z.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"query": ["a"]}), path)
    with pytest.raises(ValueError, match=r"z.parquet:1: no text under question, answer, only query"):
        benchmarks(path).index()
    with pytest.raises(ValueError, match=r"no file matches '.*none.jsonl'"):
        benchmarks(tmp_path / "none.jsonl").index()
    path.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"z.parquet:1: cannot be read"):
        benchmarks(path).index()


def test_a_long_document_is_searched_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = benchmarks(write(tmp_path / "a.jsonl", {"question": QUESTION})).index()
    text = "word " * 40 + QUESTION + " word" * 40
    for block in range(1, 30):
        monkeypatch.setattr(contamination, "_BLOCK", block)
        (hit,) = index.hits(text)
        assert hit.share == 1.0


def test_no_benchmark_finds_nothing() -> None:
    assert benchmarks().index().hits(QUESTION) == []


def test_hashes_are_the_same_in_every_process() -> None:
    code = "from megachat.data.contamination import *; print(hashed(['a', '我']).tolist())"
    seeds = ("0", "1")
    found = {
        subprocess.check_output(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, text=True, cwd=Path.cwd()
        )
        for seed in seeds
    }
    assert len(found) == 1


def test_the_largest_shares_are_kept_and_the_documents_of_each_benchmark_counted() -> None:
    overlaps = Overlaps(most=3, each=2)
    for number in range(100):
        overlaps.add(f"small {number}", [Hit("a", f"a:{number}", number / 1000, "x")])
    large = [Hit("a", "a:7", 0.9, "y"), Hit("b", "b:1", 0.6, "y"), Hit("a", "a:8", 0.5, "y")]
    overlaps.add("large", large)
    overlaps.add("none", [])
    assert [(hit["document"], hit["item"], hit["share"]) for hit in overlaps.hits] == [
        ("large", "a:7", 0.9), ("large", "b:1", 0.6), ("small 99", "a:99", 0.099)
    ]  # fmt: skip
    assert overlaps.documents == {"a": 101, "b": 1}
