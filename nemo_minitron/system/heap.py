"""Memory that is freed: glibc's heap on the CPU, and Python's collector of cyclic garbage.

By default glibc maps new pages for every large tensor and unmaps them when it is freed, so the kernel zeroes every page
in each training step. With the logits of a large vocabulary this takes a tenth to a third of the step's time.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameter numbers of mallopt(3)."""


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Keep freed memory on the heap for the rest of this process.

    Returns:
        False without glibc, or if the user has configured the heap.
    """
    if _is_set_up(environment):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))


def environment_of_children(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return variables with the same effect for child processes; empty on a machine with a GPU."""
    import torch

    if torch.cuda.is_available() or _is_set_up(environment):
        return {}
    return {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


def _is_set_up(environment: Mapping[str, str]) -> bool:
    """Return whether the user has configured the heap."""
    return any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in environment)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause Python's garbage collector in this context, for work that creates many objects and discards few.

    Imports and the classes of a recipe are such work: collections would take a tenth of its time and find nothing.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            # Move all objects to the oldest generation. Otherwise the next collection would examine them.
            gc.freeze()
            gc.unfreeze()
            gc.enable()


def skip_collection_at_exit() -> None:
    """Let the interpreter exit without a last collection; for processes that leave nothing to be closed or deleted."""
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
