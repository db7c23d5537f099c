"""The TCP connections to servers on other nodes: whoever does not know the secret reaches no server."""

from __future__ import annotations

import json
import os
import socket
import socketserver
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nemo_minitron.backends.alignment.nemo_aligner import tunnel

SECRET = b"s" * 32
NUMBER = 7
NUM_CLIENTS, NUM_THREADS = 200, 16


class Echo(socketserver.ThreadingUnixStreamServer):
    """Stands for Triton on its socket: returns what it gets, and counts its connections."""

    daemon_threads = True
    request_queue_size = NUM_CLIENTS

    def __init__(self, path: Path) -> None:
        self.num_connections = 0
        super().__init__(str(path), Handler)


class Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, Echo)
        self.server.num_connections += 1
        while block := self.request.recv(1 << 16):
            self.request.sendall(block)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Echo]:
    with Echo(tmp_path / str(NUMBER)) as echo:
        thread = threading.Thread(target=echo.serve_forever, daemon=True)
        thread.start()
        yield echo
        echo.shutdown()


@pytest.fixture
def port(server: Echo, tmp_path: Path) -> Iterator[int]:
    with tunnel.listening("127.0.0.1", SECRET, tmp_path, [NUMBER]) as port:
        yield port


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def received(connection: socket.socket) -> bytes:
    """Return what comes until the other side closes the connection."""
    found = b""
    while block := connection.recv(1 << 16):
        found += block
    return found


def test_clients_that_know_the_secret_reach_the_server_all_at_once(port: int, server: Echo) -> None:
    def exchange(number: int) -> bool:
        sent = os.urandom(1000 + 1000 * number)
        with connect(port) as connection:
            tunnel.introduce(connection, SECRET, NUMBER)
            sender = threading.Thread(
                target=lambda: (connection.sendall(sent), connection.shutdown(socket.SHUT_WR)), daemon=True
            )
            sender.start()
            return received(connection) == sent

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        assert all(pool.map(exchange, range(NUM_CLIENTS)))
    assert server.num_connections == NUM_CLIENTS


def test_a_wrong_secret_a_missing_one_and_a_replay_reach_no_server(port: int, server: Echo) -> None:
    with connect(port) as connection, pytest.raises(ConnectionError, match="closed"):
        tunnel.introduce(connection, b"x" * 32, NUMBER)
    with connect(port) as connection:
        connection.sendall(b"GET /v2/models/reward_model HTTP/1.1\r\nHost: localhost\r\n\r\n".ljust(68))
        assert len(received(connection)) == tunnel.NONCE_BYTES  # only the challenge
    recorded = Recorder(connect(port))
    tunnel.introduce(recorded, SECRET, NUMBER)
    with recorded.connection as connection:
        connection.sendall(b"hello")
        assert connection.recv(5) == b"hello"
    assert server.num_connections == 1
    with connect(port) as connection:
        connection.sendall(recorded.sent)
        assert len(received(connection)) == tunnel.NONCE_BYTES
    assert server.num_connections == 1


class Recorder:
    """A connection that keeps what was sent."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.sent = connection, b""

    def sendall(self, data: bytes) -> None:
        self.sent += data
        self.connection.sendall(data)

    def recv(self, size: int) -> bytes:
        return self.connection.recv(size)


def test_other_sockets_of_the_folder_cannot_be_reached(port: int, tmp_path: Path) -> None:
    with Echo(tmp_path / "8") as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with connect(port) as connection, pytest.raises(ConnectionError):
            tunnel.introduce(connection, SECRET, 8)
        other.shutdown()
        assert other.num_connections == 0


def test_a_client_gives_nothing_to_a_server_that_does_not_know_the_secret() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def impostor() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"c" * tunnel.NONCE_BYTES)
                connection.recv(1 << 16)
                connection.sendall(b"p" * tunnel.PROOF_BYTES)

        threading.Thread(target=impostor, daemon=True).start()
        with connect(listener.getsockname()[1]) as connection, pytest.raises(ConnectionError, match="the secret"):
            tunnel.introduce(connection, SECRET, NUMBER)


def test_clients_that_stay_silent_are_dropped(server: Echo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnel, "HANDSHAKE_TIMEOUT_S", 0.3)
    monkeypatch.setattr(tunnel, "MAX_HANDSHAKES", 2)
    with tunnel.listening("127.0.0.1", SECRET, tmp_path, [NUMBER]) as port:
        silent = [connect(port) for _ in range(3)]
        assert sorted(len(received(one)) for one in silent) == [0, tunnel.NONCE_BYTES, tunnel.NONCE_BYTES]
        for one in silent:
            one.close()
        with connect(port) as connection:
            tunnel.introduce(connection, SECRET, NUMBER)
            connection.sendall(b"hello")
            assert connection.recv(5) == b"hello"


def test_addresses_are_read_and_the_secret_is_private(tmp_path: Path) -> None:
    from nemo_minitron.system.safe_files import replacing

    (tmp_path / tunnel.ADDRESSES_FILE).write_text(json.dumps({1: ["10.0.0.2", 40001]}))
    assert tunnel.address_of(1, tmp_path) == ("10.0.0.2", 40001)
    with replacing(tmp_path / tunnel.SECRET_FILE, private=True) as file:
        file.write(tunnel.new_secret())
    assert stat.S_IMODE((tmp_path / tunnel.SECRET_FILE).stat().st_mode) == 0o600
    assert len((tmp_path / tunnel.SECRET_FILE).read_bytes()) == 32
    assert tunnel.local_address("127.0.0.1") == "127.0.0.1"
