"""Keys of a source of documents."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field, PositiveInt

from nemo_minitron.schema.base import Schema


def _without_escapes(separator: str) -> str:
    if re.fullmatch(r"(\\[abefnrtv0])+", separator):
        raise ValueError(
            f'is a backslash and a letter, not a control character; write "{separator}" in double quotes, and on the '
            f"command line document_separator='\"{separator}\"'"
        )
    return separator


class DataSource(Schema):
    """One file, glob or folder of documents."""

    source: str
    """`asset:NAME`, or a path or glob of .txt, .jsonl, .json or .parquet files, each also compressed as .gz, .zst, .bz2
    or .xz."""
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """Share of the training samples that come from this source, relative to the other sources."""
    text_field: str = "text"
    """Column with the text in jsonl, json and parquet rows. `a.b` is field b inside field a."""
    document_separator: Annotated[str, Field(min_length=1), AfterValidator(_without_escapes)] | None = None
    """Text between the documents of a .txt file; line ends count as \\n. null: each file is one document."""
    max_documents: PositiveInt | None = None
    """Read at most this many documents. null: all."""
