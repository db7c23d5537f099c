"""The folder of a run: published stages, work folders, the lock."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts.manifest import Manifest, hash_files, read_manifest, sha256_of, write_manifest
from nemo_minitron.artifacts.types import Artifact, Inputs
from nemo_minitron.errors import ArtifactError

_WORK, _SUPERSEDED, _PARTIAL = ".work", ".superseded", ".partial-"
_LOCK, _ACCEPTED, _WORK_IDENTITY = ".lock", "accepted_drift.json", "fingerprint"


class Store:
    """Paths and states of one run: `<run_root>/<recipe name>/`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def published(self, stage: str) -> Path:
        return self.root / stage

    def manifest(self, stage: str) -> Manifest | None:
        """The manifest of a finished stage, or None."""
        return read_manifest(self.published(stage))

    def artifact(self, stage: str) -> Artifact:
        """The output of a finished stage.

        Raises:
            ArtifactError: not finished, or its files are gone or of another size.
        """
        manifest = self.manifest(stage)
        if manifest is None:
            raise ArtifactError(f"Stage {stage} has not finished.", where=str(self.published(stage)))
        self.verify(stage, manifest, full=False)
        path = Path(manifest.result.get("adopted_path", self.published(stage)))
        return Artifact(stage, manifest.kind, path, manifest.fingerprint, manifest.result, manifest.provenance)

    def inputs(self, names: Mapping[str, Any]) -> Inputs:
        """Load every artifact that a stage reads."""
        single = {role: self.artifact(name) for role, name in names.items() if isinstance(name, str)}
        groups = {}
        for role, value in names.items():
            if isinstance(value, Mapping):
                groups[role] = {label: self.artifact(name) for label, name in value.items()}
            elif not isinstance(value, str):
                groups[role] = {name: self.artifact(name) for name in value}
        return Inputs(single, groups)

    def verify(self, stage: str, manifest: Manifest, *, full: bool) -> None:
        """Compare the files with the manifest: sizes, and contents too when `full`.

        Raises:
            ArtifactError: naming the first file that differs.
        """
        for name, facts in manifest.files.items():
            file = self.published(stage) / name
            size = file.stat().st_size if file.is_file() else None
            if size != facts["bytes"] or (full and sha256_of(file) != facts["sha256"]):
                problem = "is missing" if size is None else "was changed or damaged after the stage finished"
                raise ArtifactError(
                    f"{name} of stage {stage} {problem}.",
                    where=str(file),
                    next_step=f"Make it again with --rerun {stage}, or restore the file.",
                )

    def require_room(self, stages: Iterable[str]) -> None:
        """Outputs can be put where they belong; asked before hours of work, not after.

        Raises:
            ArtifactError: this run lies inside a stage of another run, or another run (or anything else) lies where
                the output of a stage goes.
        """
        if read_manifest(self.root) is not None:
            raise _in_the_way("This folder is the output of a stage of another run.", self.root)
        for stage in stages:
            folder = self.published(stage)
            if self.manifest(stage) is None and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
                what = "the folder of another run" if (folder / _LOCK).exists() else "something that no stage made"
                raise _in_the_way(f"Where the output of stage {stage} goes, there is {what}.", folder)

    # --- publishing ---------------------------------------------------------------------------

    @contextmanager
    def building(self, stage: str) -> Iterator[Path]:
        """A fresh folder to write into; it disappears unless `publish` takes it."""
        folder = self.root / f"{_PARTIAL}{stage}-{os.getpid()}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def publish(self, stage: str, folder: Path, manifest: Manifest) -> None:
        """Hash the files, write the manifest last, and rename the folder to its final name."""
        complete = Manifest(**{**vars(manifest), "files": hash_files(folder)})
        write_manifest(folder, complete)
        folder.rename(self.published(stage))
        shutil.rmtree(self.work(stage), ignore_errors=True)

    def supersede(self, stage: str) -> None:
        """Move a published stage out of the way; nothing is deleted."""
        self._move_away(self.published(stage), stage)

    def remove_leftovers(self) -> None:
        """Delete folders of runners that were killed while they wrote."""
        for folder in self.root.glob(f"{_PARTIAL}*"):
            shutil.rmtree(folder, ignore_errors=True)

    def _move_away(self, folder: Path, stage: str) -> None:
        if not folder.exists():
            return
        target = self.root / _SUPERSEDED
        target.mkdir(parents=True, exist_ok=True)
        number = sum(1 for _ in target.glob(f"{stage}-*")) + 1
        folder.rename(target / f"{stage}-{number}")

    # --- work folders -------------------------------------------------------------------------

    def work(self, stage: str) -> Path:
        return self.root / _WORK / stage

    def open_work(self, stage: str, fingerprint: str) -> Path:
        """The stage's work folder; one that was begun for something else is moved away."""
        folder = self.work(stage)
        identity = folder / _WORK_IDENTITY
        if folder.exists() and not (identity.is_file() and identity.read_text() == fingerprint):
            self._move_away(folder, f"work-{stage}")
        folder.mkdir(parents=True, exist_ok=True)
        self.claim_work(folder, fingerprint)
        return folder

    @staticmethod
    def claim_work(folder: Path, fingerprint: str) -> None:
        """Say for what the contents of a work folder were begun."""
        (folder / _WORK_IDENTITY).write_text(fingerprint)

    # --- accepted drift -----------------------------------------------------------------------

    def accepted_drift(self) -> dict[str, str]:
        """fingerprint asked for -> fingerprint on disk that the user accepted for it."""
        file = self.root / _ACCEPTED
        return dict(json.loads(file.read_text())) if file.is_file() else {}

    def accept_drift(self, asked: str, found: str) -> None:
        accepted = {**self.accepted_drift(), asked: found}
        (self.root / _ACCEPTED).write_text(json.dumps(accepted, indent=2) + "\n")

    # --- lock ---------------------------------------------------------------------------------

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held while a runner works in this folder; freed by the system when it dies.

        Raises:
            ArtifactError: another runner holds it.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / _LOCK).open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise ArtifactError(
                    f"Another runner works on this run: {file.read().strip() or 'unknown process'}.",
                    where=str(self.root),
                    next_step="Wait for it (`minitron status RECIPE`), or give this run another name: name=...",
                ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}: {' '.join(sys.argv)}\n")
            file.flush()
            yield


def _in_the_way(problem: str, where: Path) -> ArtifactError:
    return ArtifactError(
        problem, where=str(where), next_step="Move that folder away, or give this run another name: name=..."
    )
