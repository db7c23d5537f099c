"""Finding the files of a source: folders, patterns, links, text that would be read twice, and remarks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nemo_minitron.data.found import find_files, source_files
from nemo_minitron.data.sources import require_read_once
from nemo_minitron.errors import DataError
from nemo_minitron.schema.data import DataSource
from tests.conftest import TOY, Cli


def test_a_folder_is_searched_below_in_sorted_order_without_hidden_and_unknown_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.jsonl.zst", "a/.cache/c.txt", ".hidden.txt", "README.md", "c.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("x")
    assert source_files(tmp_path) == [tmp_path / "a/z.jsonl.zst", tmp_path / "b.txt", tmp_path / "c.parquet"]


def test_a_glob_is_sorted(tmp_path: Path) -> None:
    for name in ("2.txt", "1.txt", "1.jsonl"):
        (tmp_path / name).write_text("x")
    assert source_files(tmp_path / "*.txt") == [tmp_path / "1.txt", tmp_path / "2.txt"]


def texts_in(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).write_text("x")


def test_links_are_followed_and_each_file_is_read_once(tmp_path: Path) -> None:
    texts_in(tmp_path, "text/a.txt", "text/z/b.txt", "elsewhere/deep/c.txt", "lone.txt")
    text = tmp_path / "text"
    (text / "more").symlink_to(tmp_path / "elsewhere")
    (text / "again").symlink_to(text / "z")
    (text / "loop").symlink_to(text)
    (text / "0.txt").symlink_to(text / "a.txt")
    (text / "1.txt").symlink_to(tmp_path / "lone.txt")
    names = ["1.txt", "a.txt", "more/deep/c.txt", "z/b.txt"]
    assert source_files(text) == [text / name for name in names]
    by_glob = source_files(text / "**/*.txt")
    assert sorted(map(os.path.realpath, by_glob)) == sorted(os.path.realpath(text / name) for name in names)


def test_files_that_are_left_out_are_reported(tmp_path: Path) -> None:
    texts_in(
        tmp_path, "a.jsonl", "c4.json.gz", "README.md", "a.jsonl.sha256", "dataset_info.json", "._a.jsonl", "test/b.txt"
    )
    found = find_files(tmp_path)
    assert [file.name for file in found.files] == ["a.jsonl", "c4.json.gz", "b.txt"]
    first, second = found.remarks()
    assert first == f"3 files left out, the first is {tmp_path / 'README.md'}"
    assert second.startswith("1 file named like held-out data")
    assert second.endswith(str(tmp_path / "test/b.txt"))


def test_special_characters_in_names_are_literal(tmp_path: Path) -> None:
    names = ["[old] a*.txt", "\u4e16\u754c.txt", "a b/{x,y}.txt", "Z.txt", "a.txt"]
    texts_in(tmp_path, *names)
    assert source_files(tmp_path) == sorted(tmp_path / name for name in names)
    for name in names:
        assert source_files(tmp_path / name) == [tmp_path / name]


def test_braces_and_double_stars_are_patterns(tmp_path: Path) -> None:
    texts_in(tmp_path, "train/1.txt", "valid/2.txt", "test/3.txt", "train/deep/4.txt")
    assert source_files(tmp_path / "{train,valid}/*.txt") == [tmp_path / "train/1.txt", tmp_path / "valid/2.txt"]
    assert len(source_files(tmp_path / "**/*.txt")) == 4


def test_unreachable_text_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts_in(tmp_path, "a.txt", "closed/b.txt")
    link = tmp_path / "gone.jsonl"
    link.symlink_to(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="link is broken"):
        source_files(tmp_path)
    link.unlink()

    def scandir(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    real = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match="Permission denied"):
        source_files(tmp_path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("x.csv", "Unknown file type .csv."),
        ("nowhere", "There is no text at"),
        ("*.txt", "No file matches"),
        ("*.csv", "of the 1 files at"),
    ],
)
def test_a_source_without_text_names_what_is_allowed(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(DataError) as caught:
        source_files(tmp_path / path)
    assert message in str(caught.value)
    assert "*.jsonl[.gz|.zst|.bz2|.xz]" in str(caught.value)


@pytest.mark.parametrize(("first", "second"), [("x.jsonl", "x.jsonl.zst"), ("d/x.txt.gz", "d/x.txt.xz")])
@pytest.mark.parametrize("pattern", [".", "**"])
def test_a_file_beside_its_compressed_copy_is_refused(tmp_path: Path, first: str, second: str, pattern: str) -> None:
    texts_in(tmp_path, first, second, "e/x.jsonl")
    with pytest.raises(DataError, match=rf"{Path(first).name} and {Path(second).name} are copies of one file"):
        source_files(tmp_path / pattern)
    assert source_files(tmp_path / second) == [tmp_path / second]


def read_once(*sources: DataSource) -> None:
    keys = [f"stages.data.sources.{number}" for number in range(len(sources))]
    require_read_once(sources, [source_files(Path(source.source)) for source in sources], keys)


def test_two_sources_may_not_read_the_same_text(tmp_path: Path) -> None:
    texts_in(tmp_path, "a.jsonl", "b.jsonl", "b.txt", "packed/a.jsonl.gz")
    every, one = DataSource(source=f"{tmp_path}/*.jsonl"), DataSource(source=f"{tmp_path}/b.jsonl")
    with pytest.raises(DataError, match=r"both read b\.jsonl") as caught:
        read_once(every, one)
    assert "stages.data.sources.0, stages.data.sources.1" in str(caught.value)
    read_once(every, one.model_copy(update={"text_field": "title"}), DataSource(source=f"{tmp_path}/packed"))
    (tmp_path / "linked.jsonl").symlink_to(tmp_path / "b.jsonl")
    with pytest.raises(DataError, match="both read"):
        read_once(one, DataSource(source=f"{tmp_path}/linked.jsonl"))
    (tmp_path / "b.jsonl.zst").write_text("x")
    with pytest.raises(DataError, match="both read"):
        read_once(one, DataSource(source=f"{tmp_path}/b.jsonl.zst"))
    text = DataSource(source=f"{tmp_path}/b.txt")
    with pytest.raises(DataError, match="both read"):
        read_once(text, text.model_copy(update={"text_field": "title"}))


def test_a_cache_of_the_hub_is_read_through_its_links(tmp_path: Path) -> None:
    texts_in(tmp_path, "blobs/0123", "blobs/4567", "refs/main")
    names = ("snapshots/rev/data/train.parquet", "snapshots/rev/b.jsonl.zst")
    for name, blob in zip(names, ("0123", "4567"), strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(tmp_path / "blobs" / blob)
    found = find_files(tmp_path)
    assert found.files == [tmp_path / names[1], tmp_path / names[0]]
    assert found.left_out == [tmp_path / "refs/main"]


def test_folders_that_match_a_pattern_are_reported(tmp_path: Path) -> None:
    texts_in(tmp_path, "a.txt", "b/c.txt", "b/d/e.txt")
    found = find_files(tmp_path / "*")
    assert found.files == [tmp_path / "a.txt"]
    (remark,) = found.remarks()
    assert remark.startswith(f"1 folder left out, the first is {tmp_path / 'b'}; end the pattern in /**")
    for pattern in ("**", "**/*", "*.txt"):
        assert list(find_files(tmp_path / pattern).remarks()) == []
    with pytest.raises(DataError, match="Only folders match") as caught:
        find_files(tmp_path / "b*")
    assert "/**" in str(caught.value)


def test_names_of_held_out_data_are_reported_unless_the_source_names_them(tmp_path: Path) -> None:
    texts_in(
        tmp_path, "test-00000-of-00001.parquet", "validation.txt", "testing.txt", "train-00000.parquet", "dev/a.txt"
    )
    names = ["dev/a.txt", "test-00000-of-00001.parquet", "validation.txt"]
    for pattern in (".", "**"):
        assert find_files(tmp_path / pattern).held_out == [tmp_path / name for name in names]
    for pattern in ("test-*.parquet", "dev", "dev/*", "{dev,train}/*.txt", "validation.txt"):
        assert find_files(tmp_path / pattern).held_out == [], pattern


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("csv", "None of the 1 files at"),
        ("empty", "There is no text at"),
        ("csv*", "Only folders match"),
        ("gone", "The link is broken"),
        ("twice", "are copies of one file"),
        ("*.txt", "matches no file"),
        ("nowhere", "there is no such file or folder"),
        ("csv/a.csv", "Unknown file type .csv. "),
    ],
)
def test_check_reports_sources_that_a_stage_cannot_read(
    tmp_path: Path, minitron: Cli, source: str, message: str
) -> None:
    texts_in(tmp_path, "csv/a.csv", "twice/a.jsonl", "twice/a.jsonl.gz")
    (tmp_path / "empty").mkdir()
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone/a.txt").symlink_to(tmp_path / "nowhere")
    code, output = minitron("check", TOY, f"stages.data.sources=[{{source: '{tmp_path / source}'}}]")
    flat = " ".join(output.split())
    assert code == 2, output
    assert f"stages.data.sources.0.source = {tmp_path / source}: " in flat
    assert message in flat
