"""Bad training text, from the command line: one message that names the place, and no half-written dataset."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import zstandard

from tests.conftest import TOY, Cli

GOOD = "".join(json.dumps({"text": f"Row {number}."}) + "\n" for number in range(300)).encode()


@dataclass(frozen=True)
class Bad:
    """A faulty text and the expected error."""

    what: str
    write: Callable[[Path], object]
    """Function that fills a folder with text."""
    source: str
    """Source, relative to that folder."""
    message: tuple[str, ...]
    options: str = ""


def _mixed(folder: Path) -> None:
    """Write a valid file before the faulty one, so that the error occurs after documents have been written."""
    (folder / "a.jsonl").write_bytes(GOOD)
    (folder / "b.jsonl").write_bytes(b'{"text": "good"}\n{"text": "\xe9"}\n')


TABLE = (
    Bad("a bad file after a good one", _mixed, ".", ("b.jsonl:2", "byte 0xe9 at offset 27", "iconv")),
    Bad(
        "a download that stopped",
        lambda folder: (folder / "x.jsonl.zst").write_bytes(zstandard.compress(GOOD)[:-20]),
        "x.jsonl.zst",
        ("The compressed file is damaged", "x.jsonl.zst", "download it again"),
    ),
    Bad(
        "a damaged gzip",
        lambda folder: (folder / "x.jsonl.gz").write_bytes(gzip.compress(GOOD)[:200]),
        "x.jsonl.gz",
        ("The compressed file is damaged", "x.jsonl.gz"),
    ),
    Bad("an empty folder", lambda folder: None, ".", ("There is no text at", "*.jsonl[.gz|.zst|.bz2|.xz]")),
    Bad(
        "an unknown type",
        lambda folder: (folder / "x.csv").write_text("a,b"),
        "x.csv",
        ("Unknown file type .csv.", "*.parquet[.gz|.zst|.bz2|.xz]"),
    ),
    Bad("a glob without matches", lambda folder: None, "*.jsonl", ("matches no file", "*.jsonl")),
    Bad(
        "one document, none to hold out",
        lambda folder: (folder / "x.txt").write_text("All of it."),
        "x.txt",
        ("has 1 document, and none of them is left for", "stages.data.sources.0", "document_separator"),
    ),
    Bad(
        "no column of that name",
        lambda folder: (folder / "x.jsonl").write_bytes(GOOD),
        "x.jsonl",
        ("The row has no field 'body'.", "x.jsonl:1", "fields of this row: text", "Set text_field"),
        ", text_field: body",
    ),
)


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.what)
def test_bad_text_gets_one_clear_message(bad: Bad, minitron: Cli, tmp_path: Path) -> None:
    text, root = tmp_path / "text", tmp_path / "runs"
    text.mkdir()
    bad.write(text)
    source = f"stages.data.sources=[{{source: '{text / bad.source}'{bad.options}}}]"
    code, output = minitron("run", TOY, f"execution.run_root={root}", "name=bad", source, "--until", "data")
    assert code == 2, output
    assert "Traceback" not in output
    assert output.count("error:") == 1
    flat = " ".join(output.split())
    for words in bad.message:
        assert words in flat
    assert not (root / "bad" / "data").exists()
    assert not list((root / "bad").rglob("*.bin"))
