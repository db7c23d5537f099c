"""Measure peak matrix throughput, the reference for model FLOPs utilization, and peak memory."""

from __future__ import annotations

import resource
import time

import torch

SIZE_CPU, SIZE_GPU, ROUNDS = 1024, 8192, 5


def matmul_flops_per_s(dtype: torch.dtype, device: torch.device) -> float:
    """Measure the best of several square matrix products, in this process with its threads."""
    size = SIZE_GPU if device.type == "cuda" else SIZE_CPU
    # A separate generator, so that the training's random state does not change.
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    best_s = float("inf")
    for _ in range(ROUNDS + 1):
        started_s = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best_s = min(best_s, time.perf_counter() - started_s)
    return 2.0 * size**3 / best_s


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory of this process: on a GPU tensors since the session opened, on a CPU resident memory."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
