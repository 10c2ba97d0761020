"""Before training each node is looked at; one that fails is told from a mistake of the user's."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megachat.parallel import preflight as module
from megachat.parallel.mesh import Mesh, Unfit, start
from megachat.parallel.preflight import Findings, at_odds, check_gpu, judge, preflight, share
from tests.spawn import on_ranks


def found(*hosts: str, blind: str = "") -> list[Findings]:
    return [Findings(host, blind=host in blind) for host in hosts]


def place(rank: int) -> Mesh:
    return Mesh(rank, 3, 1, torch.device("cpu"), None, None)


@on_ranks(2)
def test_two_ranks_pass_in_a_second_and_leave_nothing(tmp_path: Path) -> None:
    mesh = start(1)
    preflight(mesh, tmp_path, 0)
    begun = time.monotonic()
    preflight(mesh, tmp_path, 0)
    assert time.monotonic() - begun < 1 or os.getloadavg()[0] > 3
    assert list(tmp_path.iterdir()) == []


@on_ranks(2)
def test_a_rank_with_another_disk_is_a_mistake_of_the_users(tmp_path: Path) -> None:
    mesh = start(1)
    module.PATIENCE = 0.5
    module.socket.gethostname = lambda: f"node{mesh.rank}"  # type: ignore[attr-defined]
    own = tmp_path / f"disk{mesh.rank}"
    with pytest.raises(
        ValueError, match=r"only node0 sees .*run=\.\.\. must be a folder that all nodes share"
    ):
        preflight(mesh, own, 0)


@on_ranks(2)
def test_a_rank_that_sums_wrongly_ends_as_unfit_and_the_other_names_it(tmp_path: Path) -> None:
    mesh = start(1)
    module.socket.gethostname = lambda: f"node{mesh.rank}"  # type: ignore[attr-defined]
    right = dist.all_reduce

    def wrong(there: torch.Tensor, *arguments: Any, **named: Any) -> None:
        right(there, *arguments, **named)
        if mesh.rank == 1 and there.numel() > 1000:
            there[7] += 1

    dist.all_reduce = wrong
    words = r"rank 1 on node1 received 1 wrong numbers of 262144"
    with pytest.raises(OSError, match=words) as raised:
        preflight(mesh, tmp_path, 0)
    assert isinstance(raised.value, Unfit) == (mesh.rank == 1)
    assert getattr(raised.value, "exit_code", 1) == (70 if mesh.rank == 1 else 1)


def test_100_000_ranks_sum_without_rounding() -> None:
    assert torch.tensor([share(rank) for rank in range(100_000)]).sum() < 2**24


def test_one_node_of_three_without_the_folder_is_unfit(tmp_path: Path) -> None:
    everybody = found("a", "b", "c", blind="b")
    with pytest.raises(Unfit, match="rank 1 on b does not see"):
        judge(place(1), tmp_path, everybody)
    with pytest.raises(OSError, match="unfit for training: rank 1 on b does not see") as raised:
        judge(place(0), tmp_path, everybody)
    assert not isinstance(raised.value, Unfit)
    judge(place(0), tmp_path, found("a", "b", "c"))


def test_a_clock_more_than_five_seconds_off_is_named_by_its_host() -> None:
    assert at_odds([100.0, 104.0, 94.0, 106.0], ["a", "a", "b", "c"]) == {"b": 2, "c": 3}


@pytest.mark.gpu
def test_a_gpu_computes_what_the_cpu_does() -> None:
    mine = Findings("here")
    check_gpu(torch.device("cuda", 0), mine)
    assert mine.unfit == ""


def test_a_nearly_full_disk_is_said_and_no_more(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    alone = Mesh(0, 1, 1, torch.device("cpu"), None, None)
    preflight(alone, tmp_path, 2**60)
    assert "a checkpoint takes 1152921504.61 GB; free some" in capfd.readouterr().err
    preflight(alone, tmp_path, 1)
    assert capfd.readouterr().err == ""
