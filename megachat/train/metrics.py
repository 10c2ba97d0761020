"""Meters: model FLOPs utilisation against a known or measured peak, memory, and the clock of a step."""

import resource
import time

import torch

PEAK_BF16 = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Dense bf16 tensor-core FLOP/s, from makers' data sheets, by part of the device's name; first match wins."""


def peak_flops(device: torch.device, bf16: bool) -> float | None:
    """FLOP/s of one device: tabulated for GPUs, measured by a matrix product on a CPU, None when unknown."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak for part, peak in PEAK_BF16.items() if part in name), None) if bf16 else None
    return measured_flops(torch.bfloat16 if bf16 else torch.float32)


def measured_flops(dtype: torch.dtype, size: int = 1024) -> float:
    """The best of ten square matrix products: 2 * size^3 FLOPs over its seconds."""
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(10):
        begun = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


def memory_gib(device: torch.device) -> float:
    """The peak memory so far: of the GPU's allocator, or this process's resident memory on a CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
