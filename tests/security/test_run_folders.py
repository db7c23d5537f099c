"""Run folders prepared by other people: no file elsewhere is written, and no run resumes in a foreign folder."""

from __future__ import annotations

import multiprocessing
import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_minitron.artifacts.compared import write_record
from nemo_minitron.artifacts.store import Store
from nemo_minitron.bundle.archive import write_archive
from nemo_minitron.bundle.items import Item
from nemo_minitron.cli import main as cli
from nemo_minitron.errors import ArtifactError, MinitronError
from nemo_minitron.execution.logs import log_file
from nemo_minitron.system import ownership
from nemo_minitron.system.files import write_whole
from nemo_minitron.system.progress import Progress
from nemo_minitron.system.safe_files import copy_whole, open_lock, open_log, own_folder, replacing, write_reserved

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    file = tmp_path / "private"
    file.write_text("{}")
    return file


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs/toy"
    folder.mkdir(parents=True)
    return folder


def _lock(run: Path) -> None:
    with Store(run).lock():
        pass


def _lock_of_a_stage(run: Path) -> None:
    with Store(run).lock("distill"):
        pass


def _log(run: Path) -> None:
    with log_file(run, "distill"):
        pass


@pytest.mark.parametrize(
    ("name", "write"),
    [
        (".lock", _lock),
        (".work/distill.lock", _lock_of_a_stage),
        ("logs/distill.log", _log),
        ("logs/distill.ranks.log", lambda run: open_log(run / "logs/distill.ranks.log", append=False)),
        (".work/distill/error.json", lambda run: write_reserved(run / ".work/distill/error.json", b"x")),
    ],
)
@pytest.mark.parametrize("way", ["link", "hard link", "pipe"])
def test_a_link_or_a_pipe_in_place_of_a_file_is_not_opened(
    name: str, write: object, way: str, run: Path, victim: Path
) -> None:
    file = run / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if way == "link":
        file.symlink_to(victim)
    elif way == "hard link":
        file.hardlink_to(victim)
    else:
        os.mkfifo(file)
    with pytest.raises(ArtifactError, match=r"is a link to|not a regular file") as caught:
        write(run)  # type: ignore[operator]
    assert caught.value.where == str(file)
    assert victim.read_text() == "{}"


@pytest.mark.parametrize(
    "name", ["plan.json", ".plan.json.partial", "report.html", "accepted_drift.json", ".compared/distill.json"]
)
def test_a_link_is_replaced_not_followed(name: str, run: Path, victim: Path) -> None:
    link = run / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(victim)
    (run / "new").write_text("page")
    write_whole(run / "plan.json", "{}")
    copy_whole(run / "new", run / "report.html")
    Store(run).accept_drift("a", "b")
    write_record(run / ".compared/distill.json", {})
    assert victim.read_text() == "{}"
    assert (run / "report.html").read_text() == "page"
    assert not any((run / made).is_symlink() for made in ("plan.json", "report.html", "accepted_drift.json"))


@pytest.mark.parametrize("name", [".work", ".work/distill", ".superseded", "logs", ".compared", "distill"])
def test_nothing_is_moved_or_written_through_a_link_to_a_folder(name: str, run: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "distill").mkdir(parents=True)
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).symlink_to(elsewhere)
    if name == ".superseded":
        (run / "distill").mkdir()
    use: dict[str, Callable[[], object]] = {
        "logs": lambda: _log(run),
        ".compared": lambda: write_record(run / ".compared/distill.json", {}),
        ".work": lambda: Store(run).open_work("distill", "fingerprint"),
        ".work/distill": lambda: Store(run).open_work("distill", "fingerprint"),
    }
    with pytest.raises(ArtifactError, match="is a link to"):
        use.get(name, lambda: Store(run).supersede("distill"))()
    assert [path.name for path in elsewhere.rglob("*")] == ["distill"]


def test_a_bundle_is_not_written_through_a_link_that_waits(tmp_path: Path, victim: Path) -> None:
    (tmp_path / ".b.tar.partial").symlink_to(victim)
    write_archive(tmp_path / "b.tar", [Item("a", b"1", "config")], {}, Progress(silent=True))
    assert victim.read_text() == "{}"


def test_a_crash_log_goes_to_a_new_private_file(
    tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "minitron-crash.log").symlink_to(victim)
    monkeypatch.chdir(tmp_path)
    assert cli._unexpected(ValueError("x")) == 1
    assert victim.read_text() == "{}"
    made = next(file for file in tmp_path.glob("minitron-crash-*.log"))
    assert stat.S_IMODE(made.stat().st_mode) == 0o600
    assert made.name in capsys.readouterr().err.replace("\n", "")


# --- several writers -----------------------------------------------------------------------------


def _write_often(file: str, sign: str, times: int) -> None:
    for _ in range(times):
        write_whole(Path(file), sign * 4000)


def test_several_writers_and_a_reader_see_whole_files_only(tmp_path: Path) -> None:
    file, torn = tmp_path / "status.json", []
    write_whole(file, "0" * 4000)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_often, args=(str(file), sign, 500)) for sign in "abcd"]
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            text = file.read_text()
            time.sleep(0.001)
            if len(text) != 4000 or len(set(text)) != 1:
                torn.append(text)

    reader = threading.Thread(target=read)
    for writer in writers:
        writer.start()
    reader.start()
    for writer in writers:
        writer.join()
    done.set()
    reader.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0, 0]
    assert torn == []
    assert os.listdir(tmp_path) == ["status.json"]


def test_written_files_have_the_requested_mode(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "shown", "x")
        write_whole(tmp_path / "private", "x", private=True)
        open_lock(tmp_path / "lock").close()
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert modes == {"shown": 0o640, "private": 0o600, "lock": 0o600}


def test_an_error_names_the_requested_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "gone/plan.json"):
        pass
    assert caught.value.filename == str(tmp_path / "gone/plan.json")
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(OSError, match=r"plan\.json'$"):
        write_whole(tmp_path / "plan.json", "")
    assert os.listdir(tmp_path) == ["plan.json"]


# --- owners of folders --------------------------------------------------------------------------------


def _work(run: Path) -> Path:
    work = Store(run).open_work("distill", "fingerprint")
    (work / "checkpoints").mkdir()
    (work / "checkpoints/.metadata").write_text("x")
    return work


@needs_root
@pytest.mark.parametrize("name", [".", ".work", ".work/distill", ".work/distill/checkpoints/.metadata"])
def test_another_users_run_is_not_resumed(name: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _work(run)
    os.chown(run / name, NOBODY, NOBODY)
    store = Store(run)
    with pytest.raises(ArtifactError, match=r"belongs to the user nobody") as caught, store.lock():
        store.open_work("distill", "fingerprint")
    assert "export MINITRON_TRUSTED_FOLDERS=" in str(caught.value)
    monkeypatch.setenv("MINITRON_TRUSTED_FOLDERS", f"/somewhere/else:{run.parent}")
    with store.lock():
        store.open_work("distill", "fingerprint")


@pytest.mark.parametrize(
    ("name", "mode"), [(".work", 0o777), (".work/distill", 0o757), (".work/distill/fingerprint", 0o666)]
)
def test_work_that_others_can_write_is_not_resumed(name: str, mode: int, run: Path) -> None:
    _work(run)
    os.chmod(run / name, mode)
    with pytest.raises(ArtifactError, match="can be written by every user") as caught:
        Store(run).open_work("distill", "fingerprint")
    assert "chmod -R go-w" in str(caught.value)
    os.chmod(run / name, mode & ~0o022)
    Store(run).open_work("distill", "fingerprint")


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o007, 0o022, 0o077])
def test_with_any_umask_a_run_resumes_its_own_work(umask: int, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "_is_private_group", lambda gid: False)
    before = os.umask(umask)
    try:
        new = run / "new"
        with Store(new).lock():
            _work(new)
        with Store(new).lock("distill"):
            Store(new).open_work("distill", "fingerprint")
    finally:
        os.umask(before)


def test_a_link_in_a_work_folder_stays_in_it(run: Path, victim: Path) -> None:
    work = _work(run)
    (work / "latest").symlink_to("checkpoints")
    Store(run).open_work("distill", "fingerprint")
    (work / "checkpoints/common.pt").symlink_to(victim)
    with pytest.raises(ArtifactError, match=r"common\.pt is a link to"):
        Store(run).open_work("distill", "fingerprint")


def test_files_that_another_node_deletes_meanwhile_are_skipped(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, listed = _work(run), ownership._everything
    (work / "checkpoints/common.pt").touch()

    def listed_before_deletion(folder: Path) -> list[Path]:
        found = sorted(listed(folder))
        (work / "checkpoints/.metadata").unlink(missing_ok=True)
        return found

    monkeypatch.setattr(ownership, "_everything", listed_before_deletion)
    assert Store(run).own_work("distill") == work
    os.chmod(work / "checkpoints/common.pt", 0o666)
    with pytest.raises(ArtifactError, match="can be written by every user"):
        Store(run).own_work("distill")


def test_a_disk_without_owners_is_accepted(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _work(run)
    os.chmod(run / ".work", 0o777)
    monkeypatch.setattr(ownership, "_modes_mean_something", lambda folder: False)
    Store(run).open_work("distill", "fingerprint")


def test_a_folder_of_a_run_is_made_inside_it(tmp_path: Path) -> None:
    assert own_folder(tmp_path / "run", "logs", "slurm").is_dir()
    (tmp_path / "run/logs/file").write_text("")
    with pytest.raises((MinitronError, OSError)):
        own_folder(tmp_path / "run", "logs", "file", "below")
