"""Where the time of a step goes."""

import threading
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from megachat.parallel.mesh import start
from megachat.train.split import ALWAYS, Split, listen
from tests.spawn import on_ranks


def test_the_parts_are_the_sections_and_add_up_to_the_time_that_has_passed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 5.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    split = Split()
    now += 0.5
    for section, seconds in (("data", 2), ("forward", 4), ("step", 3), ("count", 1), ("sample", 0)):
        split.begin(section)
        now += seconds
    parts = {"data": 1.0, "forward": 2.0, "optimizer": 1.5, "other": 0.75}  # by step
    nothing = dict.fromkeys(ALWAYS, 0.0)
    expected = nothing | parts | {"validation": 0.0}
    assert split.take(steps=2) == {f"time/{name}": seconds for name, seconds in expected.items()}
    now += 7
    assert split.take(1) == {
        f"time/{name}": seconds for name, seconds in (nothing | {"validation": 7}).items()
    }


def spent(act: Callable[[], object]) -> dict[str, float]:
    """What a forward pass is made of that only does this."""
    split = Split()
    listen(split)
    split.begin("forward")
    act()
    return split.take(1)


@on_ranks(2)
def test_waiting_for_another_rank_in_a_collective_is_communication() -> None:
    mesh = start(1)
    late = 1.0 * mesh.rank  # against 0.5 for whatever a busy machine does

    def at_once() -> None:
        time.sleep(late)
        mesh.sum(1.0)

    def later() -> None:
        time.sleep(late)
        work = dist.all_reduce(torch.ones(1), async_op=True)
        work.wait()

    def objects() -> None:  # a collective of collectives
        time.sleep(late)
        mesh.gather("word")

    for act in (at_once, later, objects, mesh.barrier):
        mesh.barrier()
        parts = spent(act)
        waited = 1.0 if mesh.rank == 0 and act != mesh.barrier else 0.0
        assert waited - 0.5 < parts["time/communication"] < waited + 0.5, act
        assert parts["time/forward"] < late + 0.5, act


@on_ranks(2)
def test_what_another_thread_communicates_is_not_waited_for() -> None:
    mesh = start(1)

    def beside() -> None:
        thread = threading.Thread(target=mesh.barrier)
        thread.start()
        thread.join()

    time.sleep(0.3 * mesh.rank)
    assert spent(beside)["time/communication"] == 0


class Note:
    """An event of a GPU that comes to it one second after the one before, if it comes."""

    made = 0
    come = 99

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.number, Note.made = Note.made, Note.made + 1

    def query(self) -> bool:
        return self.number < Note.come

    def elapsed_time(self, later: "Note") -> float:
        return 1000.0 * (later.number - self.number)


def test_a_gpu_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Note)
    monkeypatch.setattr(Note, "made", 0)
    split = Split(torch.device("cuda", 0))  # note 0
    for section in ("data", "forward", "backward", "step"):  # notes 1 to 4
        split.begin(section)
    monkeypatch.setattr(Note, "come", 4)
    parts = split.take(1)  # note 5
    assert [parts[f"time/{name}"] for name in ("other", "data", "forward", "backward")] == [1, 1, 1, 0]
    monkeypatch.setattr(Note, "come", 99)
    parts = split.take(1)  # note 6
    assert [parts[f"time/{name}"] for name in ("forward", "backward", "optimizer")] == [0, 1, 2]


@pytest.mark.gpu
def test_a_gpu_notes_the_time_itself() -> None:
    split = Split(torch.device("cuda"))
    a = torch.randn(4096, 4096, device="cuda")
    begun = time.monotonic()
    split.begin("forward")
    for _ in range(100):
        a = a @ a
    split.begin("backward")
    torch.cuda.synchronize()
    passed = time.monotonic() - begun
    parts = split.take(1)
    assert parts["time/forward"] > 0.8 * passed
