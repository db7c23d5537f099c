"""Tests of reading text files: formats, compressions, finding files, errors."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from nemo_minitron.data import blocks
from nemo_minitron.data.readers import read_documents, require_separator_is_used
from nemo_minitron.errors import DataError
from nemo_minitron.schema.data import DataSource

TEXTS = ["One.\nTwo.", "caf\u00e9 \u4e16\u754c \U0001f642", " three "]
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": lambda data: gzip.compress(data, 1, mtime=0),
    ".zst": zstandard.ZstdCompressor().compress,
    ".bz2": bz2.compress,
    ".xz": lambda data: lzma.compress(data, preset=0),
}


def read(file: Path, **source: object) -> list[str]:
    return [text.text for text in read_documents(file, DataSource(source=str(file), **source))]  # type: ignore[arg-type]


def problem(file: Path, **source: object) -> str:
    with pytest.raises(DataError) as caught:
        read(file, **source)
    return str(caught.value)


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text, "id": 1}, ensure_ascii=False) + "\n" for text in texts).encode()


def parquet(column: list[object], name: str = "text") -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({name: column, "id": list(range(len(column)))}), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("compression", PACK)
@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        ("x.txt", "\f".join(TEXTS).encode(), {"document_separator": "\f"}),
        ("x.jsonl", jsonl(TEXTS), {}),
        ("x.json", jsonl(TEXTS), {}),
        ("x.parquet", parquet(list(TEXTS)), {}),
    ],
)
def test_every_format_and_compression_gives_the_same_documents(
    tmp_path: Path, name: str, content: bytes, options: dict[str, str], compression: str
) -> None:
    file = tmp_path / (name + compression)
    file.write_bytes(PACK[compression](content))
    assert read(file, **options) == TEXTS


def test_a_txt_without_separator_is_one_document_with_unix_line_ends(tmp_path: Path) -> None:
    file = tmp_path / "x.TXT"
    file.write_bytes(b"\xef\xbb\xbfa\r\nb\r\n")
    assert read(file) == ["a\nb\n"]


def test_a_byte_order_mark_is_skipped_in_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + jsonl(["a"]))
    assert read(file) == ["a"]


@pytest.mark.parametrize("separator", ["\n---\n", "\r\n---\r\n", "\r---\r"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_line_ends_of_a_separator_are_normalized(tmp_path: Path, separator: str, line_end: str) -> None:
    file = tmp_path / "x.txt"
    file.write_bytes(f"{line_end}---{line_end}".join(["", "one", "two.*", ""]).encode())
    assert read(file, document_separator=separator) == ["one", "two.*"]
    assert read(file, document_separator=".*") == ["\n---\none\n---\ntwo", "\n---\n"]


def test_a_separator_without_a_txt_is_refused(tmp_path: Path) -> None:
    source = DataSource(source="x", document_separator="\n")
    with pytest.raises(DataError, match=r"document_separator splits only \.txt files"):
        require_separator_is_used([tmp_path / "x.jsonl"], source, "stages.data.sources.0")
    require_separator_is_used([tmp_path / "x.jsonl", tmp_path / "y.txt.gz"], source, "stages.data.sources.0")


@pytest.mark.parametrize(
    "content",
    [b'[{"text": "a"}, {"text": null}, {"text": "b"}]', b'[\n{"text": "a"},\n{"text": "b"}\n]', jsonl(["a", "b"])],
)
def test_json_is_a_list_or_one_row_per_line(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "c4.00000-of-00001.json.gz"
    file.write_bytes(gzip.compress(content))
    assert read(file) == ["a", "b"]
    file.write_bytes(gzip.compress(b'\xef\xbb\xbf{\n "text":\n "one row"\n}\n'))
    assert read(file) == ["one row"]


def test_a_field_inside_another_one_is_read(tmp_path: Path) -> None:
    rows, table = tmp_path / "x.jsonl", tmp_path / "x.parquet"
    rows.write_bytes(b'{"a": {"b": "one"}}\n{"a": null}\n{"a": {"b": null}}\n{"a.b": "two"}\n')
    pq.write_table(pa.table({"a": [{"b": "one", "c": 1}, None, {"b": "two", "c": 2}]}), table)
    assert read(rows, text_field="a.b") == read(table, text_field="a.b") == ["one", "two"]
    assert "no field 'a.c'" in problem(rows, text_field="a.c")
    assert "no column 'a.d'" in problem(table, text_field="a.d")
    assert "is int64, not text" in problem(table, text_field="a.c")


def test_a_json_list_can_be_longer_than_a_line_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINITRON_MAX_LINE_BYTES", "100")
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 50)
    texts = ["word " * 30, "b"]
    file = tmp_path / "x.json"
    for start in (b"", b"\xef\xbb\xbf", b" \n" * 40):
        file.write_bytes(start + json.dumps([{"text": text} for text in texts]).encode())
        assert read(file) == texts
    file.write_bytes(jsonl(texts))
    assert "A line has more than 100 bytes" in problem(file)


def test_an_error_in_a_json_list_has_its_line(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(b'[\n{"text": "a"},\n{"text": b}\n]\n')
    output = problem(file)
    assert "Not JSON: Expecting value at column 10." in output
    assert f"{file}:3" in output


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["a", None, "b"], pa.large_string()),
        pa.array(["a", "b", "a"]).dictionary_encode(),
        pa.array([b"a", None, b"b"]),
        *([pa.array(["a", None, "b"], pa.string_view())] if hasattr(pa, "string_view") else []),
        *([pa.array([b"a", None, b"b"], pa.binary_view())] if hasattr(pa, "binary_view") else []),
    ],
)
def test_text_columns_of_every_type_are_read(tmp_path: Path, column: pa.Array) -> None:
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": column}), file)
    assert set(read(file)) == {"a", "b"}


def test_a_column_of_bytes_that_are_not_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": [b"\xff\xfe"]}), file)
    assert str(file) in problem(file)


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 5, 64])
def test_documents_do_not_depend_on_where_blocks_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)
    separator = "\n===\n"
    documents = ["a==\n==b", "\u4e16\u754c", "last\n"]
    txt, rows = tmp_path / "x.txt", tmp_path / "x.jsonl"
    txt.write_text(separator.join(documents), encoding="utf-8")
    rows.write_bytes(jsonl(documents))
    assert read(txt, document_separator=separator) == documents
    assert read(rows) == documents


def test_blank_and_null_documents_are_left_out(tmp_path: Path) -> None:
    rows, table = tmp_path / "x.jsonl", tmp_path / "x.parquet"
    rows.write_bytes(b'{"text": " \\n"}\n\n{"text": null}\n{"text": "a"}')
    table.write_bytes(parquet(["", None, "a"]))
    assert read(rows) == read(table) == ["a"]


def test_all_frames_of_a_zstd_file_are_read(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl.zst"
    file.write_bytes(PACK[".zst"](jsonl(["a"])) + PACK[".zst"](b"") + PACK[".zst"](jsonl(["b"])))
    assert read(file) == ["a", "b"]


def test_positions_grow_to_the_size_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl.gz"
    file.write_bytes(gzip.compress(jsonl([str(number) * 50 for number in range(500)])))
    positions = [text.position_bytes for text in read_documents(file, DataSource(source="x"))]
    assert positions == sorted(positions)
    assert positions[-1] == file.stat().st_size


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, compression: str) -> None:
    file = tmp_path / f"x.txt{compression}"
    documents = random.Random(0)
    content = "\f".join(documents.randbytes(10_000).hex() for _ in range(1_000))
    file.write_bytes(PACK[compression](content.encode()))
    tracemalloc.start()
    count = sum(1 for _ in read_documents(file, DataSource(source="x", document_separator="\f")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 1_000
    assert peak < 10e6, "of 20 MB of text"


# --- bad files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_bytes", [1, 4, 1 << 20])
@pytest.mark.parametrize(
    ("name", "content", "line", "offset"),
    [
        ("x.txt", b"ab\ncd\xe9 e", 2, 5),
        ("x.txt", "a\n\u4e16\n".encode() + b"\xff", 3, 6),
        ("x.txt", b"\xef\xbb\xbfab\xff", 1, 5),
        ("x.txt", b"abc\n\xe4\xb8", 2, 4),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', 2, 24),
        ("x.jsonl", b'\xef\xbb\xbf{"text": "\xff"}\n', 1, 13),
    ],
)
def test_bad_encoding_is_reported_with_line_and_byte(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: bytes,
    line: int,
    offset: int,
    block_bytes: int,
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)
    file = tmp_path / name
    file.write_bytes(content)
    output = problem(file)
    assert f"byte 0x{content[offset]:02x} at offset {offset} " in output
    assert f"{file}:{line}" in output
    assert "iconv" in output


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b'{"text": "a', "Not JSON: Unterminated string"),
        (b'{"body": "a", "id": 1}', "no field 'text'"),
        (b'["a"]', "it is a list"),
        (b'{"text": 5}', "is int, not text"),
        (b'{"text": "\\ud800"}', "an unpaired surrogate"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"text": "a", "id": ' + b"1" * 5000 + b"}", "cannot be read"),
        (b'{"text": ["a"]}', "is list, not text"),
    ],
)
def test_a_bad_jsonl_row_is_reported_with_its_line(tmp_path: Path, row: bytes, message: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(jsonl(["good"]) + row + b"\n")
    output = problem(file)
    assert message in output
    assert f"{file}:2" in output


def test_a_missing_field_error_lists_the_existing_fields(tmp_path: Path) -> None:
    rows, table = tmp_path / "x.jsonl", tmp_path / "x.parquet"
    rows.write_bytes(b'{"body": "a", "id": 1}\n')
    table.write_bytes(parquet(["a"], name="body"))
    assert "body, id" in problem(rows)
    assert "body, id" in problem(table)
    assert read(rows, text_field="body") == read(table, text_field="body") == ["a"]


def test_a_parquet_column_that_is_not_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    file.write_bytes(parquet([1, 2]))
    assert "Column 'text' is int64, not text." in problem(file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"", "is empty"),
        ("x.jsonl", b" \n\n", "holds no text"),
        ("x.jsonl.gz", gzip.compress(b"", mtime=0), "holds no text"),
        ("x.parquet", parquet([""]), "holds no text"),
        ("x.parquet", b"", "Not a readable parquet file"),
        ("x.parquet", b"PAR1 and nothing of the kind", "Not a readable parquet file"),
        ("x.txt.gz", b"not gzip at all", "damaged"),
        ("x.txt.gz", gzip.compress(b"text " * 99, mtime=0)[:-9], "damaged"),
        ("x.txt.bz2", b"not bz2 at all", "damaged"),
        ("x.txt.bz2", bz2.compress(b"text " * 99)[:-9], "damaged"),
        ("x.txt.xz", b"not xz at all", "damaged"),
        ("x.txt.xz", lzma.compress(b"text " * 99)[:-9], "damaged"),
        ("x.json", b"[]", "holds no text"),
        ("x.txt", "text".encode("utf-16"), "UTF-16"),
        ("x.txt", "text".encode("utf-16-le"), "UTF-16"),
        ("x.jsonl", jsonl(["a"]).decode().encode("utf-16"), "UTF-16"),
        ("x.json", jsonl(["a"]).decode().encode("utf-16-le"), "UTF-16"),
        ("x.json", b'{"text": "a"', "Not JSON"),
        ("x.json", b'"text"', "no field 'text'"),
        ("x.txt.zst", b"not zstd at all", "damaged"),
        ("x.txt.zst", PACK[".zst"](b"text " * 99)[:-4], "damaged: it ends in the middle"),
    ],
)
def test_a_file_without_readable_text_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    output = problem(file)
    assert message in output
    assert str(file) in output
