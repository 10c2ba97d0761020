"""The clean stage: what it keeps, what it says of the rest, and that a mistake leaves nothing behind."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow.parquet import ParquetFile

from megachat.__main__ import main
from megachat.config import ConfigError, compose
from megachat.data.clean import Clean, shards_for
from megachat.data.document import Broken, Document, read_documents
from megachat.data.shards import read_split
from megachat.data.sources import Part, Source
from megachat.tokenizer.encode import SPLITS
from tests.tiny_run import environment

WORDS = ["the", "and", "of", "model", "language", "data", "train", "token", "learn", "weight", "loss", "step"]

STEPS = "collect select sign exact alive join verify components settle filter".split()


class Fixed(Source):
    """Documents given in a test."""

    given: list[tuple[str, str]]
    """Ids and texts."""

    def parts(self) -> list[Part]:
        return [Part(name=name, size=len(text)) for name, text in self.given]

    def read(self, part: Part) -> Iterator[Document | Broken]:
        yield Document(id=part.name, text=dict(self.given)[part.name], source="fixed")


def prose(seed: int, words: int = 150) -> str:
    rng = random.Random(seed)
    return "\n".join(" ".join(rng.choices(WORDS, k=10)) for _ in range(words // 10))


def stage(run: Path, documents: dict[str, list[tuple[str, str]]], *overrides: str) -> Clean:
    """The stage as composed from conf/, with other sources."""
    tree = compose("clean", [f"run={run}", "executor.processes=1", *overrides])
    tree["corpus"] = {
        name: {"_target_": "megachat.data.sources.PythonLibrary", "include": [], "given": given}
        for name, given in documents.items()
    }
    sources = {name: Fixed(given=given) for name, given in documents.items()}
    built = Clean.of({**tree, "corpus": {}}).model_copy(update={"corpus": sources})
    built._tree = tree
    return built


def report(run: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((run / "clean" / "report.json").read_text())
    return read


def removed(run: Path) -> dict[str, int]:
    return {row["step"]: row["documents_removed"] for row in report(run)["rows"] if row["documents_removed"]}


class Listed(Source):
    """Parts as some store lists them, which the settings do not show."""

    sizes: list[int]

    def parts(self) -> list[Part]:
        return [Part(name=f"part-{number}", size=size) for number, size in enumerate(self.sizes)]


def listing(run: Path, *sizes: int) -> Clean:
    return stage(run, {}).model_copy(update={"corpus": {"remote": Listed(sizes=list(sizes))}})


def test_parts_of_unknown_size_are_not_all_in_one_shard(run: Path) -> None:
    unknown = [0] * 2410
    assert len(listing(run, *unknown)._shards()) == 1571  # 1024 * (2410 / 1024) ** 0.5
    with_a_large_one = listing(run, *unknown[:1000], 100_000_000_000, *unknown[1000:])._shards()
    assert len(with_a_large_one) > 1571
    assert max(map(len, with_a_large_one)) <= 2


def test_shards_grow_more_slowly_than_the_corpus() -> None:
    sizes = [1.0, 5e6, 4.096e9, 4 * 4.096e9, 8e12, 1e15]
    assert [shards_for(size) for size in sizes] == [1, 2, 1024, 2048, 8192, 8192]


def test_what_was_collected_of_other_parts_is_not_taken_for_these(run: Path, tmp_path: Path) -> None:
    def at(*sizes: int) -> Path:
        return next(listing(run, *sizes)._steps()).folder

    assert at(7, 8) == at(7, 8)
    assert at(7, 8) != at(7, 9)
    words = tmp_path / "words.txt"
    words.write_text("spam\n")
    tree = compose("clean", ["filters=bad_words", f"filters.bad_words.path={words}"])
    before = next(Clean.of(tree)._steps()).folder
    assert next(Clean.of(tree)._steps()).folder == before
    words.write_text("spam\neggs\n")
    assert next(Clean.of(tree)._steps()).folder != before


def test_shards_that_a_killed_run_has_left_are_not_read(run: Path) -> None:
    (run / "clean").mkdir(parents=True)
    for name in ("text-00001.jsonl.zst", "text-00000.jsonl.zst.1.tmp"):
        (run / "clean" / name).write_bytes(b"of a run with more shards")
    stage(run, {"mine": [("a", prose(1))]}).execute()
    assert [path.name for path in (run / "clean").glob("text-*")] == ["text-00000.jsonl.zst"]


def test_a_row_group_has_no_more_than_so_many_short_documents(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megachat.data.collect.ROWS", 10)
    stage(run, {"mine": [(str(number), f"text {number}") for number in range(25)]}, "filters=none").execute()
    rows = [
        [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        for file in map(ParquetFile, sorted((run / "work").glob("collect-*/*.parquet")))
    ]
    assert sum(map(sum, rows)) == 25
    assert max(map(max, rows)) <= 10


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
    assert rows["exact copies"]["examples"][0].startswith("exact ~ first: ")
    assert rows["near copies"]["examples"][0].startswith("near ~ first: ")
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


def jsonl(path: Path, texts: list[str]) -> list[str]:
    """Settings for a corpus of these texts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return ["corpus=[json_lines]", f"corpus.json_lines.paths=[{path.parent}/*.jsonl]"]


def texts(folder: Path) -> list[tuple[str, str]]:
    return [(document.id, document.text) for document in read_documents(folder)]


@pytest.mark.slow
def test_neither_shards_nor_processes_nor_their_hash_seed_change_what_stays(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        own = [prose(n % 40) for n in range(number * 20, number * 20 + 20)] + ["short"] * 5
        settings = jsonl(run.parent / "corpus" / f"{number}.jsonl", own)
    read = []
    for shards, processes, hash_seed in ((1, 1, "0"), (2, 2, "1"), (5, 2, "2")):
        monkeypatch.setenv("PYTHONHASHSEED", hash_seed)
        folder = run / str(shards)
        more = [f"run={folder}", f"shards={shards}", f"executor.processes={processes}"]
        Clean.of(compose("clean", [*settings, *more])).execute()
        assert len(list((folder / "clean").glob("text-*"))) == shards
        read.append(texts(folder / "clean"))
    assert read[0] == read[1] == read[2]
    assert len(read[0]) == 40


@pytest.mark.slow
def test_a_run_killed_at_any_step_goes_on_to_the_same_bytes(run: Path) -> None:
    settings = jsonl(run.parent / "corpus" / "0.jsonl", [prose(n % 40) for n in range(100)])
    whole = Clean.of(compose("clean", [*settings, f"run={run / 'whole'}", "executor.processes=1"]))
    whole.execute()
    expected = {path.name: path.read_bytes() for path in whole.folder.iterdir()}
    assert {path.name.partition("-")[0] for path in (run / "whole" / "work").iterdir()} == {*STEPS}
    program = """
import os, signal, sys
from megachat.data import steps
from megachat.__main__ import main
work = steps.Step.perform
def perform(step, task):
    if step.name == sys.argv[1]:
        step.work(task)                         # its files are there, its record is not
        os.kill(os.getpid(), signal.SIGKILL)
    work(step, task)
steps.Step.perform = perform
main(sys.argv[2:])
"""
    command = ["clean", *settings, f"run={run / 'killed'}", "executor.processes=1", "log.wandb=disabled"]
    for step in STEPS:
        done = subprocess.run([sys.executable, "-c", program, step, *command], env=environment(), check=False)
        assert done.returncode == -signal.SIGKILL, step
    main(command)
    again = {path.name: path.read_bytes() for path in (run / "killed" / "clean").iterdir()}
    assert {name: again[name] for name in expected} == expected


@pytest.mark.slow
def test_rays_workers_write_the_bytes_of_the_pools(run: Path) -> None:
    ray = pytest.importorskip("ray")
    for number in range(4):
        own = [prose(n % 40) for n in range(number * 15, number * 15 + 20)]
        settings = jsonl(run.parent / "corpus" / f"{number}.jsonl", own)
    executors = {"pool": ["executor.processes=2"], "ray": ["executor=ray", "executor.address=local"]}
    try:
        for name, executor in executors.items():
            overrides = [*settings, *executor, f"run={run / name}", "shards=4"]
            Clean.of(compose("clean", overrides)).execute()
    finally:
        ray.shutdown()
    made = [{path.name: path.read_bytes() for path in (run / name / "clean").iterdir()} for name in executors]
    assert len(made[0]) == 4 + 2
    assert made[0] == made[1]


def test_steps_one_by_one_in_shares_make_what_one_call_makes(run: Path) -> None:
    settings = jsonl(run.parent / "corpus" / "0.jsonl", [prose(n % 20) for n in range(30)])
    settings += jsonl(run.parent / "corpus" / "1.jsonl", [prose(n % 20) for n in range(30)])
    settings += ["executor.processes=1", "shards=2"]
    main(["clean", *settings, f"run={run / 'one'}"])
    apart = [*settings, f"run={run / 'apart'}"]
    with pytest.raises(SystemExit):
        main(["clean", *apart, "stage=sign"])  # collect has not been done
    for step in STEPS:
        for share in range(3):
            main(["clean", *apart, f"stage={step}", f"shard={share}/3"])
    assert not (run / "apart" / "clean").exists()
    main(["clean", *apart])
    assert texts(run / "one" / "clean") == texts(run / "apart" / "clean")
    assert report(run / "one") == report(run / "apart")


def test_with_other_bounds_no_text_is_read_again(run: Path) -> None:
    settings = jsonl(run.parent / "corpus" / "0.jsonl", [prose(n % 20) for n in range(30)])
    settings += ["executor.processes=1", f"run={run}"]
    main(["clean", *settings])
    before = {path: path.stat().st_mtime_ns for path in (run / "work").glob("collect-*/*")}
    main(["clean", *settings, "filters.length.minimum=800"])
    assert {path: path.stat().st_mtime_ns for path in (run / "work").glob("collect-*/*")} == before
    assert len(list((run / "work").glob("sign-*"))) == 1
    assert len(list((run / "work").glob("select-*"))) == 2


def test_copies_of_an_earlier_run_go_and_its_own_documents_stay(run: Path) -> None:
    old, new = run / "old", run / "new"
    first = {"mine": [("a", prose(1)), ("a again", prose(1)), ("b", prose(2)), ("short", "the and")]}
    stage(old, first).execute()
    second = [
        ("near a", prose(1).replace("weight", "mass", 1)),
        ("exactly b", prose(2)),
        ("c", prose(3)),
        ("near c", prose(3).replace("weight", "mass", 1)),
    ]
    stage(new, {"mine": second}, f"against=[{old}]").execute()
    assert [name for name, _ in texts(new / "clean")] == ["c"]
    assert removed(new) == {"exact copies": 1, "near copies": 2}
    third = [("near near c", prose(3).replace("weight", "mass", 2)), ("d", prose(4)), ("a", prose(1))]
    stage(run / "third", {"mine": third}, f"against=[{old},{new}]").execute()
    assert [name for name, _ in texts(run / "third" / "clean")] == ["d"]
    by_id = [("0 near c", prose(3).replace("weight", "mass", 2)), ("0 is d", prose(4)), ("0 is a", prose(1))]
    by_id += [("e", prose(5)), ("0 is e", prose(5)), ("f", prose(6))]
    by_id += [("0 near f", prose(6).replace("weight", "mass", 1))]
    fourth = f"against=[{old},{new},{run / 'third'}]"
    stage(run / "fourth", {"mine": by_id}, fourth, "dedup.keep=id").execute()
    assert [name for name, _ in texts(run / "fourth" / "clean")] == ["0 is e", "0 near f"]
    with pytest.raises(ValueError, match=r"old was signed with .*'words': 5.* this run is with .*'words': 4"):
        stage(run / "third", {"mine": third}, f"against=[{old}]", "dedup.words=4").execute()
    with pytest.raises(ValueError, match=r"nowhere/clean/index\.json is missing; name a run in which"):
        stage(run / "third", {"mine": third}, f"against=[{run / 'nowhere'}]").execute()


def test_a_broken_line_far_into_the_corpus_leaves_nothing_behind(run: Path) -> None:
    path = run.parent / "corpus" / "0.jsonl"
    settings = jsonl(path, [prose(n) for n in range(20)])
    path.write_text(path.read_text() + "{broken\n")
    stage = Clean.of(compose("clean", [*settings, f"run={run}", "executor.processes=1"]))
    with pytest.raises(ValueError, match=r"0\.jsonl:21: not JSON"):
        stage.execute()
    assert not stage.folder.exists()
    stage = Clean.of(
        compose(
            "clean",
            [*settings, f"run={run}", "executor.processes=1", "corpus.json_lines.on_error=quarantine"],
        )
    )
    stage.execute()
    assert len(texts(stage.folder)) == 20
    told = report(run)["quarantine"]
    assert told["count"] == 1
    assert told["first"][0]["place"].endswith("0.jsonl:21")


def test_a_source_that_would_lose_nearly_all_stops_the_stage(run: Path) -> None:
    given = [(str(n), prose(1).replace("weight", f"mass{n}", 1)) for n in range(120)]
    with pytest.raises(
        ValueError, match=r"119 of the 120 documents of 'fixed' are near copies \(.*: 1 ~ 0: 'and loss"
    ):
        stage(run, {"mine": given}).execute()
    stage(run, {"mine": given}, "dedup.largest_loss=1").execute()
    assert [name for name, _ in texts(run / "clean")] == ["0"]


def test_the_best_by_a_column_stays_and_a_column_that_is_not_there_is_named(run: Path) -> None:
    given = [(str(number), prose(1) + "\nthat is to be" * (number % 3)) for number in range(3)]
    for keep, stays in (("first", "0"), ("best", "1")):
        settings = [f"dedup.keep={keep}", "dedup.score=words.stop_words", "dedup.threshold=0.5"]
        stage(run, {"mine": given}, *settings).execute()
        assert [name for name, _ in texts(run / "clean")] == [stays]
    with pytest.raises(
        ConfigError, match=r"nothing measured is called 'words.stop_word'; did you mean 'words.st"
    ):
        stage(run, {"mine": given}, "dedup.keep=best", "dedup.score=words.stop_word")


def test_what_too_many_share_is_reported_and_so_are_the_pairs(run: Path) -> None:
    given = [(str(number), prose(1).replace("weight", f"mass{number}", 1)) for number in range(8)]
    stage(run, {"mine": given}, "dedup.largest_bucket=5").execute()
    told = report(run)
    assert told["pairs"]["compared"] >= told["pairs"]["alike"]
    assert all(bucket["documents"] > 5 for bucket in told["hot_buckets"])
    assert told["hot_buckets"][0]["sample"].keys() == {"id", "source", "text"}
    stage(run, {"mine": given}, "dedup.threshold=0.5").execute()
    told = report(run)
    assert told["pairs"] == {"compared": 8 * 7 / 2, "alike": 8 * 7 / 2}
    assert told["hot_buckets"] == []


@pytest.mark.slow
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_fails_is_named_and_the_same_command_goes_on_to_the_same_bytes(
    error: int, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = jsonl(run.parent / "corpus" / "0.jsonl", [prose(n % 40) for n in range(60)])
    command = ["clean", *settings, "executor.processes=1", "log.wandb=disabled"]
    calls = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append(file), sync(file)))
    main([*command, f"run={run / 'whole'}"])
    expected = {path.name: path.read_bytes() for path in (run / "whole" / "clean").glob("text-*")}
    for fails in range(0, len(calls), max(len(calls) // 8, 1)):

        def failing(file: Any, left: list[int] = [fails]) -> None:  # noqa: B006
            left[0] -= 1
            if left[0] < 0:
                raise OSError(error, os.strerror(error))
            sync(file)

        monkeypatch.setattr(os, "fsync", failing)
        with pytest.raises(SystemExit):
            main([*command, f"run={run / str(fails)}"])
        message = capsys.readouterr().err
        assert os.strerror(error).lower() in message
        assert "Traceback" not in message
        monkeypatch.setattr(os, "fsync", sync)
        main([*command, f"run={run / str(fails)}"])
        again = {path.name: path.read_bytes() for path in (run / str(fails) / "clean").glob("text-*")}
        assert again == expected


@pytest.mark.slow
def test_a_document_of_ten_million_tokens_is_cleaned_and_encoded_with_the_others(run: Path) -> None:
    draw = random.Random(0)
    text = " ".join(draw.choices([first + second for first in "abcdef" for second in "vwxyz"], k=10_000_000))
    settings = jsonl(run.parent / "corpus" / "0.jsonl", [text, *map(prose, range(40))])
    for stage, *own in (
        ["clean", *settings, "executor.processes=1", "filters=none"],
        ["tokenizer", "vocab=300"],
        ["encode", "executor.processes=1", "validation=0.4"],
    ):
        main([stage, f"run={run}", "log.wandb=disabled", *own])
    assert next(len(text) for _, text in texts(run / "clean")) == 29_999_999
    manifest = json.loads((run / "encode" / "manifest.json").read_text())
    shards = [shard for split in SPLITS for shard in read_split(run / "encode", split).values()]
    lengths = [length for shard in shards for length in np.diff(shard.documents).tolist()]
    assert max(lengths) >= 10_000_000
    assert sum(manifest[split]["documents"] for split in SPLITS) == len(lengths) == 41


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="Linux alone has a folder closed even to root")
def test_a_folder_that_nobody_may_write_to_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = jsonl(run.parent / "corpus" / "0.jsonl", [prose(n) for n in range(3)])
    with pytest.raises(SystemExit):
        main(["clean", *settings, "run=/sys/megachat", "log.wandb=disabled"])
    message = capsys.readouterr().err
    assert "/sys/megachat" in message
    assert "Traceback" not in message


def test_a_failed_second_run_keeps_what_the_first_one_wrote(run: Path) -> None:
    stage(run, {"mine": [("a", prose(1))]}).execute()
    before = {path.name: path.read_bytes() for path in (run / "clean").iterdir()}
    with pytest.raises(ValueError, match="no document is left"):
        stage(run, {"mine": [("b", "short")]}).execute()
    assert {path.name: path.read_bytes() for path in (run / "clean").iterdir()} == before


def test_a_corpus_of_which_nothing_is_left_shows_what_removed_it(run: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)no document is left; loosen .*\nlength +1 +1 "):
        stage(run, {"mine": [("a", "short")]}, "~filters.script").execute()
    assert not (run / "clean").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stage=sing"], "there is no step 'sing'; did you mean 'sign'"),
        (["stage=sign", "shard=3/3"], "shard: '3/3' is no share; those of 64 are 0/64 to 63/64"),
        (["stage=sign", "shard=-1/3"], "shard: '-1/3' is no share"),
        (["shard=0/2"], "shard=0/2 is a share of one step; say which, as in stage=collect"),
        (["against=[runs/here]", "run=runs/here"], "against: runs/here is this run itself"),
        (["run="], "run: it is empty; name a folder"),
        (["benchmarks=files"], "benchmarks.paths: missing"),
    ],
)
def test_what_makes_no_sense_is_said_before_anything_is_read(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as mistakes:
        Clean.of(compose("clean", overrides))
    assert message in str(mistakes.value)


def test_an_earlier_run_that_is_not_there_is_missed_before_anything_is_read(run: Path) -> None:
    with pytest.raises(ValueError, match=r"against: .*index\.json is missing"):
        stage(run, {"mine": [("a", prose(1))]}, f"against=[{run / 'nowhere'}]").execute()
    assert not (run / "work").exists()


def test_what_could_not_be_read_is_told_of_and_so_is_a_corpus_without_a_document(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run.parent / "corpus"
    settings = jsonl(folder / "0.jsonl", [prose(n) for n in range(3)])
    with (folder / "0.jsonl").open("a") as file:
        file.write("{broken\n")
    Clean.of(compose("clean", [*settings, "corpus.on_error=quarantine", f"run={run}"])).execute()
    assert "1 records or files of the corpus could not be read, the first at" in capsys.readouterr().err
    (folder / "0.jsonl").write_text("{broken\n")
    with pytest.raises(ValueError, match=r"there is no document in it; 1 records .*0\.jsonl:1: "):
        Clean.of(compose("clean", [*settings, "corpus.on_error=quarantine", f"run={run / 'b'}"])).execute()
    (folder / "0.jsonl").write_text("")
    with pytest.raises(ValueError, match="there is no document in it; look at what its files hold"):
        Clean.of(compose("clean", [*settings, f"run={run / 'c'}"])).execute()


def test_an_empty_source_is_named(run: Path) -> None:
    with pytest.raises(ValueError, match=r"corpus\.theirs: holds no document; leave it out or mend"):
        stage(run, {"mine": [("a", prose(1))], "theirs": []}).execute()
    with pytest.raises(ValueError, match="names no source"):
        stage(run, {}).execute()


@pytest.mark.slow
def test_the_quickstart_keeps_most_of_the_library_and_drops_its_copied_tables(run: Path) -> None:
    Clean.of(compose("clean", ["experiment=quickstart", f"run={run}"])).execute()
    told = report(run)
    assert told["bytes"] > 5_000_000
    assert set(told["languages"]) == {"code", "en"}
    near = next(row for row in told["rows"] if row["step"] == "near copies")
    assert near["documents_removed"] > 10
    assert near["examples"][0].startswith("lib/encodings/")
    assert told["documents"] > 0.8 * told["rows"][0]["documents_in"]
    assert len(list(read_documents(run / "clean"))) == told["documents"]
