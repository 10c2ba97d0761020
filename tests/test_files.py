"""Files that appear whole or not at all."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from megachat.files import remove, replacing, telling


def test_what_a_killed_process_of_the_same_number_left_is_no_hindrance(tmp_path: Path) -> None:
    path = tmp_path / "index"
    (tmp_path / f"index.{os.getpid()}.tmp" / "half").mkdir(parents=True)
    with replacing(path) as temporary:
        temporary.mkdir()
        (temporary / "whole").touch()
    assert [found.name for found in path.iterdir()] == ["whole"]
    assert [found.name for found in tmp_path.iterdir()] == ["index"]


def test_what_somebody_else_has_removed_may_be_removed(tmp_path: Path) -> None:
    remove(tmp_path / "gone")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_called_one_where_numpy_does_not_say_so(tmp_path: Path) -> None:
    values = np.zeros(1 << 16)
    with (
        pytest.raises(OSError, match=r"No space left on device: .*pairs") as error,
        telling(tmp_path / "pairs"),
        open("/dev/full", "wb") as file,
    ):
        values.tofile(file)
    assert error.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="another"), telling(tmp_path):
        raise OSError("another mistake")
