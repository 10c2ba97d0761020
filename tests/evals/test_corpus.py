"""The report's section on data, from made-up `clean/report.json` files: whole, partial, and hostile."""

import html
import re
from typing import Any
from xml.etree import ElementTree

import pytest

from megachat.evals.corpus import LISTED, removals

EVIL = "<script>alert('坏')</script>"

COUNTS = ("documents_in", "documents_removed", "bytes_removed")

WHOLE: dict[str, Any] = {
    "documents": 90,
    "bytes": 1_500_000,
    "rows": [
        {"step": "length", "reason": "too short", "documents_in": 100, "documents_removed": 10,
         "bytes_removed": 2000, "examples": ["a short one"]},
    ],
    "funnel": [
        {"source": source, "step": step} | dict(zip(COUNTS, numbers, strict=True))
        for source, step, *numbers in (
            ("web", "length", 60, 6, 1500),
            ("books", "length", 40, 4, 500),
            ("web", "copies", 54, 24, 9000),
            ("books", "copies", 36, 0, 0),
        )
    ],
    "clusters": [
        {"size": 1234, "kept": {"id": "web/7", "source": "web", "text": "留下的文字"},
         "samples": [{"id": "web/9", "text": "几乎相同的文字", "agreement": 0.875}]},
    ],
    "lengths": {"zh": {"edges": [100, 1000, 10_000], "counts": [3, 6]}},
    "languages": {"zh": {"documents": 90, "bytes": 1_500_000}},
    "sources": {"web": {"documents": 50, "bytes": 1_000_000}, "books": {"documents": 40, "bytes": 500_000}},
    "contamination": [
        {"benchmark": "gsm", "item": "17", "share": 0.5, "document": "web/3", "ngram": "how many"}
    ],
    "quarantine": {"count": 3, "first": [{"place": "a.jsonl:7", "why": "not UTF-8"}]},
    "hot_buckets": [
        {"band": 4, "documents": 99_999, "sample": {"id": "web/1", "source": "web", "text": "版权所有"}}
    ],
    "pairs": {"compared": 5000, "alike": 4321},
}  # fmt: skip


def shown(clean: dict[str, Any]) -> str:
    """The section's text as a reader sees it."""
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", removals({"clean": clean}) or "")))


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("documents", "kept 90 documents, 1.5 MB"),
        ("rows", "too short 1 example a short one 100 10 10.0 % 2.0 kB"),
        ("clusters", "1,234 documents kept: web/7 of web 留下的文字"),
        ("clusters", "removed: web/9, 88 % alike 几乎相同的文字"),
        ("lengths", "1.0 kB to 10.0 kB: 6 documents"),
        ("languages", "Languages Documents Bytes zh 90 1.5 MB"),
        ("sources", "books 40 500.0 kB"),
        ("contamination", "gsm 17 50 % web/3 how many"),
        ("quarantine", "3 pieces of the input"),
        ("quarantine", "a.jsonl:7 not UTF-8"),
        ("hot_buckets", "4 99,999 web/1 版权所有"),
    ],
)
def test_each_part_is_shown_if_it_is_there_and_not_missed_if_it_is_not(key: str, expected: str):
    assert expected in shown(WHOLE)
    assert expected in shown({key: WHOLE[key]} | ({"bytes": 1_500_000} if key == "documents" else {}))
    assert expected not in shown({name: value for name, value in WHOLE.items() if name != key})


def test_beside_the_clusters_stands_how_many_pairs_were_alike():
    assert "4,321 of the 5,000 pairs that share a band are alike" in shown(WHOLE)
    assert "share a band" not in shown({"clusters": WHOLE["clusters"]})


def test_the_funnel_adds_up_the_sources_and_puts_the_one_that_lost_most_first():
    text = shown({"funnel": WHOLE["funnel"]})
    assert "length 100 10 10.0 % 2.0 kB" in text
    assert "copies 90 24 26.7 % 9.0 kB" in text
    assert text.index("web") < text.index("books")
    assert "web 60 30 50.0 %" in text  # of the web: 6 + 24 of 60
    assert "books 40 4 10.0 %" in text
    assert "web, step by step" in text


def test_a_bar_is_as_wide_as_the_share_of_the_documents_that_came_first():
    page = removals({"clean": {"funnel": WHOLE["funnel"]}}) or ""
    whole = page[: page.index("By source")]
    assert re.findall(r'class="stayed" style="width:([\d.]+)%', whole) == ["90.00", "66.00"]
    assert re.findall(r'class="removed" style="width:([\d.]+)%', whole) == ["10.00", "24.00"]


def test_the_highest_bar_of_a_histogram_is_that_of_the_largest_count():
    page = removals({"clean": {"lengths": WHOLE["lengths"]}}) or ""
    assert re.findall(r'height="([\d.]+)"', page) == ["40.00", "80.00"]


def test_lists_without_bound_are_cut_and_say_so():
    page = shown({"contamination": [{"benchmark": f"b{number}"} for number in range(LISTED + 1)]})
    assert "the first 200 of 201 lines" in page
    assert f"b{LISTED - 1}" in page
    assert f"b{LISTED}" not in page


def hostile(value: Any) -> Any:
    """The same with `EVIL` for every text, and for every name that is data."""
    if isinstance(value, dict):
        named = {
            "clean",
            *WHOLE,
            "documents",
            "bytes",
            *WHOLE["rows"][0],
            *WHOLE["funnel"][0],
            "edges",
            "counts",
        }
        named |= {
            "size",
            "kept",
            "samples",
            "id",
            "text",
            "agreement",
            "benchmark",
            "item",
            "share",
            "document",
        }
        named |= {"ngram", "count", "first", "place", "why", "band", "sample", "compared", "alike"}
        return {key if key in named else EVIL + key: hostile(of) for key, of in value.items()}
    if isinstance(value, list):
        return [hostile(of) for of in value]
    return EVIL if isinstance(value, str) else value


def test_nothing_from_a_corpus_becomes_markup():
    page = removals({"clean": hostile(WHOLE)}) or ""
    assert "<script" not in page
    assert page.count(html.escape(EVIL)) > 20
    ElementTree.fromstring(page)


def test_tokens_are_told_by_source_and_fallbacks_by_file():
    entries = [("train", "web", 9, 400, 100), ("validation", "web", 1, 40, 10), ("train", EVIL, 2, 60, 20)]
    shards = {
        f"{split}/{source}": {"split": split, "source": source, "documents": documents}
        | {"bytes": size, "tokens": tokens}
        for split, source, documents, size, tokens in entries
    }
    encoding = {
        "encoders": {"gigatoken": 2, "sentencepiece": 1},
        "compared": 7,
        "mistakes": [f"text-1: {EVIL}"],
    }
    page = removals({"clean": {}, "encode": {"shards": shards}, "encoding": encoding}) or ""
    text = html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page)))
    assert "web 10 110 10 4.00" in text
    assert f"{EVIL} 2 20 0 3.00" in text
    assert re.findall(r'class="bar" style="width:([\d.]+)%', page) == ["100.00", "18.18"]
    assert "Encoded by gigatoken 2 files of text, sentencepiece 1 file of text; 7 documents by both." in text
    assert f"text-1: {EVIL}" in text
    assert "Encoder fallbacks" not in (removals({"encode": {"shards": shards}}) or "")


def test_a_report_of_nothing_shows_nothing():
    assert removals({"clean": {}}) is None
    empty = {"rows": [], "funnel": [], "clusters": [], "contamination": [], "hot_buckets": []}
    nothing = {"lengths": {"en": {"edges": [0, 1], "counts": [0]}}, "quarantine": {"count": 0, "first": []}}
    assert shown(empty | nothing | {"languages": {}, "sources": {}}).split() == ["Data"]


def test_a_corpus_of_which_nothing_came_is_no_division_by_zero():
    row = {"step": "length", "source": "web", "documents_in": 0, "documents_removed": 0, "bytes_removed": 0}
    kept = {"web": {"documents": 0, "bytes": 0}}
    assert "0.0 %" in shown({"funnel": [row], "rows": [row], "sources": kept})
