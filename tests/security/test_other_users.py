"""Another user of the machine, while stages run with several processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from nemo_minitron.backends.megatron.runtime import rendezvous
from nemo_minitron.backends.megatron.runtime.rendezvous import ForeignProcessError, require_own_peers
from nemo_minitron.processes.agent import RENDEZVOUS_VARIABLE, rendezvous_folder
from tests.conftest import REPO, TOY
from tests.support.part_runs import copy_before
from tests.support.processes import MARK
from tests.support.stranger import UID, stranger

MAX_ATTEMPTS = 5
DISTURBED = ("do not reach each other", "Another user of this machine")
"""Messages of a stage that ended because the stranger connected before a rank did; the same command resumes."""
TP2 = ["execution.parallel.tp=2", "execution.parallel.micro_batch_size=2"]


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """Yield the path of a file that the other user's command would create, in a folder that all users can write to."""
    folder = tmp_path / "everybody"
    folder.mkdir()
    folder.chmod(0o1777)
    yield folder / "marker"
    assert not list(folder.iterdir()), "a command of the stranger has run"


def test_a_stage_of_two_processes_is_closed_to_other_users(toy_run: Path, tmp_path: Path, marker: Path) -> None:
    run, mark = copy_before(toy_run, tmp_path / "runs", "check_teacher"), uuid4().hex
    words = [sys.executable, "-m", "nemo_minitron", "run", str(TOY), f"execution.run_root={tmp_path / 'runs'}", *TP2]
    words += ["--until", "check_teacher"]
    with stranger(mark, marker) as seen:
        for attempt in range(MAX_ATTEMPTS):
            seen.delay_s = attempt
            done = subprocess.run(
                words, cwd=REPO, env={**os.environ, MARK: mark}, capture_output=True, text=True, check=False
            )
            if not any(text in done.stderr for text in DISTURBED):
                break
    print(f"{attempt + 1} attempts")
    assert done.returncode == 0, done.stderr
    assert seen.addresses, "gloo's sockets must be found for this to mean anything"
    assert seen.beyond_loopback == set()
    assert len(seen.attacked) == len(seen.addresses)
    assert seen.stores == []
    one, two = (
        json.loads((root / "check_teacher/manifest.json").read_text())["result"]
        for root in (toy_run / "toy/width", run)
    )
    assert two["loss_nats_per_token"] == pytest.approx(one["loss_nats_per_token"], rel=1e-6)


@contextmanager
def _connection_of(uid: int) -> Iterator[set[str]]:
    """Yield the inode of an accepted connection whose peer belongs to this user."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = "import os, socket, sys; os.setuid(int(sys.argv[2])) if os.getuid() == 0 else None\n"
        code += "s = socket.socket(); s.connect(('127.0.0.1', int(sys.argv[1]))); sys.stdin.read()"
        server.settimeout(30)
        words = [sys.executable, "-c", code, str(server.getsockname()[1]), str(uid)]
        child = subprocess.Popen(words, stdin=subprocess.PIPE)
        accepted, _ = server.accept()
        with accepted:
            yield {str(os.fstat(accepted.fileno()).st_ino)}
        child.communicate()


@pytest.mark.skipif(not rendezvous.TCP_TABLES[0].is_file(), reason="only Linux tells whose a connection is")
def test_a_connection_of_another_user_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    with _connection_of(os.getuid()) as own:
        require_own_peers(own)
    with _connection_of(UID) as sockets:
        if os.getuid():
            monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)
        with pytest.raises(ForeignProcessError, match="Another user of this machine"):
            require_own_peers(sockets)
        require_own_peers(set())  # another program's connection, such as a proxy of this machine


def test_process_groups_with_another_user_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    made = threading.Event()
    monkeypatch.setattr(rendezvous.dist, "new_group", lambda: (accepted.append(server.accept()), made.set()))
    accepted: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        monkeypatch.setattr(rendezvous.os, "geteuid", lambda: os.getuid() + 1)
        monkeypatch.delenv("RANK", raising=False)
        with pytest.raises(ForeignProcessError), rendezvous.restricted_to_own_user():
            rendezvous.dist.new_group()
        client.close()
    assert made.is_set()


def test_the_rendezvous_folder_is_closed_to_others_and_removed() -> None:
    with rendezvous_folder() as variables:
        folder = Path(variables[RENDEZVOUS_VARIABLE])
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()


def test_one_process_listens_on_the_loopback_only() -> None:
    code = """
import os
from datetime import timedelta
import psutil
from nemo_minitron.backends.megatron.runtime import rendezvous
before = os.environ.get("GLOO_SOCKET_IFNAME")
with rendezvous.restricted_to_own_user():
    rendezvous.join("gloo", timedelta(seconds=60))
    print(*{one.laddr.ip for one in psutil.Process().net_connections("inet") if one.status == psutil.CONN_LISTEN})
assert os.environ.get("GLOO_SOCKET_IFNAME") == before
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPO)
    assert set(done.stdout.split()) <= {"127.0.0.1"}
