"""Environment variables that make a training on GPUs fast. They must be set before torch is imported."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_DRIVER_FILES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
_OLD_ALLOCATOR, _ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
_SM_MARGIN = "16"
"""Multiprocessors that Transformer Engine's norms leave to NCCL, as in NVIDIA's recipes for Hopper."""


def gpu_environment(present: Mapping[str, str], *, splits_layers: bool, num_processes: int) -> dict[str, str]:
    """Return the variables for processes on GPUs, without those that the environment already has.

    Args:
        splits_layers: whether tensor or context parallelism is used.
    """
    torch = _torch_version()
    wanted = {}
    if _OLD_ALLOCATOR not in present:
        # Segments that grow leave no holes when the sizes of tensors change, as in evaluation between steps.
        wanted[_ALLOCATOR if torch >= (2, 9) else _OLD_ALLOCATOR] = "expandable_segments:True"
    if splits_layers:
        # One hardware queue keeps Megatron's order: communication starts before the product that hides it.
        wanted["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if num_processes > 1:
        wanted |= dict.fromkeys(("NVTE_FWD_LAYERNORM_SM_MARGIN", "NVTE_BWD_LAYERNORM_SM_MARGIN"), _SM_MARGIN)
        if torch < (2, 8):  # later the default
            wanted["TORCH_NCCL_AVOID_RECORD_STREAMS"] = "1"
    return {name: value for name, value in wanted.items() if name not in present}


def has_nvidia_driver() -> bool:
    """Return whether this machine has NVIDIA's driver, on Linux or inside WSL."""
    return any(file.exists() for file in _DRIVER_FILES)


def _torch_version() -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in version("torch").split(".")[:2])
    except PackageNotFoundError:  # some containers only extend PYTHONPATH
        return (0, 0)
