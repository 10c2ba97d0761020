"""Meters: the peak FLOP/s that utilisation is measured against, and memory.

MFU, model FLOPs utilisation (Chowdhery et al., 2022, https://arxiv.org/abs/2204.02311, appendix B), is what
the losses and their gradients take, over what all devices could have done in the same time on the wall clock:
validating, saving and waiting are in it. HFU (Korthikanti et al., 2022, https://arxiv.org/abs/2205.05198,
section 5) also counts what activation checkpointing computes again. `megachat/model/size.py` holds the
formula; here is the peak.
"""

import re
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from megachat.parallel.mesh import Mesh

Precision = Literal["bf16", "fp16", "fp8", "tf32", "fp32"]
"""In what matrices are multiplied; `tf32` is what a GPU may be allowed to make of fp32."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
"""Of the precisions whose peak can be measured here."""


@dataclass(frozen=True)
class Peak:
    """TFLOP/s of one device on dense matrices, accumulated in fp32; 0 for what it cannot do."""

    half: float
    """bf16, and fp16 alike."""
    fp8: float
    tf32: float
    fp32: float
    """Without tensor cores."""

    def of(self, precision: Precision) -> float:
        """In FLOP/s."""
        return 1e12 * (self.half if precision in ("bf16", "fp16") else getattr(self, precision))


PEAKS = {
    "GB200": Peak(2500.0, 5000.0, 1250.0, 80.0),
    "B200": Peak(2250.0, 4500.0, 1100.0, 75.0),
    "GH200": Peak(989.0, 1979.0, 494.5, 67.0),
    "H200": Peak(989.0, 1979.0, 494.5, 67.0),
    "H200 NVL": Peak(835.5, 1670.5, 417.5, 60.0),
    "H100": Peak(989.0, 1979.0, 494.5, 67.0),
    "H100 NVL": Peak(835.5, 1670.5, 417.5, 60.0),
    "H100 PCIE": Peak(756.0, 1513.0, 378.0, 51.2),
    "A100": Peak(312.0, 0.0, 156.0, 19.5),
    "A100 PCIE": Peak(312.0, 0.0, 156.0, 19.5),
    "A40": Peak(149.7, 0.0, 74.8, 37.4),
    "A30": Peak(165.0, 0.0, 82.0, 10.3),
    "A10": Peak(125.0, 0.0, 62.5, 31.2),
    "L40S": Peak(362.0, 733.0, 183.0, 91.6),
    "L40": Peak(181.0, 362.0, 90.5, 90.5),
    "L4": Peak(121.0, 242.0, 60.0, 30.3),
    "RTX 6000 ADA GENERATION": Peak(364.2, 728.5, 182.1, 91.1),
    "RTX A6000": Peak(154.8, 0.0, 77.4, 38.7),
    "RTX 5090": Peak(209.5, 419.0, 104.8, 104.8),
    "RTX 4090": Peak(165.2, 330.3, 82.6, 82.6),
    "RTX 3090": Peak(71.0, 0.0, 35.6, 35.6),
}
"""By what `known_as` leaves of the name that CUDA gives a device.

From NVIDIA's data sheets of these products and its white papers on GA102, Ada, Hopper and RTX Blackwell;
figures "with sparsity" are halved. A name with anything more to it (RTX 4090 D, RTX 3090 Ti, a MIG slice) is
another device: its peak is measured.
"""

_NOISE = re.compile(r"\b(NVIDIA|TESLA|GEFORCE|SXM\d|\d+GB?|HBM\d\w?)\b")
"""Maker, family, socket and memory: what tells no two peaks apart."""


def known_as(name: str) -> str:
    """A device's name without what makes no difference.

    Example: known_as("NVIDIA A100-SXM4-80GB") -> "A100"
    """
    return " ".join(_NOISE.sub(" ", name.upper().replace("-", " ")).split())


def peak_flops(device: torch.device, precision: Precision) -> float | None:
    """FLOP/s of one device: from the table, else measured; None when it cannot be.

    Products in fp32 stand for `tf32` where torch has been allowed to compute them so.
    """
    if device.type == "cuda":
        if precision == "fp32" and torch.backends.cuda.matmul.allow_tf32:
            precision = "tf32"
        peak = PEAKS.get(known_as(torch.cuda.get_device_name(device)))
        if peak is not None:
            return peak.of(precision) or None
    if precision not in DTYPES:
        return None
    return measured_flops(DTYPES[precision], device)


def peak_of_all(mesh: Mesh, precision: Precision) -> float | None:
    """The peaks of all ranks' devices together; None where one is unknown.

    Ranks that share a processor measure side by side, as they will compute.
    """
    mesh.barrier()
    total = sum(mesh.each(peak_flops(mesh.device, precision) or float("nan")))
    return total if total > 0 else None


LONG_ENOUGH = 0.1
"""Seconds for which a device is kept busy to see how fast it is."""


def measured_flops(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of square matrix products, 2 * size^3 each, whose size is doubled as long as that is faster."""
    best, size = 0.0, 512
    while size == 512 or 2 * size**3 < 2 * LONG_ENOUGH * best:
        rate = _rate(dtype, size, device)
        if rate < best:
            break
        best, size = rate, 2 * size
    return best


def _rate(dtype: torch.dtype, size: int, device: torch.device) -> float:
    """FLOP/s of products of one size, as many as take `LONG_ENOUGH`.

    A CPU is timed by the processor time of its threads, not by the clock on the wall: what others take of a
    busy machine in the meantime does not count. (At a load of 10 on two cores the clock gave 38 to 432
    GFLOP/s in bf16, processor time 337 to 385.)
    """
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)  # given: making room for the result would be timed, too
    torch.mm(a, b, out=out)
    clock = _gpu_seconds if device.type == "cuda" else _cpu_seconds
    return 2 * size**3 / clock(lambda: torch.mm(a, b, out=out))


def _cpu_seconds(act: Callable[[], object]) -> float:
    """Seconds of each thread's processor time that it takes, on average."""
    threads, times = torch.get_num_threads(), 0
    begun = time.process_time()
    while (spent := (time.process_time() - begun) / threads) < LONG_ENOUGH:
        act()
        times += 1
    return spent / times


def _gpu_seconds(act: Callable[[], object]) -> float:
    """Seconds that the GPU takes for it, on average."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    spent, times = 0.0, 1
    while spent < LONG_ENOUGH:
        begin.record()
        for _ in range(times):
            act()
        end.record()
        end.synchronize()
        spent, done = float(begin.elapsed_time(end)) / 1000, times
        times *= 2
    return spent / done


def memory_gib(device: torch.device) -> float:
    """The peak memory so far: of the GPU's allocator, or this process's resident memory on a CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
