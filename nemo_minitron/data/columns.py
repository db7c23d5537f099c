"""Reading columns of parquet files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_minitron.data.blocks import COMPRESSIONS, read_whole
from nemo_minitron.errors import DataError, shortened

_ROWS_PER_BATCH = 1024


def read_column(file: Path, name: str) -> Iterator[tuple[str, int]]:
    """Yield the texts of a column, each with the bytes of the file read so far.

    Args:
        name: of the column; `a.b` names field b of the structs in column a.

    Raises:
        DataError: the column is missing or not text, or the file cannot be read.
    """
    import pyarrow as pa

    try:
        with open_parquet(file) as table:
            path = _column_path(table.schema_arrow, name, file)
            size, num_rows, done = file.stat().st_size, max(1, table.metadata.num_rows), 0
            for batch in table.iter_batches(batch_size=_ROWS_PER_BATCH, columns=[name]):
                done += batch.num_rows
                position = size * done // num_rows
                yield from ((text, position) for text in _texts(batch.column(0), path) if text is not None)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"Not a readable parquet file: {shortened(error)}", where=str(file)) from error
    except OSError as error:
        # pyarrow reports damaged pages as OSError without an errno.
        if error.errno is not None:
            raise
        raise DataError(f"Not a readable parquet file: {shortened(error)}", where=str(file)) from error


def _texts(column: Any, path: list[str]) -> list[str | None]:
    import pyarrow as pa
    import pyarrow.compute as pc

    for field in path[1:]:
        column = pc.struct_field(column, field)
    values = column.to_pylist()
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if _is_binary(kind):
        return [None if value is None else value.decode("utf-8") for value in values]
    return list(values)


@contextmanager
def open_parquet(file: Path) -> Iterator[Any]:
    """Open a pyarrow ParquetFile; decompress the file if its suffix is that of a compression."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.suffix.lower() in COMPRESSIONS:
        # Parquet is read from the end of the file, so a compressed file has to be decompressed as a whole.
        with pq.ParquetFile(pa.BufferReader(read_whole(file))) as table:
            yield table
    else:
        with pq.ParquetFile(file) as table:
            yield table


def _column_path(schema: Any, name: str, file: Path) -> list[str]:
    """Return the names of the column and of the nested fields; raise DataError unless the innermost one is text."""
    import pyarrow as pa

    if name in schema.names:
        path, kind = [name], schema.field(name).type
    else:
        path = name.split(".")
        kind = schema.field(path[0]).type if path[0] in schema.names else None
        for field in path[1:]:
            inside = kind.get_field_index(field) if kind is not None and pa.types.is_struct(kind) else -1
            kind = None if kind is None or inside < 0 else kind.field(inside).type
    if kind is None:
        raise DataError(
            f"There is no column {name!r}.",
            where=str(file),
            allowed=shortened(", ".join(schema.names)),
            next_step="Set text_field of this source.",
        )
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (_is_one_of(kind, "is_string", "is_large_string", "is_string_view") or _is_binary(kind)):
        raise DataError(f"Column {name!r} is {shortened(kind)}, not text.", where=str(file))
    return path


def _is_binary(kind: Any) -> bool:
    """Return whether the type is bytes: Spark and others write text as bytes without marking it as text."""
    return _is_one_of(kind, "is_binary", "is_large_binary", "is_binary_view")


def _is_one_of(kind: Any, *names: str) -> bool:
    """Return whether one of these tests of pyarrow.types holds; views have none before pyarrow 16."""
    import pyarrow as pa

    tests = [getattr(pa.types, name, None) for name in names]
    return any(test is not None and test(kind) for test in tests)
