"""Documents from .txt, .jsonl and .parquet files, each also compressed. Memory does not grow with the file.

A file is read as blocks of decompressed bytes, which are decoded here: only so can an error name the byte.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from nemo_minitron.config.schema import DataSource
from nemo_minitron.data.blocks import COMPRESSIONS, read_blocks
from nemo_minitron.errors import DataError

FORMATS = (".txt", ".jsonl", ".parquet")
_ROWS_PER_BATCH = 1024


@dataclass(frozen=True)
class Text:
    """One document as it was read."""

    text: str
    position_bytes: int
    """How much of the file on disk had been read by then; for progress."""


def source_files(path: Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Files of a file, folder (searched below, sorted, hidden ones left out) or glob pattern.

    Raises:
        DataError: nothing there, or nothing in a known format.
    """
    if path.is_file():
        file_format(path, formats)
        return [path]
    found = sorted(path.rglob("*")) if path.is_dir() else sorted(map(Path, glob(str(path), recursive=True)))
    present = [file for file in found if file.is_file() and not _hidden(file, path)]
    files = [file for file in present if _known(file, formats)]
    if files:
        return files
    if present:
        raise DataError(
            f"{len(present)} files at {path}, none of a known type: the first is {present[0].name}.",
            allowed=_patterns(formats),
        )
    raise DataError(
        f"No file matches {path}." if has_magic(str(path)) else f"There is no text at {path}.",
        allowed=f"a file, folder or glob of {_patterns(formats)}",
        next_step="Check the path; assets are fetched with `minitron assets fetch`.",
    )


def read_documents(file: Path, source: DataSource) -> Iterator[Text]:
    """The documents of one file, in order; blank and null ones are left out.

    Raises:
        DataError: an empty file, bad encoding, bad rows, missing columns, damaged compression; with file and line.
    """
    reader = {".txt": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet}[file_format(file)]
    count = 0
    try:
        for document in reader(file, source):
            if document.text.strip():
                count += 1
                yield document
        if count == 0:
            raise _no_document(file)
    except OSError as error:
        raise DataError(f"The file cannot be read: {error}", where=str(file)) from error


def _no_document(file: Path) -> DataError:
    problem = "is empty" if file.stat().st_size == 0 else "holds no text"
    return DataError(f"The file {problem}.", where=str(file), next_step="Remove it from the source, or fill it.")


def _hidden(file: Path, root: Path) -> bool:
    inside = file.relative_to(root).parts if root.is_dir() else ()
    return any(part.startswith(".") for part in inside)


def file_format(file: Path, formats: Sequence[str] = FORMATS) -> str:
    """The suffix without that of a compression: `.jsonl` of rows.jsonl.zst.

    Raises:
        DataError: it is none of the formats.
    """
    if not _known(file, formats):
        suffixes = "".join(file.suffixes) or "(none)"
        raise DataError(f"Unknown file type {suffixes}.", where=str(file), allowed=_patterns(formats))
    return _bare(file).suffix.lower()


def _known(file: Path, formats: Sequence[str]) -> bool:
    return _bare(file).suffix.lower() in formats


def _bare(file: Path) -> Path:
    return file.with_suffix("") if file.suffix.lower() in COMPRESSIONS else file


def _patterns(formats: Sequence[str]) -> str:
    return ", ".join(f"*{suffix}[.gz|.zst]" for suffix in formats)


def _read_text(file: Path, source: DataSource) -> Iterator[Text]:
    separator = source.document_separator
    if separator is None:
        yield Text("".join(text for text, _ in _decoded(file)), file.stat().st_size)
        return
    parts, position = [""], 0
    for text, position in _decoded(file):
        # The separator can lie across two blocks: the last part is what may be its beginning.
        joined = parts.pop() + text
        if separator in joined:
            first, *whole, last = joined.split(separator)
            yield Text("".join([*parts, first]), position)
            yield from (Text(document, position) for document in whole)
            parts = [last]
        else:
            border = max(0, len(joined) - len(separator) + 1)
            parts += [joined[:border], joined[border:]]
    yield Text("".join(parts), position)


def _decoded(file: Path) -> Iterator[tuple[str, int]]:
    """Text of a file with Unix line ends and no byte order mark, and the position after it."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    offset, line = 0, 1
    for block in read_blocks(file):
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block.data)
        except UnicodeDecodeError as error:
            line += error.object[: error.start].count(b"\n")
            raise _not_utf8(error, f"{file}:{line}", offset - pending) from error
        text = text.removeprefix("\ufeff") if offset == 0 else text
        offset += len(block.data)
        line += text.count("\n")
        yield newlines.decode(text), block.position_bytes
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _not_utf8(error, f"{file}:{line}", offset - len(error.object)) from error
    yield newlines.decode("", final=True), file.stat().st_size


def _not_utf8(error: UnicodeDecodeError, where: str, offset: int) -> DataError:
    byte = error.object[error.start]
    return DataError(
        f"The text is not UTF-8: byte 0x{byte:02x} at offset {offset + error.start} ({error.reason}).",
        where=where,
        next_step="Convert the file, e.g. `iconv -f latin1 -t utf-8`.",
    )


def _read_jsonl(file: Path, source: DataSource) -> Iterator[Text]:
    offset = 0
    for number, (line, position) in enumerate(read_lines(file), start=1):
        if number == 1 and line.startswith(codecs.BOM_UTF8):
            offset, line = len(codecs.BOM_UTF8), line[len(codecs.BOM_UTF8) :]
        text = _row_text(line, source, f"{file}:{number}", offset) if line.strip() else None
        offset += len(line) + 1
        if text is not None:
            yield Text(text, position)


def read_lines(file: Path) -> Iterator[tuple[bytes, int]]:
    """Lines without their ends, and how much of the file on disk had been read by then."""
    parts: list[bytes] = []
    position = 0
    for block in read_blocks(file):
        position = block.position_bytes
        first, *rest = block.data.split(b"\n")
        parts.append(first)
        for line in rest:
            yield b"".join(parts), position
            parts = [line]
    yield b"".join(parts), position


def _row_text(line: bytes, source: DataSource, where: str, offset: int) -> str | None:
    try:
        row = json.loads(line.decode("utf-8"))
        text = _field(row, source, where)
        if text is not None:
            text.encode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(error, where, offset) from error
    except UnicodeEncodeError as error:
        raise DataError(f"The text holds half a surrogate pair at character {error.start}.", where=where) from error
    except json.JSONDecodeError as error:
        raise DataError(f"Not JSON: {error.msg} at column {error.colno}.", where=where) from error
    except RecursionError as error:
        raise DataError("The JSON is nested too deeply.", where=where) from error
    return text


def _field(row: Any, source: DataSource, where: str) -> str | None:
    name = source.text_field
    if not isinstance(row, dict) or name not in row:
        present = (", ".join(row) or "(none)") if isinstance(row, dict) else f"it is a {type(row).__name__}"
        raise DataError(
            f"The row has no field {name!r}.",
            where=where,
            allowed=f"fields of this row: {present}",
            next_step="Set text_field of this source.",
        )
    text = row[name]
    if text is not None and not isinstance(text, str):
        raise DataError(f"Field {name!r} is {type(text).__name__}, not text.", where=where)
    return text


def _read_parquet(file: Path, source: DataSource) -> Iterator[Text]:
    import pyarrow as pa

    try:
        with open_parquet(file) as table:
            _check_column(table.schema_arrow, source.text_field, file)
            size, num_rows, done = file.stat().st_size, max(1, table.metadata.num_rows), 0
            for batch in table.iter_batches(batch_size=_ROWS_PER_BATCH, columns=[source.text_field]):
                done += batch.num_rows
                position = size * done // num_rows
                yield from (Text(text, position) for text in batch.column(0).to_pylist() if text is not None)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"Not a readable parquet file: {error}", where=str(file)) from error


@contextmanager
def open_parquet(file: Path) -> Iterator[Any]:
    """A pyarrow ParquetFile, decompressed by its suffix."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.suffix.lower() in COMPRESSIONS:
        # Parquet is read from its end, so a compressed one has to be unpacked as a whole.
        with pq.ParquetFile(pa.BufferReader(b"".join(block.data for block in read_blocks(file)))) as table:
            yield table
    else:
        with pq.ParquetFile(file) as table:
            yield table


def _check_column(schema: Any, name: str, file: Path) -> None:
    import pyarrow as pa

    if name not in schema.names:
        raise DataError(
            f"There is no column {name!r}.",
            where=str(file),
            allowed=", ".join(schema.names),
            next_step="Set text_field of this source.",
        )
    kind = schema.field(name).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"Column {name!r} is {kind}, not text.", where=str(file))
