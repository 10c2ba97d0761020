"""What the loader's benchmark compares is the same."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megachat.data.loader import TokenWindows
from tools.bench import loader


def test_a_plain_memmap_makes_the_tensors_that_training_is_given(tmp_path: Path) -> None:
    web = loader.write(tmp_path, 100_000)["web"]
    starts = np.random.default_rng(0).permutation((web.size - 1) // 256)
    windows = TokenWindows(web, 256)
    plain = loader.memmap(web, 256)(0)
    ours = loader.collated([windows[number] for number in starts[: loader.BATCH].tolist()])
    assert len(plain) == len(ours) == 8
    for one, other in zip(plain, ours, strict=True):
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.labels, other.labels)
        # Their numbers do not matter, only which are the same: what attention looks at.
        assert torch.equal(one.documents.diff() != 0, other.documents.diff() != 0)
        assert (one.weight, one.work.tokens, one.samples) == (other.weight, other.work.tokens, other.samples)


def test_padding_is_not_counted(tmp_path: Path) -> None:
    programs = loader.programs(loader.write(tmp_path, 400_000), 256)
    shares = {name: loader.share_of_tokens(make()) for name, make in programs.items()}
    packed = shares.pop("megachat: mixture, best fit, documents")
    assert 0.9 < packed < 1
    assert set(shares.values()) == {1.0}


@pytest.mark.parametrize("name", ["megachat: mixture, documents", "grain: mixture, megachat's windows"])
def test_a_step_has_all_its_rows_in_micro_batches(tmp_path: Path, name: str) -> None:
    (*batches,) = loader.programs(loader.write(tmp_path, 100_000), 256)[name]()(3)
    assert [batch.inputs.shape for batch in batches] == [(8, 256)] * 8
