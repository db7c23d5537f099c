"""Tests of tokenization in pieces: shards, several processes, stops and damage."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.data import pieces, shard_pool
from nemo_minitron.data.shards import RECORD, ShardFolder
from nemo_minitron.errors import DataError, EnvironmentProblem, Interrupted
from nemo_minitron.stages.tokenize.run import SHARDS
from nemo_minitron.system.interrupts import StopRequest
from tests.support.tokenize_stage import contents, run_stage, toy_texts


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduce the size limits, so that a few kB are divided into pieces as hundreds of GB would be."""
    monkeypatch.setattr(pieces, "SMALLEST_BYTES", 4000)
    monkeypatch.setattr(shard_pool, "BYTES_PER_PROCESS", 1)


def text_folder(folder: Path) -> Path:
    """Write one large .jsonl, which is divided into pieces, and small files of other formats."""
    texts = toy_texts()[:120]
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:80]))
    (folder / "b.txt").write_text("\f".join(texts[80:100]))
    (folder / "c.json").write_text(json.dumps([{"text": text} for text in texts[100:]]))
    return folder


def sources_of(folder: Path, **keys: Any) -> list[dict[str, Any]]:
    return [{"source": str(folder), "document_separator": "\f", **keys}]


def made_names(folder: Path) -> dict[str, int]:
    """Return the complete shards with their modification times."""
    return {file.name: file.stat().st_mtime_ns for file in (folder / "work" / SHARDS).glob(f"*{RECORD}")}


class StopAfter(StopRequest):
    """Requests a stop as soon as this many shards exist."""

    def __init__(self, folder: Path, shards: int) -> None:
        super().__init__()
        self.folder, self.shards = folder, shards

    def source(self) -> str | None:
        return "SIGTERM" if len(made_names(self.folder)) >= self.shards else None


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("most", [None, 1, 57, 90, 1000])
def test_processes_and_pieces_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int | None) -> None:
    keys = {} if most is None else {"max_documents": most}
    sources = sources_of(text_folder(tmp_path / "text"), **keys)
    if most == 1:
        with pytest.raises(DataError, match="has 1 document, and none"):
            run_stage(tmp_path / "one", sources, valid_fraction=0.1)
        return
    run_stage(tmp_path / "many", sources, valid_fraction=0.1)
    assert len(made_names(tmp_path / "many")) > 5
    monkeypatch.setattr(pieces, "SMALLEST_BYTES", 1 << 30)
    run_stage(tmp_path / "one", sources, valid_fraction=0.1)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    facts = json.loads(contents(tmp_path / "one")["data.json"])
    assert facts["train"][0]["num_documents"] + facts["valid"][0]["num_documents"] == min(most or 120, 120)


@pytest.mark.usefixtures("small_pieces")
def test_two_processes_write_the_bytes_of_one(tmp_path: Path) -> None:
    sources = sources_of(text_folder(tmp_path / "text"))
    for workers in (1, 2):
        run_stage(tmp_path / str(workers), sources, workers=workers, valid_fraction=0.1)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


@pytest.mark.usefixtures("small_pieces")
def test_a_stop_keeps_finished_shards_and_the_next_start_reads_only_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = sources_of(text_folder(tmp_path / "text"))
    run_stage(tmp_path / "whole", sources, valid_fraction=0.1)
    made: list[str] = []
    make = ShardFolder.make

    def counted(self: ShardFolder, task: Any, *rest: Any) -> Any:
        made.append(task.name)
        return make(self, task, *rest)

    monkeypatch.setattr(ShardFolder, "make", counted)
    folder = tmp_path / "stopped"
    (folder / "work").mkdir(parents=True)
    for shards in (1, 3, 4):
        with pytest.raises(Interrupted, match="as requested by SIGTERM"):
            run_stage(folder, sources, stop=StopAfter(folder, shards), valid_fraction=0.1)
    run_stage(folder, sources, valid_fraction=0.1)
    assert contents(folder) == contents(tmp_path / "whole")
    assert sorted(set(made)) == sorted(name.removesuffix(RECORD) for name in made_names(folder))
    assert len(made) == len(set(made)), "a finished shard is not made again"


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("damage", ["cut", "record", "source", "partial"])
def test_an_invalid_shard_is_made_again(tmp_path: Path, damage: str) -> None:
    text = text_folder(tmp_path / "text")
    run_stage(tmp_path, sources_of(text), valid_fraction=0.1)
    before, whole = made_names(tmp_path), contents(tmp_path)
    name = sorted(before)[0]
    record = tmp_path / "work" / SHARDS / name
    if damage == "cut":
        os.truncate(record.with_name(name.removesuffix(RECORD) + ".ids"), 3)
    elif damage == "record":
        record.write_text(record.read_text().replace('num_documents": 1', 'num_documents": 2'))
    elif damage == "partial":
        record.unlink()
    else:
        os.utime(text / "a.jsonl", ns=(1, 1))
    run_stage(tmp_path, sources_of(text), valid_fraction=0.1)
    again = {other for other, made in made_names(tmp_path).items() if before[other] != made}
    spans_of_a = {other for other in before if json.loads((record.parent / other).read_text())["made_from"]["span"]}
    assert again == (spans_of_a if damage == "source" else {name})
    assert contents(tmp_path) == whole


def break_row(file: Path, line: int) -> None:
    """Replace a line, counted from 1, with broken JSON."""
    lines = file.read_text().splitlines(keepends=True)
    lines[line - 1] = "{\n"
    file.write_text("".join(lines))


@pytest.mark.usefixtures("small_pieces")
def test_a_bad_row_is_reported_with_its_line_in_the_whole_file(tmp_path: Path) -> None:
    text = text_folder(tmp_path / "text")
    break_row(text / "a.jsonl", 61)
    with pytest.raises(DataError, match=rf"{text}/a\.jsonl:61"):
        run_stage(tmp_path / "out", sources_of(text), workers=2, valid_fraction=0.1)
    # Text beyond max_documents is not read.
    result = run_stage(tmp_path / "limited", sources_of(text, max_documents=60), valid_fraction=0.1)
    assert result["train_num_documents"] + result["valid_num_documents"] == 60
    with pytest.raises(DataError, match=rf"{text}/a\.jsonl:61"):
        run_stage(tmp_path / "more", sources_of(text, max_documents=61), valid_fraction=0.1)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("max_documents", [3, 100])
def test_a_bad_row_in_the_first_piece_is_reported_before_the_others_are_tokenized(
    tmp_path: Path, max_documents: int
) -> None:
    text = text_folder(tmp_path / "text")
    (text / "a.jsonl").write_text('{"text": "good"}\n{\n' + (text / "a.jsonl").read_text())
    with pytest.raises(DataError, match=rf"{text}/a\.jsonl:2"):
        run_stage(tmp_path, sources_of(text, max_documents=max_documents), valid_fraction=0.1)
    assert made_names(tmp_path) == {}


@pytest.mark.usefixtures("small_pieces")
def test_a_bad_row_in_a_later_piece_is_reported_before_those_after_it_are_tokenized(tmp_path: Path) -> None:
    text = text_folder(tmp_path / "text")
    break_row(text / "a.jsonl", 21)
    with pytest.raises(DataError, match=rf"{text}/a\.jsonl:21"):
        run_stage(tmp_path / "out", sources_of(text, max_documents=110), valid_fraction=0.1)
    with pytest.raises(DataError, match=rf"{text}/a\.jsonl:21"):
        run_stage(tmp_path / "whole", sources_of(text), valid_fraction=0.1)
    assert made_names(tmp_path / "out").keys() == made_names(tmp_path / "whole").keys() != set()


def die(*_: object) -> None:
    os._exit(9)


@pytest.mark.usefixtures("small_pieces")
def test_a_killed_process_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_pool, "_make_in_worker", die)
    with pytest.raises(EnvironmentProblem, match=r"killed(.|\n)*execution\.workers"):
        run_stage(tmp_path, sources_of(text_folder(tmp_path / "text")), workers=2)
