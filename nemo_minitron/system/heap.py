"""glibc's heap on a CPU: keep what tensors free, for the next ones.

By default glibc maps every large tensor anew and gives it back when it is freed, so each step of a training pays for
the kernel's zeroing of every page: a tenth to a third of its time with the logits of a large vocabulary.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of mallopt(3)."""


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """For the rest of this process; False where there is no glibc, or the user has set its heap up."""
    if _is_set_up(environment):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))


def environment_of_children(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The same for processes that this one starts; nothing where there is a GPU, which has a heap of its own."""
    import torch

    if torch.cuda.is_available() or _is_set_up(environment):
        return {}
    return {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


def _is_set_up(environment: Mapping[str, str]) -> bool:
    """Whether the user has said how the heap shall be."""
    return any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in environment)
