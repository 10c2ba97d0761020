"""The benchmark of DeepSpeed's overhead: how seconds are dealt out, and that there is what it times."""

import importlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench.test_pretrain import TINY
from tools.bench import overhead, pretrain
from tools.bench.runners import parts


def ticking(*times: float) -> Iterator[float]:
    """A clock that shows these times, one after the other."""
    yield from times


def test_a_second_counts_for_the_innermost_part() -> None:
    times = ticking(0.0, 1.0, 3.0, 6.0, 10.0, 10.0)
    clock = parts.Clock(lambda: next(times))
    inner = clock.around(lambda: None, "collectives")
    clock.around(inner, "gradients")()
    # 0 to 1 outside, 1 to 3 and 6 to 10 in the outer one, 3 to 6 in the inner one.
    assert clock.seconds == {parts.OTHER: 1.0, "gradients": 6.0, "collectives": 3.0}


def test_another_thread_does_not_count() -> None:
    clock = parts.Clock()
    thread = threading.Thread(target=clock.around(lambda: None, "optimizer"))
    thread.start()
    thread.join()
    assert "optimizer" not in clock.seconds


def test_steps_before_the_first_one_counted_are_forgotten(tmp_path: Path) -> None:
    now = [0.0]
    clock = parts.Clock(lambda: now[0])

    def work(seconds: float) -> None:
        now[0] += seconds

    step = parts.counting(clock, tmp_path, first=1, count=2)(clock.around(work, "loop"))
    for seconds in (100.0, 2.0, 4.0, 1000.0):
        step(seconds)
        now[0] += 1.0  # between two steps
    told = json.loads((tmp_path / "parts-0.json").read_text())
    assert told["loop"] == 3.0
    assert told[parts.OTHER] == 1.0


def test_a_line_is_compared_with_the_bare_loop_in_as_many_processes() -> None:
    def rounds(*seconds: float) -> list[dict[str, float]]:
        return [
            dict.fromkeys(overhead.COLUMNS, 0.0) | {"forward": one, "backward": 2 * one} for one in seconds
        ]

    layouts = {("bare", 1): rounds(10.0), ("bare", 2): rounds(20.0), ("1/2x1", 2): rounds(90.0, 30.0, 10.0)}
    *_, last = overhead.table(layouts)
    assert last.split()[:6] == ["1/2x1", "2", "90", "1.50", "30.0", "60.0"]


def test_every_function_that_is_timed_exists() -> None:
    for path in (path for paths in parts.PARTS.values() for path in paths):
        module, _, name = path.partition(":")
        owner = importlib.import_module(module)
        for one in name.split("."):
            owner = getattr(owner, one)
        assert callable(owner), path


@pytest.mark.slow
@pytest.mark.parametrize("layout", [("bare", 2), ("1/2x1", 2), ("3/1x1", 1)])
def test_a_real_step_is_all_accounted_for(layout: tuple[str, int], tmp_path: Path) -> None:
    prepared = pretrain.prepare(tmp_path, TINY, pretrain.SKIPPED + 3, "cpu", most=200_000)
    told = overhead.measure(layout, prepared, tmp_path / "run", 2, [])
    assert all(told[part] > 0 for part in ("forward", "backward", "gradients", "optimizer"))
    assert (told["collectives"] > 0) == (layout[0] != "bare")
