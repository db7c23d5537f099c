"""Tests of reading files of public chats: file types, unreadable lines, damaged files."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from nemo_minitron.data.chat.files import chat_files, read_rows
from nemo_minitron.errors import DataError

ROWS: list[dict[str, Any]] = [{"prompt": "Hi \u2028", "completion": "Ho", "meta": {"id": i}} for i in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", LINES),
        ("x.jsonl", b"\xef\xbb\xbf" + LINES),
        ("x.jsonl.zst", zstandard.compress(LINES)),
        ("x.jsonl.gz", gzip.compress(LINES)),
        ("x.json", json.dumps(ROWS, indent=2).encode()),
        ("x.parquet", parquet()),
    ],
    ids=["plain", "with a mark", "zst", "gz", "list", "parquet"],
)
def test_every_file_type_gives_the_same_rows_with_their_places(tmp_path: Path, name: str, content: bytes) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    found = list(read_rows(file))
    assert [row.content for row in found] == ROWS
    assert [row.origin for row in found] == [f"{name}:{number}" for number in (1, 2, 3)]
    assert found[0].where == f"{file}:1"


def test_unreadable_lines_become_bad_rows_with_a_reason(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"a": 1}\n\n{"a": \n[1]\n"\xe9"\n' + b"[" * 100_000 + b"\n")
    found = {row.number: str(row.content) for row in read_rows(file)}
    assert found == {
        1: "{'a': 1}",
        3: "not JSON: Expecting value in column 7",
        4: "the row is a list, not an object with fields",
        5: "not UTF-8: byte 0xe9 in column 2",
        6: "not JSON: nested too deeply",
    }


@pytest.mark.parametrize(
    ("name", "content", "expected_message"),
    [
        ("x.jsonl", b"\n", "The file has no rows"),
        ("x.json", b"", "The file has no rows"),
        ("x.json", b"[]", "The file has no rows"),
        ("x.json", b'{"a": 1}', "The file contains an object, not a list"),
        ("x.json", LINES, "name it .jsonl"),
        ("x.parquet", b"PAR1", "Not a readable parquet file"),
        ("x.jsonl.zst", zstandard.compress(LINES)[:-5], "The compressed file is damaged"),
    ],
)
def test_a_file_that_cannot_be_read_is_a_clear_error(
    tmp_path: Path, name: str, content: bytes, expected_message: str
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError, match=expected_message) as caught:
        list(read_rows(file))
    assert str(file) in str(caught.value)


def test_a_table_with_an_unknown_time_zone_is_a_clear_error(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"prompt": ["Hi"], "at": pa.array([1], pa.timestamp("s", tz="Mars/X"))}), file)
    with pytest.raises(DataError, match="Not a readable parquet file: 'Mars/X'"):
        list(read_rows(file))


@pytest.mark.parametrize("make", [lambda folder: folder / "x.txt", lambda folder: folder])
def test_text_files_are_not_chats(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    (tmp_path / "x.txt").write_text("Hi")
    with pytest.raises(DataError, match=r"allowed: \*\.jsonl\[\.gz\|\.zst\|\.bz2\|\.xz\], \*\.json"):
        chat_files(make(tmp_path))
