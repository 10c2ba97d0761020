"""Where a rank computes."""

import pytest

from megachat.parallel.mesh import must_have_none


def test_training_on_the_cpu_of_a_gpu_node_takes_an_explicit_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    with pytest.raises(ValueError, match=r"sees none; `bash tools/setup\.sh gpu`"):
        must_have_none()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    must_have_none()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "0")
    monkeypatch.setattr("torch.version.cuda", "13.0")
    must_have_none()
