"""Reading documents from .txt, .jsonl, .json and .parquet files, also compressed, in memory independent of file size.

Files are read as blocks of decompressed bytes and decoded here, so that an error can give the offset of the byte.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.data.blocks import read_blocks, read_whole
from nemo_minitron.data.found import file_format
from nemo_minitron.errors import DataError, shortened
from nemo_minitron.limits import DOCUMENT_BYTES, LINE_BYTES
from nemo_minitron.schema.data import DataSource
from nemo_minitron.system.shown import shown_names

Span = tuple[int, int]
"""Half-open range of byte offsets in a file; it stands for the lines that begin in it."""
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class Text:
    """One document."""

    text: str
    position_bytes: int
    """Bytes of the file on disk read so far, for progress."""


def read_documents(file: Path, source: DataSource, span: Span | None = None) -> Iterator[Text]:
    """Yield the documents of one file, in order; skip blank and null ones.

    Args:
        span: part of an uncompressed .jsonl to read; it may hold no document.

    Raises:
        DataError: an empty file, bad encoding, bad rows, missing columns or damaged compression, with file and line.
    """
    count = 0
    try:
        for document in _documents(file, source, span):
            if document.text.strip():
                count += 1
                yield document
        if count == 0 and span is None:
            raise no_document(file)
    except OSError as error:
        raise DataError(f"The file cannot be read: {error}", where=str(file)) from error


def _documents(file: Path, source: DataSource, span: Span | None) -> Iterator[Text]:
    kind = file_format(file)
    if kind == ".txt":
        return _read_text(file, source)
    if kind == ".jsonl":
        return _read_jsonl(file, source, span)
    if kind == ".json":
        return _read_json(file, source)
    from nemo_minitron.data.columns import read_column

    return (Text(text, position) for text, position in read_column(file, source.text_field))


def require_separator_is_used(files: list[Path], source: DataSource, key: str) -> None:
    """Refuse a `document_separator` that would split nothing.

    Raises:
        DataError: none of the files is a .txt.
    """
    if source.document_separator is None or any(file_format(file) == ".txt" for file in files):
        return
    raise DataError(
        f"document_separator splits only .txt files, and source {source.source} has none; each row is one document.",
        where=key,
        next_step="Remove document_separator from this source.",
    )


def no_document(file: Path) -> DataError:
    problem = "is empty" if file.stat().st_size == 0 else "holds no text"
    return DataError(f"The file {problem}.", where=str(file), next_step="Remove it from the source, or fill it.")


def _read_text(file: Path, source: DataSource) -> Iterator[Text]:
    limit = _DocumentLimit(file)
    if source.document_separator is None:
        yield Text("".join(limit.of(text) for text, _ in _decoded(file)), file.stat().st_size)
        return
    # Line ends in the text are normalized to \n, so those in the separator have to be, too.
    separator = source.document_separator.replace("\r\n", "\n").replace("\r", "\n")
    parts, position = [""], 0
    for text, position in _decoded(file):
        # A separator can span two blocks, so the last part holds what may be its beginning.
        joined = parts.pop() + text
        if separator in joined:
            first, *whole, last = joined.split(separator)
            yield Text("".join([*parts, first]), position)
            limit = _DocumentLimit(file)
            yield from (Text(document, position) for document in whole)
            parts = [last]
        else:
            border = max(0, len(joined) - len(separator) + 1)
            limit.of(text)
            parts += [joined[:border], joined[border:]]
    yield Text("".join(parts), position)


class _DocumentLimit:
    """Counts the characters of one document."""

    def __init__(self, file: Path) -> None:
        self.file, self.seen, self.max_chars = file, 0, DOCUMENT_BYTES.value()

    def of(self, text: str) -> str:
        """Count and return the text; raise DataError when the document becomes too long."""
        self.seen += len(text)
        if self.seen > self.max_chars:
            raise DataError(
                f"One document has more than {self.max_chars:,} characters.",
                where=str(self.file),
                next_step="Set document_separator of this source. " + DOCUMENT_BYTES.how_to_raise(),
            )
        return text


def _decoded(file: Path) -> Iterator[tuple[str, int]]:
    """Yield the text of a file in parts, with Unix line ends and no byte order mark, and the position after each."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    offset, line, started = 0, 1, False
    for block in read_blocks(file):
        if offset == 0:
            _require_not_utf16(block.data, file)
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block.data)
        except UnicodeDecodeError as error:
            line += error.object[: error.start].count(b"\n")
            raise _not_utf8(error, f"{file}:{line}", offset - pending) from error
        if text and not started:
            text, started = text.removeprefix("\ufeff"), True
        offset += len(block.data)
        line += text.count("\n")
        yield newlines.decode(text), block.position_bytes
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _not_utf8(error, f"{file}:{line}", offset - len(error.object)) from error
    yield newlines.decode("", final=True), file.stat().st_size


def _require_not_utf16(start: bytes, file: Path) -> None:
    """Refuse UTF-16, which has a byte order mark or many zero bytes; zero bytes are valid UTF-8, but not in text."""
    start = start[:4096]
    if start.startswith(_UTF16_MARKS) or start.count(0) > len(start) // 4:
        raise DataError(
            "The text looks like UTF-16, not UTF-8.",
            where=str(file),
            next_step="Convert the file, e.g. `iconv -f utf-16 -t utf-8`; "
            "if it is not text, remove it from the source.",
        )


def _not_utf8(error: UnicodeDecodeError, where: str, offset: int) -> DataError:
    byte = error.object[error.start]
    return DataError(
        f"The text is not UTF-8: byte 0x{byte:02x} at offset {offset + error.start} ({error.reason}).",
        where=where,
        next_step="Convert the file, e.g. `iconv -f latin1 -t utf-8`.",
    )


# --- rows -----------------------------------------------------------------------------------------


def _read_jsonl(file: Path, source: DataSource, span: Span | None = None) -> Iterator[Text]:
    first = span is None or span[0] == 0
    lines = _lines_from_start(file) if span is None else _lines_of(file, span)
    for number, (line, offset, position) in enumerate(lines, start=1):
        if first:
            _require_not_utf16(line, file)
            if line.startswith(codecs.BOM_UTF8):
                line, offset = line[len(codecs.BOM_UTF8) :], offset + len(codecs.BOM_UTF8)
            first = False
        if line.strip():
            place = _Place(file, number, offset, span)
            text = _text_of(_parse(line, place, offset), source, place)
            if text is not None:
                yield Text(text, position)


@dataclass(frozen=True)
class _Place:
    """Place of a line; its number in the file is counted only when it is printed."""

    file: Path
    number: int
    """Number of the line in the span."""
    offset: int
    span: Span | None

    def __str__(self) -> str:
        before = 0 if self.span is None else _count_lines(self.file, self.offset) - self.number + 1
        return f"{self.file}:{self.number + before}"


def _count_lines(file: Path, end: int) -> int:
    """Count the line ends before an offset of the file."""
    count = done = 0
    for block in read_blocks(file):
        count += block.data[: end - done].count(b"\n")
        done += len(block.data)
        if done >= end:
            break
    return count


def _lines_from_start(file: Path) -> Iterator[tuple[bytes, int, int]]:
    """Yield (line, its offset, bytes of the file on disk read so far)."""
    offset = 0
    for line, position in read_lines(file):
        yield line, offset, position
        offset += len(line) + 1


def _lines_of(file: Path, span: Span) -> Iterator[tuple[bytes, int, int]]:
    start, end = span
    # The byte before `start` shows whether a line begins at `start`.
    offset = max(0, start - 1)
    lines = read_lines(file, offset)
    if start > 0:
        offset += len(next(lines)[0]) + 1
    for line, position in lines:
        if offset >= end:
            return
        yield line, offset, position
        offset += len(line) + 1


def _read_json(file: Path, source: DataSource) -> Iterator[Text]:
    """Read one row per line, which many data sets name .json, or a list of rows, or a single row."""
    if _has_rows_as_lines(file):
        yield from _read_jsonl(file, source)
        return
    data = read_whole(file).removeprefix(codecs.BOM_UTF8)
    content = _parse(data, file, 0) if data.strip() else []
    rows = content if isinstance(content, list) else [content]
    for number, row in enumerate(rows, start=1):
        text = _text_of(row, source, f"{file}, row {number}")
        if text is not None:
            yield Text(text, file.stat().st_size * number // len(rows))


def _has_rows_as_lines(file: Path) -> bool:
    """Return whether the first line that is not blank is a complete JSON object."""
    if _first_byte(file) == b"[":  # a list, whose line can be as long as the file
        return False
    for line, _ in read_lines(file):
        line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            try:
                return isinstance(json.loads(line.decode("utf-8")), dict)
            except (ValueError, RecursionError):
                return False
    return False


def _first_byte(file: Path) -> bytes:
    """Return the first byte after blanks and a byte order mark; none of a blank file."""
    for number, block in enumerate(read_blocks(file)):
        if number == 0:
            _require_not_utf16(block.data, file)
        text = (block.data.removeprefix(codecs.BOM_UTF8) if number == 0 else block.data).lstrip()
        if text:
            return text[:1]
    return b""


def read_lines(file: Path, start: int = 0) -> Iterator[tuple[bytes, int]]:
    """Yield lines without their line ends, each with the bytes of the file on disk read so far.

    Args:
        start: byte to begin at; only for uncompressed files.
    """
    parts: list[bytes] = []
    position, size, max_bytes = start, 0, LINE_BYTES.value()
    for block in read_blocks(file, start):
        position = block.position_bytes
        first, *rest = block.data.split(b"\n")
        parts.append(first)
        size += len(first)
        if size > max_bytes:
            raise DataError(
                f"A line has more than {max_bytes:,} bytes.",
                where=str(file),
                next_step="Write one row, with one document, on each line. " + LINE_BYTES.how_to_raise(),
            )
        for line in rest:
            yield b"".join(parts), position
            parts, size = [line], len(line)
    yield b"".join(parts), position


def _parse(data: bytes, place: object, offset: int) -> Any:
    """Parse one JSON value.

    Args:
        place: str(place) names the place in an error.
        offset: position of `data` in the file.
    """
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _not_utf8(error, str(place), offset) from error
    except json.JSONDecodeError as error:
        where = str(place) if error.lineno == 1 else f"{place}:{error.lineno}"
        raise DataError(f"Not JSON: {error.msg} at column {error.colno}.", where=where) from error
    except ValueError as error:  # a number of more than 4300 digits
        raise DataError(f"The JSON cannot be read: {shortened(error)}.", where=str(place)) from error
    except RecursionError as error:
        raise DataError("The JSON is nested too deeply.", where=str(place)) from error


def _text_of(row: Any, source: DataSource, place: object) -> str | None:
    text = _field(row, source.text_field, place)
    if text is None:
        return None
    if not isinstance(text, str):
        raise DataError(f"Field {source.text_field!r} is {type(text).__name__}, not text.", where=str(place))
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"The text has an unpaired surrogate at character {error.start}.", where=str(place)) from error
    return text


def _field(row: Any, name: str, place: object) -> Any:
    """Return the value of a field; `a.b` names field b of the object in field a."""
    if isinstance(row, dict) and name in row:
        return row[name]
    value = row
    for part in name.split("."):
        if value is None and row is not None:
            return None
        if not isinstance(value, dict) or part not in value:
            raise _no_field(row, name, place)
        value = value[part]
    return value


def _no_field(row: Any, name: str, place: object) -> DataError:
    present = shown_names(row) if isinstance(row, dict) else f"none, it is a {type(row).__name__}"
    return DataError(
        f"The row has no field {name!r}.",
        where=str(place),
        allowed=f"fields of this row: {present}",
        next_step="Set text_field of this source.",
    )
