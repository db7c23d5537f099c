"""Rules that span the sources of a stage."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from nemo_minitron.data.found import file_format, without_compression
from nemo_minitron.errors import DataError
from nemo_minitron.schema.data import DataSource


def require_read_once(sources: Sequence[DataSource], files: Sequence[Sequence[Path]], keys: Sequence[str]) -> None:
    """Refuse text that two sources read: each source holds out documents of its own, so one would train on those of
    the other.

    Two sources may read different fields of one file.

    Args:
        files: the files of each source.
        keys: the recipe key of each source.

    Raises:
        DataError: two sources read the same field of a file, or of its compressed copy.
    """
    readers: dict[tuple[str, str], int] = {}
    for number, source in enumerate(sources):
        for file in files[number]:
            field = "" if file_format(file) == ".txt" else source.text_field
            name = os.fspath(without_compression(Path(os.path.realpath(file))))
            first = readers.setdefault((name, field), number)
            if first != number:
                raise DataError(
                    f"Sources {sources[first].source} and {source.source} both read {file.name}, so documents that "
                    "one of them holds out would be in the training text of the other.",
                    where=f"{keys[first]}, {keys[number]}: {file}",
                    next_step="Remove one of the sources, or use patterns that do not overlap; `weight` sets how often "
                    "the text of a source is used.",
                )
