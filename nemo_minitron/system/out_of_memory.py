"""Error messages for allocations that fail, in the memory of a GPU or of the machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from nemo_minitron.errors import EnvironmentProblem, shortened

_IN_WORDS = re.compile(r"out of memory|CUBLAS_STATUS_ALLOC_FAILED|can't allocate memory|not enough memory", re.I)
"""Messages of torch's RuntimeErrors: of its allocators, of CUDA and of cuBLAS."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error is a failed allocation of Python, numpy or torch."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_IN_WORDS.search(str(error))))


@contextmanager
def memory_errors(what: str, where: str, next_step: str) -> Iterator[None]:
    """Convert failed allocations into an `EnvironmentProblem`.

    Args:
        what: what runs, as the subject of a sentence.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        why = shortened(" ".join(str(error).split()))
        text = f"{what} ran out of memory{': ' if why else '.'}{why}"
        raise EnvironmentProblem(text, where=where, next_step=next_step) from error
