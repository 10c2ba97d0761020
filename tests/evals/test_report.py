"""The report of a fabricated run: whole, partial, hostile, and damaged."""

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from megachat.config import compose, decode
from megachat.evals import page as pages
from megachat.evals.report import gather
from megachat.files import write_json
from megachat.stages import ORDER
from tests.evals import tiny

EVIL = "<script>alert('x')</script>"
BEFORE = [stage for stage in ORDER[: ORDER.index("report")] if stage != "doctor"]  # those that leave a folder


def report(run: Path) -> tuple[dict[str, Any], str]:
    """The numbers and the page that the stage writes."""
    decode(compose("report", [f"run={run}"])).execute()
    return json.loads((run / "report.json").read_text()), (run / "report.html").read_text()


@pytest.fixture
def full(run: Path) -> Path:
    """A run in which every stage has finished."""
    for seconds, stage in enumerate(BEFORE):
        tiny.finish(run / stage, float(seconds))
        (run / stage / "config.yaml").write_text(f"seed: {seconds}\n")
    row = {"documents_in": 100, "documents_removed": 7, "bytes_removed": 2000}
    kept = {"documents": 93, "bytes": 1_500_000}
    write_json(run / "clean" / "report.json", {
        "rows": [{"step": "length", "reason": "shorter than 200 characters", **row, "examples": [EVIL]}],
        "languages": {"en": kept}, "sources": {EVIL: kept}, **kept,
    })  # fmt: skip
    write_json(run / "tokenizer" / "report.json", {
        "vocab": 4096, "sha256": "ab" * 32, "sample": {"documents": 9, "bytes": 900},
        "bytes_per_token": {"all": 3.25}, "round_trips": 1500,
    })  # fmt: skip
    split = {"documents": 90, "tokens": 456_789, "bytes": 1_400_000}
    write_json(run / "encode" / "manifest.json", {"vocab": 4096, "train": split, "validation": split})
    rows = [{"step": step, "loss": 3.0 / step, "tokens_per_second": 1000} for step in (10, 20, 30)]
    (run / "pretrain" / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    share = {"value": 0.625, "low": 0.5, "high": 0.75, "n": 240}
    gain = {"value": -0.5, "low": -1.0, "high": 0.0, "n": 240}
    shares = dict.fromkeys(("recall_seen", "ppo_win_rate", "rm_accuracy_garbled"), share)
    write_json(run / "evaluate" / "scores.json", shares | {"ppo_reward_gain": gain, "new": gain})
    turns = [
        {"role": "user", "text": f"What is {EVIL}?"},
        {"role": "assistant", "text": f"It is {EVIL}", "truth": "True."},
    ]
    write_json(run / "evaluate" / "samples.json", [{"stage": "sft", "turns": turns}])
    said = {"prompt": f"6 {EVIL}", "answer": "42", "truth": "6", "tokens": 3, "stopped": True}
    answered = [
        {"step": step, "of": of, **said, "reward": worth, "reward/exact": worth}
        for step, of, worth in ((1, "held out", 0.0), (9, "held out", 0.125), (10, "rollout", 0.5))
    ]
    (run / "grpo" / "answers.jsonl").write_text("\n".join(map(json.dumps, answered)) + "\n{torn")
    return run


def test_it_holds_seconds_and_scores_in_their_agreed_places(full: Path):
    facts, _ = report(full)
    assert facts["stages"]["pretrain"]["seconds"] == 3.0
    assert facts["seconds"] == sum(range(11))
    assert facts["evaluation"]["recall_seen"] == {"value": 0.625, "low": 0.5, "high": 0.75, "n": 240}


def test_the_page_shows_the_numbers_in_readable_form(full: Path):
    _, page = report(full)
    text = html.unescape(re.sub(r"<[^>]+>", " ", page))
    for shown in (
        "62.5 %", "50.0 to 75.0 %, n = 240", "\u22120.500", "\u22121.000 to +0.000", "Reward model, garbled",
        "shorter than 200 characters", "7.0 %", "2.0 kB", "1.5 MB", "456,789", "4,096", "3.25", "30 steps",
        "8.0 s", "seed: 4",
    ):  # fmt: skip
        assert shown in text, shown


def test_no_text_of_documents_or_models_becomes_markup(full: Path):
    _, page = report(full)
    assert "<script" not in page
    assert page.count(html.escape(EVIL)) == 5  # an example, a source, a question, an answer, a prompt


def test_what_was_answered_last_to_held_out_prompts_is_shown_with_its_worth(full: Path):
    facts, page = report(full)
    assert [(row["step"], row["reward"]) for row in facts["answers"]["grpo"]] == [(9, 0.125)]
    assert '<th class="n">reward/exact</th>' in page
    assert ">0.125</td>" in page


def test_the_page_fetches_nothing(full: Path):
    _, page = report(full)
    assert not re.search(r"https?:|//[a-z]|@import|\bsrc=|<link|url\((?!#)", page)


def test_the_page_serves_light_and_dark_readers(full: Path):
    _, page = report(full)
    assert "@media (prefers-color-scheme: dark)" in page
    assert '<meta name="color-scheme" content="light dark">' in page
    used = set(re.findall(r"var\((--[a-z]+)\)", page))
    for scheme in re.findall(r":root \{(.*?)\}", page, flags=re.DOTALL):
        assert used <= set(re.findall(r"(--[a-z]+):", scheme))


def test_every_element_is_closed(full: Path):
    """Read by a strict parser: the page is XML once its one void element is closed."""
    from xml.etree import ElementTree

    _, page = report(full)
    body = re.sub(r"(<meta[^>]*)>", r"\1/>", page.removeprefix("<!doctype html>"))
    ElementTree.fromstring(body)


def test_every_number_on_the_page_is_in_the_json(full: Path):
    facts, page = report(full)
    facts["evaluation"]["recall_seen"]["value"] = 0.125
    assert "12.5 %" not in page
    assert "12.5 %" in pages.page(facts)  # the page is made from nothing else


@pytest.mark.parametrize("stage", BEFORE)
def test_any_one_stage_alone_can_be_reported(full: Path, stage: str, tmp_path: Path):
    alone = tmp_path / "alone"
    alone.mkdir()
    (full / stage).rename(alone / stage)
    facts, page = report(alone)
    assert list(facts["stages"]) == [stage]
    assert "1 finished stage." in page


def test_a_run_without_stages_is_refused_and_named(run: Path):
    with pytest.raises(ValueError, match=r"no stage has finished in .*runs/test, so nothing to report"):
        report(run)


def test_a_training_stage_that_still_runs_shows_its_curves(run: Path):
    (run / "pretrain").mkdir(parents=True)
    (run / "pretrain" / "metrics.jsonl").write_text('{"step": 10, "loss": 5.0}\n')
    facts, page = report(run)
    assert facts["stages"] == {}
    assert facts["training"]["pretrain"]["last"] == {"step": 10, "loss": 5.0}
    assert "nats per token" in page


def test_a_step_logged_twice_counts_once_and_a_torn_line_not_at_all(run: Path):
    lines = [
        '{"step": 10, "loss": 5.0}',
        '{"step": 20, "loss": 9.0}',
        '{"step": 20, "loss": 4.0, "mfu": null}',  # the run was resumed from step 10
        '{"step": 20, "validation/bits_per_byte": 1.5}',
        '{"step": 30, "lo',
    ]
    (run / "sft").mkdir(parents=True)
    (run / "sft" / "metrics.jsonl").write_text("\n".join(lines))
    told = gather(run)["training"]["sft"]
    assert told["curves"]["loss"]["lines"] == [
        {"label": "training", "steps": [10.0, 20.0], "values": [5.0, 4.0]}
    ]
    assert told["curves"]["bits_per_byte"]["lines"] == [
        {"label": "held out", "steps": [20.0], "values": [1.5]}
    ]
    assert told["last"] == {"step": 20, "loss": 4.0, "validation/bits_per_byte": 1.5}


def test_a_diverged_run_can_still_be_reported(run: Path):
    (run / "sft").mkdir(parents=True)
    (run / "sft" / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n{"step": 3, "loss": Infinity}\n'
    )
    facts, page = report(run)
    assert facts["training"]["sft"]["curves"]["loss"]["lines"][0]["values"] == [2.0]
    assert "NaN" not in (run / "report.json").read_text()  # which is not JSON
    assert "<svg" in page


def test_damaged_json_names_the_file(full: Path):
    (full / "evaluate" / "scores.json").write_text("{")
    with pytest.raises(ValueError, match=r"scores\.json is not JSON .*run its stage again"):
        report(full)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (75, "1 min 15 s"), (3599.6, "1 h 00 min"), (7384, "2 h 03 min")],
)
def test_durations_are_read_at_a_glance(seconds: float, expected: str):
    assert pages.duration(seconds) == expected


@pytest.mark.parametrize(
    ("count", "expected"), [(999, "999 bytes"), (1000, "1.0 kB"), (2_500_000, "2.5 MB"), (3e12, "3.0 TB")]
)
def test_sizes_are_read_at_a_glance(count: float, expected: str):
    assert pages.size(count) == expected


def test_fertility_is_shown_by_language(full: Path):
    told = json.loads((full / "tokenizer" / "report.json").read_text())
    told |= {"bytes_per_token": {"en": 4.0, "zh": 3.0}, "characters_per_token": {"zh": 1.25}}
    write_json(full / "tokenizer" / "report.json", told)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", report(full)[1]))
    assert "Language Bytes per token Characters en 4.00 zh 3.00 1.25" in text
