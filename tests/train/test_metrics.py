"""The peak that utilisation is measured against."""

import time

import pytest
import torch

from megachat.parallel.mesh import start
from megachat.train import metrics
from megachat.train.metrics import PEAKS, known_as, peak_flops, peak_of_all
from tests.spawn import on_ranks

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)

NAMES = {
    "NVIDIA H100 80GB HBM3": ("H100", 989.0),
    "NVIDIA H100 PCIe": ("H100 PCIE", 756),
    "NVIDIA H100 NVL": ("H100 NVL", 835.5),
    "NVIDIA H200": ("H200", 989.0),
    "NVIDIA GH200 480GB": ("GH200", 989.0),
    "NVIDIA B200": ("B200", 2250),
    "NVIDIA GB200": ("GB200", 2500),
    "NVIDIA A100-SXM4-80GB": ("A100", 312),
    "A100-SXM4-40GB": ("A100", 312),
    "NVIDIA A100-PCIE-40GB": ("A100 PCIE", 312),
    "NVIDIA A100 80GB PCIe": ("A100 PCIE", 312),
    "NVIDIA A10": ("A10", 125),
    "NVIDIA L4": ("L4", 121),
    "NVIDIA L40": ("L40", 181),
    "NVIDIA L40S": ("L40S", 362),
    "NVIDIA GeForce RTX 4090": ("RTX 4090", 165.2),
    "NVIDIA GeForce RTX 3090": ("RTX 3090", 71),
    "NVIDIA RTX A6000": ("RTX A6000", 154.8),
    "NVIDIA RTX 6000 Ada Generation": ("RTX 6000 ADA GENERATION", 364.2),
}

OTHERS = [
    "NVIDIA A10G", "NVIDIA A100X", "NVIDIA A100-SXM-64GB", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H20",
    "NVIDIA H100L 94GB", "NVIDIA L20", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 5090 D", "Tesla V100-SXM2-32GB", "AMD Instinct MI300X",
]  # fmt: skip
"""Whose names begin like, or hold, that of another."""


def called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of that name, which measures 1 TFLOP/s."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(metrics, "measured_flops", lambda dtype, device: 1e12)


@pytest.mark.parametrize(("name", "found"), NAMES.items())
def test_a_gpu_is_known_by_all_of_its_name(
    name: str, found: tuple[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    called(name, monkeypatch)
    known, half = found
    assert known_as(name) == known
    assert peak_flops(GPU, "bf16") == peak_flops(GPU, "fp16") == pytest.approx(half * 1e12)


@pytest.mark.parametrize("name", OTHERS)
def test_a_gpu_that_is_not_in_the_table_is_measured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called(name, monkeypatch)
    assert known_as(name) not in PEAKS
    assert peak_flops(GPU, "bf16") == 1e12
    assert peak_flops(GPU, "fp8") is None  # a guess would be worse


def test_a_precision_that_a_gpu_has_not_has_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    called("NVIDIA A100-SXM4-80GB", monkeypatch)
    assert peak_flops(GPU, "fp8") is None
    assert peak_flops(CPU, "fp8") is None


@pytest.mark.parametrize(("allowed", "peak"), [(False, 67.0), (True, 494.5)])
def test_fp32_is_tf32_where_that_is_allowed(
    allowed: bool, peak: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    called("NVIDIA H100 80GB HBM3", monkeypatch)
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        assert peak_flops(GPU, "fp32") == pytest.approx(peak * 1e12)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def test_fp8_is_twice_as_fast_as_bf16_and_that_as_tf32() -> None:
    for name, peak in PEAKS.items():
        assert peak.half / peak.tf32 == pytest.approx(2, rel=0.03), name
        assert not peak.fp8 or peak.fp8 / peak.half == pytest.approx(2, rel=0.03), name


def test_the_peak_of_a_cpu_is_what_it_computes() -> None:
    a = torch.randn(512, 512)
    times = []
    for _ in range(20):
        begun = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - begun)
    peak = peak_flops(CPU, "fp32")
    assert peak is not None
    assert peak > 0.7 * 2 * 512**3 / min(times)
    assert peak < 1e12  # of one thread


def test_what_others_take_of_a_processor_does_not_count() -> None:
    def busy_then_away() -> None:
        until = time.process_time() + 0.01
        while time.process_time() < until:
            pass
        time.sleep(0.02)

    assert metrics._cpu_seconds(busy_then_away) == pytest.approx(0.01, rel=0.3)


@on_ranks(2)
def test_the_peak_of_all_is_the_sum_and_none_where_one_is_unknown() -> None:
    mesh = start(1)
    peaks = [3e12, 4e12]
    metrics.measured_flops = lambda dtype, device: peaks[mesh.rank]
    assert peak_of_all(mesh, "bf16") == 7e12
    metrics.peak_flops = lambda device, precision: [3e12, None][mesh.rank]
    assert peak_of_all(mesh, "bf16") is None


@pytest.mark.gpu
def test_the_measured_peak_of_a_gpu_is_near_its_data_sheets() -> None:
    device = torch.device("cuda")
    told = PEAKS.get(known_as(torch.cuda.get_device_name(device)))
    measured = metrics.measured_flops(torch.bfloat16, device)
    assert measured > 1e12
    assert told is None or 0.5 < measured / told.of("bf16") < 1.05
