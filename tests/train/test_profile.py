"""`profile=true`: what the page says of a run, and what the trace beside it holds."""

import gzip
import json
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megachat.run import perform
from megachat.train.profile import PAGE, TRACE, Facts, Operator, Profile, Use, advice, page, union, use_of
from megachat.train.watch import Watch
from tests.spawn import on_ranks
from tests.tiny_run import make, pretrain, rows

FACTS = Facts(
    seconds=0.5,
    traced=0.6,
    parts={"data": 0.01, "forward": 0.14, "backward": 0.3, "optimizer": 0.05},
    operators=[Operator("aten::mm", 84.0, 0.7), Operator("aten::add", 20.0, 0.1)],
    outside=0.1,
    use=None,
    memory=1.5,
    room=None,
)


def test_overlapping_kernels_count_once() -> None:
    assert union([]) == 0
    assert union([(2.0, 6.0), (8.0, 9.0), (0.0, 4.0), (3.0, 4.0), (4.0, 6.0)]) == 7


def test_a_gpu_is_idle_when_no_kernel_runs_and_communication_counts_where_it_sticks_out() -> None:
    events: list[tuple[str, tuple[float, float]]] = [
        ("ampere_bf16_gemm", (0.0, 4.0)),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", (2.0, 6.0)),
        ("Memcpy HtoD (Pinned -> Device)", (5.5, 7.0)),
        ("flash_fwd_kernel", (8.0, 9.0)),
    ]
    use = use_of(events, passed=10.0)
    assert use == Use(computing=0.5, communicating=0.2, copying=0.1)
    assert use.idle == pytest.approx(0.2)


def test_advice_follows_from_the_largest_shares() -> None:
    assert advice(FACTS) == [
        "Forward and backward take 88% of a step and nothing stands out: what can be gained is in the "
        "operators."
    ]
    hungry = replace(FACTS, parts={"data": 0.05, "communication": 0.1, "saving": 0.2, "forward": 0.15})
    assert [sentence.split(":")[0] for sentence in advice(hungry)] == [
        "Saving takes 40%",
        "Communication takes 20%",
        "Data takes 10% of a step, in which nothing else happens",
    ]
    assert "raise prefetch" in advice(hungry)[2]
    starved = replace(FACTS, use=Use(0.5, 0.05, 0.05), memory=30.0, room=80.0)
    assert [sentence.split(":")[0] for sentence in advice(starved)] == [
        "The GPU has nothing to do for 40% of the time, tracing included",
        "Peak memory is 30.0 of 80.0 GiB",
    ]
    assert len(advice(replace(hungry, use=starved.use))) == 3


def test_the_page_has_one_line_for_each_part_and_sums_up_operators_beyond_a_dozen() -> None:
    many = [Operator(f"aten::one{number}", 2.0, 0.05) for number in range(15)]
    text = page(replace(FACTS, operators=many), "a run")
    assert text.startswith("# a run\n\nA step takes 500.0 ms.\n")
    assert "| backward | 300.0 ms | 60.0% |\n| forward | 140.0 ms | 28.0% |" in text
    assert "| aten::one11 | 2 | 5.0% |\n| 3 others | 6 | 15.0% |\n| none: Python | | 10.0% |" in text


@on_ranks(1)
def alone(run: Path, overrides: list[str]) -> None:
    perform(pretrain(run, *overrides))


@on_ranks(2)
def on_two(run: Path, overrides: list[str]) -> None:
    perform(pretrain(run, *overrides))


def trace(run: Path) -> list[dict[str, Any]]:
    with gzip.open(run / "pretrain" / TRACE) as file:
        return list(json.load(file)["traceEvents"])


def table(text: str) -> dict[str, list[str]]:
    return {name: cells.split(" | ") for name, cells in re.findall(r"^\| (\S+) \| (.*) \|$", text, re.M)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make(tmp_path_factory.mktemp("profile") / "runs" / "tiny")
    alone(run=run, overrides=["profile=true"])
    return run


def test_three_steps_are_traced_with_their_parts(tiny: Path) -> None:
    spans = Counter(event["name"] for event in trace(tiny) if event.get("cat") == "user_annotation")
    # 8 samples in micro-batches of 2
    assert {name: spans[name] for name in ("data", "forward", "backward", "step", "log")} == {
        "data": 3, "forward": 12, "backward": 12, "step": 3, "log": 3,
    }  # fmt: skip
    forward = [event for event in trace(tiny) if event.get("name") == "forward"]
    looked_up = [event["ts"] for event in trace(tiny) if event.get("name") == "aten::embedding"]
    assert [sum(one["ts"] <= at < one["ts"] + one["dur"] for at in looked_up) for one in forward] == [1] * 12


def test_the_page_adds_up(tiny: Path) -> None:
    text = (tiny / "pretrain" / PAGE).read_text()
    step = float(re.findall(r"A step takes ([\d.]+) ms", text)[0])
    parts, operators = (table(part) for part in text.split("## Operators"))
    del parts["part"]
    assert {"data", "forward", "backward", "optimizer"} <= parts.keys()
    assert sum(float(cells[0].split()[0]) for cells in parts.values()) == pytest.approx(step, rel=0.01)
    calls = sum(event.get("name") == "aten::mm" for event in trace(tiny)) / 3
    assert float(operators["aten::mm"][0]) == pytest.approx(calls, abs=0.5)
    shares = [float(share) for share in re.findall(r"([\d.]+)% \|$", text.split("## Operators")[1], re.M)]
    assert 80 < sum(shares) < 105, text  # of the time that has passed, in one thread
    peak = float(re.findall(r"Peak memory: ([\d.]+) GiB", text)[0])
    before, after = rows(tiny)[6]["memory_gib"], rows(tiny)[7]["memory_gib"]  # steps 6 to 8 are timed
    assert before - 0.005 <= peak <= after + 0.1, text


def test_looking_changes_neither_the_losses_nor_what_later_stages_read(tiny: Path, tmp_path: Path) -> None:
    alone(run=tmp_path, overrides=[f"inputs={tiny}"])
    assert [row["loss"] for row in rows(tmp_path)] == [row["loss"] for row in rows(tiny)]
    assert not (tmp_path / "pretrain" / TRACE).exists()
    seen, unseen = (json.loads((run / "pretrain" / "done.json").read_text()) for run in (tiny, tmp_path))
    assert seen["fingerprint"] == unseen["fingerprint"]
    assert seen["outputs"].keys() == unseen["outputs"].keys()


@pytest.mark.slow
def test_rank_0_alone_traces(tiny: Path, tmp_path: Path) -> None:
    on_two(run=tmp_path, overrides=[f"inputs={tiny}", "profile=true", "parallel=zero2"])
    ranks = {event["pid"] for event in trace(tmp_path) if event.get("cat") == "cpu_op"}
    assert len(ranks) == 1
    assert "| communication |" in (tmp_path / "pretrain" / PAGE).read_text()


def looked_at(folder: Path, left: int, taken: int) -> list[str]:
    """What a run leaves that has so many steps before it and takes so many."""
    watch = Watch()
    with Profile(folder, "steps", watch, torch.device("cpu"), left) as profile:
        for _ in range(taken):
            profile.step()
            watch.at("forward")
            torch.ones(4, 4) @ torch.ones(4, 4)
        if taken == left:
            profile.step()
    return sorted(os.listdir(folder))


def test_a_short_run_has_fewer_steps_looked_at(tmp_path: Path) -> None:
    for left, steps in ((3, 1), (6, 2), (7, 3)):
        folder = tmp_path / str(left)
        folder.mkdir()
        assert looked_at(folder, left, taken=left) == [PAGE, TRACE]
        with gzip.open(folder / TRACE) as file:
            names = [event.get("name") for event in json.load(file)["traceEvents"]]
        assert names.count("aten::mm") == steps


def test_a_run_of_two_steps_is_not_profiled_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert looked_at(tmp_path, left=2, taken=2) == []
    assert "three more steps" in capsys.readouterr().err


@pytest.mark.parametrize("taken", [9, 10, 11])  # before, in and after the step that sets up the tracer
def test_a_run_that_ends_early_leaves_no_tracer_behind(tmp_path: Path, taken: int) -> None:
    assert looked_at(tmp_path, left=99, taken=taken) == []
    assert not torch.autograd._profiler_enabled()
    assert looked_at(tmp_path, left=7, taken=7) == [PAGE, TRACE]


def test_a_full_disk_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "gone"
    folder.write_text("not a folder")
    watch = Watch()
    with Profile(folder, "steps", watch, torch.device("cpu"), 3) as profile:
        for _ in range(4):
            profile.step()
    assert "the run goes on without it" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_gpu_is_busy_while_it_multiplies(tmp_path: Path) -> None:
    watch, device = Watch(), torch.device("cuda")
    a = torch.randn(4096, 4096, device=device)
    watch.split = type(watch.split)(device)
    with Profile(tmp_path, "steps", watch, device, 7) as profile:
        for _ in range(7):
            profile.step()
            watch.at("forward")
            for _ in range(50):
                a @ a
        profile.step()
    text = (tmp_path / PAGE).read_text()
    computing = float(re.findall(r"The GPU computes ([\d.]+)%", text)[0])
    assert computing > 80, text
    assert float(table(text)["aten::mm"][1].rstrip("%")) > 80, text
