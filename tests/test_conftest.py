"""What happens to a test that needs a GPU on a machine without one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import pytest_runtest_setup


def item(*markers: str) -> Any:
    return SimpleNamespace(get_closest_marker=lambda name: name in markers)


def test_it_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGACHAT_REQUIRE_GPU", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(pytest.skip.Exception, match=r"^needs 1 NVIDIA GPU, and torch sees 0$"):
        pytest_runtest_setup(item("gpu"))


def test_it_fails_where_a_gpu_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGACHAT_REQUIRE_GPU", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        pytest.fail.Exception, match="needs 2 NVIDIA GPUs, and torch sees 1, but MEGACHAT_REQUIRE_GPU=1"
    ):
        pytest_runtest_setup(item("gpu", "multigpu"))
    pytest_runtest_setup(item("gpu"))  # one is enough for this one


def test_a_test_without_a_mark_sees_no_gpu() -> None:
    assert not torch.cuda.is_available()
