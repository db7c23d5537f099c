"""Limits on the size of external inputs and on the time to process them, with the variables that raise them.

The limits are far above the needs of real models, recipes and texts. They prevent a small hostile or damaged file from
exhausting a machine's memory or time.
"""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from nemo_minitron.errors import EnvironmentProblem


class Limit(NamedTuple):
    """Default of a limit and the environment variable that overrides it."""

    variable: str
    default: int

    def value(self) -> int:
        """Return the current limit.

        Raises:
            EnvironmentProblem: the variable is not a positive integer.
        """
        text = os.environ.get(self.variable)
        if not text:
            return self.default
        if not (text.isascii() and text.isdigit() and len(text) < 19 and int(text) > 0):
            raise EnvironmentProblem(f"{self.variable}={text[:40]!r} is not a limit.", allowed="a positive integer")
        return int(text)

    def how_to_raise(self) -> str:
        """Return the advice for users who need a higher limit."""
        return f"If you trust the file and need more, set {self.variable} (now {self.value():,})."


YAML_BYTES = Limit("MINITRON_MAX_YAML_BYTES", 1 << 18)
"""Size of a recipe, a config or a model card's header; the longest shipped recipe has 3 KB."""
YAML_NODES = Limit("MINITRON_MAX_YAML_NODES", 100_000)
"""Values in a YAML file with its aliases expanded, and in a recipe with its `${...}` interpolations resolved."""
YAML_DEPTH = 100
"""Nesting levels of a YAML file."""
CONFIG_BYTES = Limit("MINITRON_MAX_CONFIG_BYTES", 1 << 24)
"""Size of config.json and similar files."""
INDEX_BYTES = Limit("MINITRON_MAX_INDEX_BYTES", 1 << 26)
"""Size of an index of shards; the index of a model with 700 billion parameters has 9 MB."""
TOKENIZER_BYTES = Limit("MINITRON_MAX_TOKENIZER_BYTES", 1 << 27)
"""Size of tokenizer.json; 256,000 tokens take 33 MB."""
SAFETENSORS_HEADER_BYTES = Limit("MINITRON_MAX_SAFETENSORS_HEADER_BYTES", 1 << 25)
"""Size of a safetensors header, which has about 100 bytes per tensor."""
GGUF_VALUES = Limit("MINITRON_MAX_GGUF_VALUES", 3_000_000)
"""Elements of all arrays in a GGUF header; a tokenizer of 256,000 tokens has 1.3 million."""
FILES_LOOKED_AT = Limit("MINITRON_MAX_FILES_LOOKED_AT", 1_000_000)
"""Folder entries that the search for one data source examines."""
LINE_BYTES = Limit("MINITRON_MAX_LINE_BYTES", 1 << 25)
"""Size of one line of a .jsonl file."""
DOCUMENT_BYTES = Limit("MINITRON_MAX_DOCUMENT_BYTES", 1 << 32)
"""Size of input that is read as a whole: a .txt without separator, a .json list, a compressed .parquet file."""
UNPACKED_RATIO = Limit("MINITRON_MAX_UNPACKED_RATIO", 1000)
"""Ratio of unpacked to compressed bytes, once a file unpacks to more than `UNPACKED_FREE_BYTES`."""
UNPACKED_FREE_BYTES = 1 << 28
"""Size that a compressed file of any length may unpack to."""
WINDOW_BYTES = Limit("MINITRON_MAX_WINDOW_BYTES", 1 << 27)
"""Decompression window that a compressed file may require; equal to the default limit of `zstd`."""
RECIPE_SECONDS = Limit("MINITRON_MAX_RECIPE_SECONDS", 20)
"""CPU time to compose a recipe, which normally takes 0.3 s."""
TEMPLATE_SECONDS = Limit("MINITRON_MAX_TEMPLATE_SECONDS", 5)
"""CPU time to render one dialogue, which normally takes a millisecond."""
TEMPLATE_BYTES = Limit("MINITRON_MAX_TEMPLATE_BYTES", 1 << 30)
"""Memory to render one dialogue; its text may have a tenth of this size."""
PATTERN_SECONDS = Limit("MINITRON_MAX_PATTERN_SECONDS", 10)
"""Time to split short test texts with a tokenizer's patterns, which normally takes milliseconds."""


def too_large(file: Path, limit: Limit) -> str | None:
    """Return the reason why a file is too large to read, or None."""
    size = file.stat().st_size
    most = limit.value()
    return None if size <= most else f"it has {size:,} bytes, and at most {most:,} are read. {limit.how_to_raise()}"


class TimeIsUp(BaseException):
    """The CPU time limit was exceeded. A BaseException, so that libraries do not catch it like an ordinary error."""


@contextmanager
def cpu_seconds(limit: Limit) -> Iterator[None]:
    """Raise TimeIsUp if the block uses more CPU time than the limit. The overhead is a few microseconds.

    The limit applies only in the main thread, because other threads cannot be interrupted.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_PROF)[0]:
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise TimeIsUp

    before = signal.signal(signal.SIGPROF, stop)
    # Repeat the signal every second, in case the first exception was caught.
    signal.setitimer(signal.ITIMER_PROF, limit.value(), 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def memory(limit: Limit) -> Iterator[None]:
    """Raise MemoryError in the block if the process grows by more than the limit. The overhead is 20 microseconds."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    allowed = _address_space_bytes() + limit.value()
    if before[0] != resource.RLIM_INFINITY and before[0] <= allowed:
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (allowed, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _address_space_bytes() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
