"""Documents from .txt, .jsonl and .parquet files, each also compressed. Constant memory."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import IO

from nemo_minitron.config.schema import DataSource
from nemo_minitron.errors import DataError

FORMATS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".zst")
_CHUNK_CHARS = 1 << 20


def source_files(path: Path) -> list[Path]:
    """Files of a file, folder (searched below, sorted) or glob pattern.

    Raises:
        DataError: nothing there, or nothing in a known format.
    """
    if path.is_file():
        _format(path)
        return [path]
    found = [Path(name) for name in glob(str(path), recursive=True)] if not path.is_dir() else list(path.rglob("*"))
    files = sorted(file for file in found if file.is_file() and _known(file))
    if not files:
        raise DataError(
            f"No text found at {path}.",
            allowed="a file, folder or glob of " + ", ".join(f"*{f}[.gz|.zst]" for f in FORMATS),
            next_step="Check the path; assets are fetched with `minitron assets fetch`.",
        )
    return files


def read_documents(file: Path, source: DataSource) -> Iterator[str]:
    """The documents of one file, in order; blank ones are left out.

    Raises:
        DataError: bad encoding, bad rows, missing columns, with file and line.
    """
    reader = {".txt": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet}[_format(file)]
    try:
        yield from (text for text in reader(file, source) if text.strip())
    except UnicodeDecodeError as error:
        raise DataError(
            f"The text is not UTF-8: byte 0x{error.object[error.start]:02x} ({error.reason}).",
            where=str(file),
            next_step="Convert the file, e.g. `iconv -f latin1 -t utf-8`.",
        ) from error
    except (OSError, EOFError) as error:
        raise DataError(f"The file cannot be read: {error}", where=str(file)) from error


def _known(file: Path) -> bool:
    return _bare(file).suffix in FORMATS


def _bare(file: Path) -> Path:
    return file.with_suffix("") if file.suffix in COMPRESSIONS else file


def _format(file: Path) -> str:
    if not _known(file):
        raise DataError(
            f"Unknown file type {''.join(file.suffixes) or '(none)'}.",
            where=str(file),
            allowed=", ".join(f"{f}[.gz|.zst]" for f in FORMATS),
        )
    return _bare(file).suffix


@contextmanager
def _open_binary(file: Path) -> Iterator[IO[bytes]]:
    if file.suffix == ".gz":
        with gzip.open(file) as stream:
            yield stream  # type: ignore[misc]
    elif file.suffix == ".zst":
        import zstandard

        try:
            with file.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
                yield io.BufferedReader(stream)
        except zstandard.ZstdError as error:
            raise DataError(f"The compressed file is damaged: {error}", where=str(file)) from error
    else:
        with file.open("rb") as stream:
            yield stream


def _read_text(file: Path, source: DataSource) -> Iterator[str]:
    with _open_binary(file) as binary, io.TextIOWrapper(binary, encoding="utf-8") as stream:
        if source.document_separator is None:
            yield stream.read()
            return
        rest = ""
        while chunk := stream.read(_CHUNK_CHARS):
            *whole, rest = (rest + chunk).split(source.document_separator)
            yield from whole
        yield rest


def _read_jsonl(file: Path, source: DataSource) -> Iterator[str]:
    with _open_binary(file) as binary, io.TextIOWrapper(binary, encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"Not JSON: {error.msg} at column {error.colno}.", where=f"{file}:{number}") from error
            yield _text_of(row, source, f"{file}:{number}")


def _text_of(row: object, source: DataSource, where: str) -> str:
    if not isinstance(row, dict) or source.text_field not in row:
        present = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise DataError(
            f"The row has no field {source.text_field!r}.",
            where=where,
            allowed=f"fields of this row: {present}",
            next_step="Set text_field of this source.",
        )
    text = row[source.text_field]
    if not isinstance(text, str):
        raise DataError(f"Field {source.text_field!r} is {type(text).__name__}, not text.", where=where)
    return text


def _read_parquet(file: Path, source: DataSource) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with _open_binary(file) as stream:
            table = pq.ParquetFile(pa.BufferReader(stream.read()) if file.suffix in COMPRESSIONS else stream)
            names = table.schema_arrow.names
            if source.text_field not in names:
                raise DataError(
                    f"There is no column {source.text_field!r}.",
                    where=str(file),
                    allowed=", ".join(names),
                    next_step="Set text_field of this source.",
                )
            for batch in table.iter_batches(batch_size=1024, columns=[source.text_field]):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except pa.ArrowInvalid as error:
        raise DataError(f"Not a readable parquet file: {error}", where=str(file)) from error
