"""Run folder: published stages, work folders and locks."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from math import inf
from pathlib import Path
from typing import IO, Any, Literal

from nemo_minitron.artifacts.compared import changed_file
from nemo_minitron.artifacts.manifest import Manifest, file_facts, hash_files, read_manifest, write_manifest
from nemo_minitron.artifacts.run_paths import ACCEPTED_DRIFT, COMPARED, LOCK, PARTIAL, SUPERSEDED, WORK, RunPaths
from nemo_minitron.artifacts.types import Artifact, ArtifactsByRole
from nemo_minitron.errors import ArtifactError
from nemo_minitron.system.disclosure import masked_command
from nemo_minitron.system.files import read_json, write_whole
from nemo_minitron.system.ownership import require_own, require_own_tree, work_mode
from nemo_minitron.system.safe_files import ROOT_MODE, TEMPORARY, open_lock, own_folder, require_real_folder

_CHANGED = "was changed or damaged after the stage finished"
LOCK_POLL_S = 1.0
_WORK_IDENTITY = "fingerprint"
SMALL_BYTES = 64 << 20
"""Size limit for the `small` level of verification."""
Contents = Literal["sizes", "small", "unverified", "all"]
"""Files whose contents are compared with the manifest, in addition to the sizes of all files: none; small files that
have changed since they were last verified; all files that have changed since then; all files."""


class Store:
    """Paths and states in one run folder, `<run_root>/<recipe name>/`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def paths(self) -> RunPaths:
        """Paths of the files in the run folder."""
        return RunPaths(self.root)

    def published(self, stage: str) -> Path:
        return self.paths.published(stage)

    def manifest(self, stage: str) -> Manifest | None:
        """Return the manifest of a finished stage, or None."""
        return read_manifest(self.published(stage))

    def artifact(self, stage: str, contents: Contents = "sizes") -> Artifact:
        """Verify and return the output of a finished stage.

        Raises:
            ArtifactError: the stage has not finished, or its files are missing or have other sizes or contents.
        """
        manifest = self.manifest(stage)
        if manifest is None:
            raise ArtifactError(
                f"Stage {stage} has not finished, or its folder is gone.",
                where=str(self.published(stage)),
                next_step="Put the folder back, or run the same command again to run the stage.",
            )
        self.verify(stage, manifest, contents)
        path = Path(manifest.result.get("adopted_path", self.published(stage)))
        return Artifact(
            stage=stage,
            kind=manifest.kind,
            path=path,
            fingerprint=manifest.fingerprint,
            result=manifest.result,
            provenance=manifest.provenance,
            inputs=manifest.inputs,
        )

    def intact(self, stage: str, name: str) -> Path | None:
        """Return the path of a small file of a finished stage; None if it is missing or differs from the manifest."""
        file, manifest = self.published(stage) / name, self.manifest(stage)
        if manifest is None or not file.is_file():
            return None
        return file if file_facts([file])[file] == manifest.files.get(name) else None

    def inputs(self, names: Mapping[str, Any], contents: Contents = "sizes") -> ArtifactsByRole:
        """Verify and return every artifact that a stage reads.

        Raises:
            ArtifactError: see `artifact`.
        """
        single = {role: self.artifact(name, contents) for role, name in names.items() if isinstance(name, str)}
        groups = {}
        for role, value in names.items():
            if isinstance(value, Mapping):
                groups[role] = {label: self.artifact(name, contents) for label, name in value.items()}
            elif not isinstance(value, str):
                groups[role] = {name: self.artifact(name, contents) for name in value}
        return ArtifactsByRole(single, groups)

    def verify(self, stage: str, manifest: Manifest, contents: Contents) -> None:
        """Compare the sizes and some contents of the files with the manifest, including those of an adopted model.

        Raises:
            ArtifactError: names the first file that differs.
        """
        listed = {**manifest.files, **manifest.result.get("adopted_files", {})}
        files = {self.published(stage) / name: facts for name, facts in listed.items()}
        for file, facts in files.items():
            if not file.is_file():
                raise _unusable(file, stage, "is missing")
            if file.stat().st_size != facts["bytes"]:
                raise _unusable(file, stage, _CHANGED)
        if contents == "all":
            found = file_facts(files)
            bad = next((file for file, facts in files.items() if found[file]["sha256"] != facts["sha256"]), None)
        else:
            most = {"sizes": -1, "small": SMALL_BYTES, "unverified": inf}[contents]
            read = {file: facts for file, facts in files.items() if facts["bytes"] <= most}
            bad = changed_file(read, self.root / COMPARED / f"{stage}.json")
        if bad is not None:
            raise _unusable(bad, stage, _CHANGED)

    def require_free_paths(self, stages: Iterable[str]) -> None:
        """Check, before the stages run, that the paths of their outputs are free.

        Raises:
            ArtifactError: this run folder is inside a stage of another run, or an output path is a link or occupied by
                another run or by other files.
        """
        if read_manifest(self.root) is not None:
            raise _path_taken("This folder is the output of a stage of another run.", self.root)
        for stage in stages:
            folder = self.published(stage)
            if self.manifest(stage) is not None:
                continue
            require_real_folder(folder)
            if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
                what = "the folder of another run" if (folder / LOCK).exists() else "files that no stage wrote"
                raise _path_taken(f"The output path of stage {stage} is taken by {what}.", folder)

    # --- publishing ---------------------------------------------------------------------------

    @contextmanager
    def building(self, stage: str) -> Iterator[Path]:
        """Create an empty folder for the output of a stage, and delete it at the end unless `publish` renamed it."""
        name = f"{PARTIAL}{stage}-{os.getpid()}"
        shutil.rmtree(self.root / name, ignore_errors=True)
        self.root.mkdir(mode=ROOT_MODE, parents=True, exist_ok=True)
        folder = self.root / name
        require_real_folder(folder)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def publish(self, stage: str, folder: Path, manifest: Manifest) -> None:
        """Hash the files, write the manifest last, and rename the folder to its final name. Delete the work folder."""
        complete = Manifest(**{**vars(manifest), "files": hash_files(folder)})
        write_manifest(folder, complete)
        require_real_folder(self.published(stage))
        folder.rename(self.published(stage))
        require_real_folder(self.root / WORK)
        shutil.rmtree(self.work(stage), ignore_errors=True)

    def supersede(self, stage: str) -> None:
        """Move a published stage to `.superseded/`; nothing is deleted. It is then no longer accepted for any plan."""
        manifest = self.manifest(stage)
        if manifest is not None:
            self._withdraw_acceptance(manifest.fingerprint)
        self._move_away(self.published(stage), stage)

    def remove_leftovers(self, stage: str | None = None) -> None:
        """Delete partial outputs of killed runners, of one stage only if other runners may be active in this run."""
        pattern = f"{PARTIAL}*" if stage is None else f"{PARTIAL}{stage}-[0-9]*"
        for folder in self.root.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)
        if stage is None:
            for file in self.root.glob(f".*{TEMPORARY}"):
                with suppress(OSError):
                    file.unlink()

    def _move_away(self, folder: Path, stage: str) -> None:
        if not folder.exists():
            return
        require_real_folder(folder)
        target = own_folder(self.root, SUPERSEDED)
        numbers = [other.name.removeprefix(f"{stage}-") for other in target.iterdir()]
        last = max((int(number) for number in numbers if number.isdecimal()), default=0)
        folder.rename(target / f"{stage}-{last + 1}")

    # --- work folders -------------------------------------------------------------------------

    def work(self, stage: str) -> Path:
        return self.paths.work(stage)

    def open_work(self, stage: str, fingerprint: str) -> Path:
        """Open the work folder of a stage. A work folder of another fingerprint is moved away first."""
        folder = self.own_work(stage)
        if folder.exists() and not _is_claimed(folder, fingerprint):
            self._move_away(folder, f"work-{stage}")
        own_folder(self.root, WORK, stage)
        self.claim_work(folder, fingerprint)
        return folder

    def own_work(self, stage: str) -> Path:
        """Return the path of the stage's work folder, which need not exist, after checking its ownership.

        Its contents decide which programs a stage starts and from which checkpoint a training resumes.

        Raises:
            ArtifactError: the folder is a link, or another user owns it or can write to it.
        """
        own_folder(self.root, WORK, mode=work_mode())
        folder = self.work(stage)
        require_real_folder(folder)
        require_own(self.root / WORK)
        require_own_tree(folder, below=self.root / WORK)
        return folder

    @staticmethod
    def claim_work(folder: Path, fingerprint: str) -> None:
        """Record the fingerprint that the contents of a work folder belong to."""
        if not _is_claimed(folder, fingerprint):
            write_whole(folder / _WORK_IDENTITY, fingerprint)

    # --- accepted drift -----------------------------------------------------------------------

    def accepted_drift(self) -> dict[str, str]:
        """Return planned fingerprint -> fingerprint on disk that the user has accepted in its place."""
        file = self.root / ACCEPTED_DRIFT
        return dict(read_json(file, "Delete it, and use --accept-drift again.")) if file.is_file() else {}

    def accept_drift(self, planned: str, found: str) -> None:
        """Record that the user accepts the fingerprint `found` on disk in place of the planned one."""
        self._write_accepted({**self.accepted_drift(), planned: found})

    def _withdraw_acceptance(self, found: str) -> None:
        """Remove the record that the fingerprint `found` is accepted in place of others."""
        accepted = self.accepted_drift()
        left = {planned: other for planned, other in accepted.items() if other != found}
        if left != accepted:
            self._write_accepted(left)

    def _write_accepted(self, accepted: Mapping[str, str]) -> None:
        write_whole(self.root / ACCEPTED_DRIFT, json.dumps(accepted, indent=2) + "\n")

    # --- lock ---------------------------------------------------------------------------------

    @contextmanager
    def lock(self, stage: str | None = None, *, patience_s: float = 0.0) -> Iterator[None]:
        """Lock this run, or one stage of it, for a runner. The operating system frees the lock when the process ends.

        Raises:
            ArtifactError: another runner still holds the lock after `patience_s`, or another user owns the folder.
        """
        self.root.mkdir(mode=ROOT_MODE, parents=True, exist_ok=True)
        require_own(self.root, shared=True)
        with ExitStack() as held:
            lock = held.enter_context(open_lock(self.root / LOCK))
            _hold(lock, self.root, patience_s, shared=stage is not None)
            if stage is not None:
                own = own_folder(self.root, WORK, mode=work_mode()) / f"{stage}{LOCK}"
                lock = held.enter_context(open_lock(own))
                _hold(lock, self.root, patience_s, shared=False)
            # The lock file names a process and a host; do not keep them after the run.
            held.callback(lock.truncate, 0)
            yield


def _hold(file: IO[str], root: Path, patience_s: float, *, shared: bool) -> None:
    until = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() < until:
                time.sleep(LOCK_POLL_S)
                continue
            file.seek(0)
            raise ArtifactError(
                f"Another runner works on this run: {file.read().strip() or 'jobs that run its stages'}.",
                where=str(root),
                next_step="Wait until it has ended (`minitron status RECIPE`), or give this run another name: name=...",
            ) from None
    file.truncate(0)
    if not shared:
        file.write(f"process {os.getpid()} on {os.uname().nodename}: {' '.join(masked_command(sys.argv))}\n")
        file.flush()


def _is_claimed(work: Path, fingerprint: str) -> bool:
    identity = work / _WORK_IDENTITY
    return identity.is_file() and identity.read_bytes() == fingerprint.encode()


def _unusable(file: Path, stage: str, problem: str) -> ArtifactError:
    return ArtifactError(
        f"{file.name} of stage {stage} {problem}.",
        where=str(file),
        next_step=f"Run the stage again with --rerun {stage}, or restore the file.",
    )


def _path_taken(problem: str, where: Path) -> ArtifactError:
    return ArtifactError(
        problem, where=str(where), next_step="Move that folder away, or give this run another name: name=..."
    )
