"""How much of an input from outside is taken, how long it may keep a process busy, and how to raise each limit.

The limits lie far above what real models, recipes and texts need. They keep a small hostile or damaged file from
using up a machine's memory or time.
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
    """A default and the environment variable that replaces it."""

    variable: str
    default: int

    def value(self) -> int:
        """The limit that holds now.

        Raises:
            EnvironmentProblem: the variable holds something else than a whole number from 1.
        """
        text = os.environ.get(self.variable)
        if not text:
            return self.default
        if not (text.isascii() and text.isdigit() and len(text) < 19 and int(text) > 0):
            raise EnvironmentProblem(f"{self.variable}={text[:40]!r} is no limit.", allowed="a whole number from 1")
        return int(text)

    def how_to_raise(self) -> str:
        """The advice for whoever needs more."""
        return f"If you trust the file and need more, set {self.variable} (now {self.value():,})."


YAML_BYTES = Limit("MINITRON_MAX_YAML_BYTES", 1 << 18)
"""Of a recipe, a config or a model card's header; the longest shipped recipe has 3 KB."""
YAML_NODES = Limit("MINITRON_MAX_YAML_NODES", 100_000)
"""Values of a YAML file with its aliases written out, and values that `${...}` makes of a recipe."""
YAML_DEPTH = 100
CONFIG_BYTES = Limit("MINITRON_MAX_CONFIG_BYTES", 1 << 24)
"""Of config.json and the like."""
INDEX_BYTES = Limit("MINITRON_MAX_INDEX_BYTES", 1 << 26)
"""Of an index of shards; those of models with 700 billion parameters have 9 MB."""
TOKENIZER_BYTES = Limit("MINITRON_MAX_TOKENIZER_BYTES", 1 << 27)
"""Of tokenizer.json; one of 256,000 tokens has 33 MB."""
SAFETENSORS_HEADER_BYTES = Limit("MINITRON_MAX_SAFETENSORS_HEADER_BYTES", 1 << 25)
"""A tensor takes about 100 bytes."""
GGUF_VALUES = Limit("MINITRON_MAX_GGUF_VALUES", 3_000_000)
"""Elements of all arrays in a GGUF header; a tokenizer of 256,000 tokens has 1.3 million."""
FILES_LOOKED_AT = Limit("MINITRON_MAX_FILES_LOOKED_AT", 1_000_000)
"""Entries of folders that the search for one source looks at."""
LINE_BYTES = Limit("MINITRON_MAX_LINE_BYTES", 1 << 25)
"""Of one line of rows."""
DOCUMENT_BYTES = Limit("MINITRON_MAX_DOCUMENT_BYTES", 1 << 32)
"""Of what is read as a whole: a .txt without separator, a .json that is one list, a compressed .parquet."""
UNPACKED_RATIO = Limit("MINITRON_MAX_UNPACKED_RATIO", 1000)
"""Bytes that a compressed file may unpack to for each of its own, once they are many."""
UNPACKED_FREE_BYTES = 1 << 28
"""What any compressed file may unpack to."""
WINDOW_BYTES = Limit("MINITRON_MAX_WINDOW_BYTES", 1 << 27)
"""Memory that a compressed file may ask for: what `zstd` itself takes without --long or --memory."""
RECIPE_SECONDS = Limit("MINITRON_MAX_RECIPE_SECONDS", 20)
"""Processor time for composing a recipe, which takes 0.3 s."""
TEMPLATE_SECONDS = Limit("MINITRON_MAX_TEMPLATE_SECONDS", 5)
"""Processor time for one dialogue, which takes a millisecond."""
TEMPLATE_BYTES = Limit("MINITRON_MAX_TEMPLATE_BYTES", 1 << 30)
"""Memory for writing one dialogue; its text may have a tenth of this."""
PATTERN_SECONDS = Limit("MINITRON_MAX_PATTERN_SECONDS", 10)
"""Time for splitting short probe texts by a tokenizer's patterns, which takes milliseconds."""


def too_large(file: Path, limit: Limit) -> str | None:
    """The reason why a file is not read, or None."""
    size = file.stat().st_size
    most = limit.value()
    return None if size <= most else f"it has {size:,} bytes, and at most {most:,} are read. {limit.how_to_raise()}"


class TimeIsUp(BaseException):
    """More processor time was used than allowed. No Exception, so that no library takes it for an error of its own."""


@contextmanager
def cpu_seconds(limit: Limit) -> Iterator[None]:
    """Raise TimeIsUp when what follows uses more processor time. It costs a few microseconds.

    Only the main thread can be interrupted; elsewhere nothing is limited.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_PROF)[0]:
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise TimeIsUp

    before = signal.signal(signal.SIGPROF, stop)
    # It rings again every second, in case that something swallowed the first.
    signal.setitimer(signal.ITIMER_PROF, limit.value(), 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def memory(limit: Limit) -> Iterator[None]:
    """Let what follows fail with MemoryError when the process grows by more. It costs some 20 microseconds."""
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
