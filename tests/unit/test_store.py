"""Publishing of stages, work folders and the run lock."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.artifacts.manifest import Manifest, _git_commit
from nemo_minitron.artifacts.store import Store
from nemo_minitron.errors import ArtifactError


def _publish(store: Store, stage: str = "prune", text: str = "weights") -> None:
    with store.building(stage) as folder:
        (folder / "file.txt").write_text(text)
        store.publish(stage, folder, Manifest("r", stage, stage, "f" * 64, {}, {}, {"num_params": 3}))


def test_a_published_stage_has_its_files_with_hashes(tmp_path: Path) -> None:
    store = Store(tmp_path)
    _publish(store)
    artifact = store.artifact("prune")
    assert artifact.path == tmp_path / "prune"
    assert artifact.result == {"num_params": 3}
    manifest = store.manifest("prune")
    assert manifest is not None
    # sha256 of the seven bytes "weights".
    assert manifest.files["file.txt"]["bytes"] == 7
    assert not list(tmp_path.glob(".partial-*"))


def test_a_failed_stage_leaves_no_files(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def fail() -> None:
        with store.building("prune") as folder:
            (folder / "half.txt").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_full_verification_finds_a_change_that_keeps_the_size(tmp_path: Path) -> None:
    store = Store(tmp_path)
    _publish(store)
    (tmp_path / "prune/file.txt").write_text("weightz")
    manifest = store.manifest("prune")
    assert manifest is not None
    store.verify("prune", manifest, "sizes")
    with pytest.raises(ArtifactError, match="changed or damaged"):
        store.verify("prune", manifest, "all")


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    _publish(store)
    (tmp_path / "prune/manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match="manifest is damaged"):
        store.artifact("prune")


def test_a_work_folder_of_another_fingerprint_is_moved_away(tmp_path: Path) -> None:
    store = Store(tmp_path)
    work = store.open_work("distill", "one")
    (work / "checkpoint").write_text("of one")
    assert (store.open_work("distill", "one") / "checkpoint").is_file()
    assert not (store.open_work("distill", "two") / "checkpoint").exists()
    assert (tmp_path / ".superseded/work-distill-1/checkpoint").read_text() == "of one"


def test_superseded_outputs_are_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for text in ("a", "b"):
        _publish(store, text=text)
        store.supersede("prune")
    kept = [(tmp_path / f".superseded/prune-{n}/file.txt").read_text() for n in (1, 2)]
    assert kept == ["a", "b"]


def test_a_deleted_superseded_output_frees_no_number(tmp_path: Path) -> None:
    store, kept = Store(tmp_path), tmp_path / ".superseded"
    for _ in range(2):
        _publish(store)
        store.supersede("prune")
        store.open_work("prune", "f").joinpath("checkpoint").touch()
        store.open_work("prune", "g")
    shutil.rmtree(kept / "prune-1")
    shutil.rmtree(kept / "work-prune-1")
    (kept / "prune-random-7").mkdir()  # of a stage with a longer name
    _publish(store)
    store.supersede("prune")
    for fingerprint in ("f", "g"):
        store.open_work("prune", fingerprint)
    assert {"prune-2", "prune-3", "work-prune-2", "work-prune-3"} <= {folder.name for folder in kept.iterdir()}
    assert "prune-8" not in {folder.name for folder in kept.iterdir()}


def test_accepted_drift_is_recorded(tmp_path: Path) -> None:
    Store(tmp_path).accept_drift("asked", "found")
    assert Store(tmp_path).accepted_drift() == {"asked": "found"}
    assert json.loads((tmp_path / "accepted_drift.json").read_text()) == {"asked": "found"}


def test_only_one_runner_holds_the_lock_and_it_is_freed_when_the_runner_dies(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.lock(), pytest.raises(ArtifactError, match="Another runner works on this run: process"), store.lock():
        pass
    with store.lock():
        pass


def test_another_run_in_an_output_path_is_found_before_the_stages_run(tmp_path: Path) -> None:
    outer, inner = Store(tmp_path), Store(tmp_path / "teacher")
    with inner.lock():
        _publish(inner)
    with pytest.raises(ArtifactError, match="stage teacher is taken by the folder of another run") as caught:
        outer.require_free_paths(["data", "teacher"])
    assert str(tmp_path / "teacher") in str(caught.value)
    outer.require_free_paths(["data"])


def test_a_run_inside_a_stage_of_another_run_is_refused(tmp_path: Path) -> None:
    outer = Store(tmp_path)
    _publish(outer, "teacher")
    outer.require_free_paths(["teacher"])
    with pytest.raises(ArtifactError, match="output of a stage of another run"):
        Store(tmp_path / "teacher").require_free_paths(["data"])


def test_user_files_are_not_overwritten_and_empty_folders_are(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (tmp_path / "prune").mkdir()
    store.require_free_paths(["prune"])
    (tmp_path / "prune/notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="files that no stage wrote"):
        store.require_free_paths(["prune"])


@pytest.mark.parametrize("target", ["elsewhere", "missing"])
def test_a_link_as_output_path_is_refused_before_the_stages_run(target: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "run")
    store.root.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (store.root / "prune").symlink_to(tmp_path / target)
    with pytest.raises(ArtifactError, match="prune is a link to"):
        store.require_free_paths(["prune"])


def test_only_files_that_a_manifest_lists_are_intact(tmp_path: Path) -> None:
    store = Store(tmp_path)
    _publish(store)
    assert store.intact("prune", "file.txt") == tmp_path / "prune/file.txt"
    (tmp_path / "prune/file.txt").write_text("weightz")
    assert store.intact("prune", "file.txt") is None
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/file.txt").write_text("mine")
    assert store.intact("notes", "file.txt") is None


def test_the_commit_is_that_of_the_packages_own_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is installed below another repository, as in a user's `.venv`, has no commit."""

    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *who, *words], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    git("init", "-q")
    (tmp_path / "site/nemo_minitron").mkdir(parents=True)
    (tmp_path / "site/nemo_minitron/file.py").touch()
    git("add", ".")
    git("commit", "-q", "-m", "first")
    assert _git_commit(tmp_path) == git("rev-parse", "HEAD").strip()
    assert _git_commit(tmp_path / "site") is None
    (tmp_path / "new.py").touch()
    assert _git_commit(tmp_path) == git("rev-parse", "HEAD").strip() + "+"

    def never_ends(command: list[str], **options: Any) -> None:
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(subprocess, "run", never_ends)
    assert _git_commit(tmp_path) is None
