"""Reading rows of .jsonl, .json and .parquet files with their places. A row that cannot be read becomes a BadRow."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.data.blocks import read_whole
from nemo_minitron.data.chat.rows import BadRow
from nemo_minitron.data.columns import open_parquet
from nemo_minitron.data.found import CHAT_FORMATS, file_format, source_files
from nemo_minitron.data.readers import read_lines
from nemo_minitron.errors import DataError, shortened
from nemo_minitron.system.shown import shown_name

_ROWS_PER_BATCH = 256


@dataclass(frozen=True)
class RawRow:
    """Row as read from its file."""

    file: Path
    number: int
    """Line number in a .jsonl, otherwise the number of the row; counted from 1."""
    content: Mapping[str, Any] | BadRow

    @property
    def where(self) -> str:
        return f"{self.file}:{self.number}"

    @property
    def origin(self) -> str:
        """Place without the folder, for the normalized row, which has to be the same on every machine."""
        return f"{self.file.name}:{self.number}"


def chat_files(path: Path) -> list[Path]:
    """Return the chat files of a source: a file, a folder or a glob pattern.

    Raises:
        DataError: there is no file, or none in a known format.
    """
    return source_files(path, CHAT_FORMATS)


def read_rows(file: Path) -> Iterator[RawRow]:
    """Yield all rows of one file, in order; skip blank lines.

    Raises:
        DataError: the file as a whole cannot be read, or is empty.
    """
    reader = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}[file_format(file, CHAT_FORMATS)]
    number = 0
    try:
        for number, content in reader(file):
            yield RawRow(file, number, content)
    except OSError as error:
        raise DataError(f"The file cannot be read: {error}", where=str(file)) from error
    if number == 0:
        raise DataError("The file has no rows.", where=str(file), next_step="Remove it from the source, or fill it.")


Numbered = Iterator[tuple[int, Mapping[str, Any] | BadRow]]


def _jsonl(file: Path) -> Numbered:
    is_first = True
    for number, (line, _) in enumerate(read_lines(file), start=1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not line.strip():
            continue
        if is_first and line.strip() in (b"[", b"{"):
            raise DataError(
                "The file is JSON over several lines, not one row per line.",
                where=f"{file}:{number}",
                next_step="If it is a list of rows, name it .json; otherwise write each row on one line.",
            )
        is_first = False
        yield number, _parsed(line)


def _parsed(line: bytes) -> Mapping[str, Any] | BadRow:
    try:
        return _object(json.loads(line.decode("utf-8"), object_pairs_hook=_without_repeats))
    except BadRow as error:
        return error
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8: byte 0x{line[error.start]:02x} in column {error.start + 1}")
    except json.JSONDecodeError as error:
        return BadRow(f"not JSON: {error.msg} in column {error.colno}")
    except ValueError:
        return BadRow("not JSON: a number has too many digits")
    except RecursionError:
        return BadRow("not JSON: nested too deeply")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object; refuse repeated fields, of which the json module would silently keep only the last."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRow(f"the field {shown_name(twice)} appears twice in one object")
    return found


def _object(row: Any) -> Mapping[str, Any] | BadRow:
    return row if isinstance(row, dict) else BadRow(f"the row is {_json_type(row)}, not an object with fields")


def _json_type(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), "null")


def _json(file: Path) -> Numbered:
    data = read_whole(file).removeprefix(codecs.BOM_UTF8)
    try:
        rows = json.loads(data.decode("utf-8"), object_pairs_hook=_without_repeats) if data.strip() else []
    except json.JSONDecodeError as error:
        raise DataError(
            f"Not JSON: {error.msg} in column {error.colno}.",
            where=f"{file}:{error.lineno}",
            next_step="If it has one row per line, name it .jsonl.",
        ) from error
    except (BadRow, ValueError, RecursionError) as error:
        raise DataError(f"Not a list of rows: {shortened(str(error).partition(';')[0])}.", where=str(file)) from error
    if not isinstance(rows, list):
        raise DataError(
            f"The file contains {_json_type(rows)}, not a list.",
            where=str(file),
            allowed="a list of rows",
            next_step="Write it as .jsonl, one row per line.",
        )
    for number, row in enumerate(rows, start=1):
        yield number, _object(row)


def _parquet(file: Path) -> Numbered:
    import pyarrow as pa

    number = 0
    try:
        with open_parquet(file) as table:
            for batch in table.iter_batches(batch_size=_ROWS_PER_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, ValueError, OverflowError, KeyError) as error:  # KeyError: unknown time zones
        after = f" after row {number}" if number else ""
        raise DataError(f"Not a readable parquet file{after}: {shortened(error)}", where=str(file)) from error
