"""Keys of a source of documents."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from nemo_minitron.schema.base import Schema


class DataSource(Schema):
    """One file, glob or folder of documents."""

    source: str
    """`asset:NAME`, or a path or glob of .txt, .jsonl, .json, .parquet, each also as .gz, .zst, .bz2 or .xz."""
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """Share of training samples drawn from this source, relative to the other sources."""
    text_field: str = "text"
    """Column of jsonl, json and parquet rows; `a.b`: field b inside a."""
    document_separator: Annotated[str, Field(min_length=1)] | None = None
    """Splits .txt files into documents; line ends are read as \\n. None: one document a file."""
    max_documents: PositiveInt | None = None
