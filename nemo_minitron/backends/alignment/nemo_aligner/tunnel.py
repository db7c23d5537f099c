"""TCP connections to servers on Unix sockets of another node, only for clients that know a secret.

A server node listens on one TCP port, chosen by the system. Before a byte reaches a server, client and node prove to
each other that they know the secret, by HMACs over random numbers of both. What follows is not encrypted.

Both environments import this module: it uses only the standard library, and `entry/triton_socket.py` loads it by its
path.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

SERVERS_VARIABLE = "MINITRON_SERVERS"
"""Environment variable with the folder of ADDRESSES_FILE and SECRET_FILE; clients need no folder of sockets then."""
ADDRESSES_FILE = "addresses.json"
"""JSON object: number of a server -> [address, port] of its node."""
SECRET_FILE = "secret"
NONCE_BYTES, NUMBER_BYTES, PROOF_BYTES = 32, 4, 32
HANDSHAKE_TIMEOUT_S, MAX_HANDSHAKES = 10.0, 256
"""Limits of connections whose clients have not proved yet that they know the secret."""
BLOCK_BYTES = 1 << 18


def new_secret() -> bytes:
    """Return a new random secret."""
    return secrets.token_bytes(32)


def address_of(number: int, folder: Path) -> tuple[str, int]:
    """Return the address of the tunnel to a server."""
    found: Mapping[str, Any] = json.loads((folder / ADDRESSES_FILE).read_text())
    host, port = found[str(number)]
    return str(host), int(port)


def introduce(connection: Any, secret: bytes, number: int) -> None:
    """Connect a new TCP connection to the server with this number. `connection` has `sendall` and `recv`.

    Raises:
        ConnectionError: one of the two sides does not know the secret, or the server does not exist.
    """
    challenge, nonce = _received(connection, NONCE_BYTES), secrets.token_bytes(NONCE_BYTES)
    name = number.to_bytes(NUMBER_BYTES, "big")
    connection.sendall(nonce + name + _proof(secret, b"client", challenge, nonce, name))
    if not hmac.compare_digest(_received(connection, PROOF_BYTES), _proof(secret, b"server", challenge, nonce, name)):
        raise ConnectionError("the other side of the connection does not know the secret of this job")


def _received(connection: Any, num_bytes: int) -> bytes:
    found = b""
    while len(found) < num_bytes:
        block = connection.recv(num_bytes - len(found))
        if not block:
            raise ConnectionError("the server node has closed the connection")
        found += block
    return found


def _proof(secret: bytes, side: bytes, *parts: bytes) -> bytes:
    return hmac.digest(secret, b"nemo-minitron tunnel " + side + b"".join(parts), "sha256")


def local_address(toward: str) -> str:
    """Return the address of this node on the network in which it reaches the node `toward`."""
    family, kind, _, _, place = socket.getaddrinfo(toward, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)  # sends nothing
        return str(probe.getsockname()[0])


@contextmanager
def listening(address: str, secret: bytes, folder: Path, numbers: Sequence[int]) -> Iterator[int]:
    """Forward authenticated connections to the sockets of these numbers in the folder; yields the port."""
    tunnel = _Tunnel(secret, {number: folder / str(number) for number in numbers})
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(tunnel.serve, address, 0))
    thread = threading.Thread(target=loop.run_forever, name="tunnel", daemon=True)
    thread.start()
    try:
        yield int(server.sockets[0].getsockname()[1])
    finally:
        asyncio.run_coroutine_threadsafe(_end(server), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _end(server: asyncio.Server) -> None:
    server.close()
    connections = asyncio.all_tasks() - {asyncio.current_task()}
    for connection in connections:
        connection.cancel()
    await asyncio.gather(*connections, return_exceptions=True)


class _Tunnel:
    """The listening side."""

    def __init__(self, secret: bytes, sockets: Mapping[int, Path]) -> None:
        self._secret, self._sockets = secret, sockets
        self._num_handshakes = 0
        self._connections: set[Any] = set()
        """Running tasks: asyncio itself has no strong reference to one whose client has sent everything."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection: check its client, then copy both ways until both sides have ended."""
        task = asyncio.current_task()
        self._connections.add(task)
        try:
            await self._serve(reader, writer)
        finally:
            self._connections.discard(task)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer), suppress(OSError, asyncio.IncompleteReadError, asyncio.TimeoutError):
            path = await self._checked(reader, writer)
            if path is None:
                return
            there_reader, there_writer = await asyncio.open_unix_connection(path)
            with closing(there_writer):
                await asyncio.gather(_copy(reader, there_writer), _copy(there_reader, writer))

    async def _checked(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Path | None:
        """Return the socket that the client asks for; None: it does not know the secret, or there are too many."""
        if self._num_handshakes >= MAX_HANDSHAKES:
            return None
        self._num_handshakes += 1
        try:
            return await asyncio.wait_for(self._handshake(reader, writer), HANDSHAKE_TIMEOUT_S)
        finally:
            self._num_handshakes -= 1

    async def _handshake(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Path | None:
        challenge = secrets.token_bytes(NONCE_BYTES)
        writer.write(challenge)
        nonce, name = await reader.readexactly(NONCE_BYTES), await reader.readexactly(NUMBER_BYTES)
        proof = await reader.readexactly(PROOF_BYTES)
        if not hmac.compare_digest(proof, _proof(self._secret, b"client", challenge, nonce, name)):
            return None
        path = self._sockets.get(int.from_bytes(name, "big"))
        if path is not None:
            writer.write(_proof(self._secret, b"server", challenge, nonce, name))
        return path


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy until the reader's side has ended, and end the writer's side."""
    while block := await reader.read(BLOCK_BYTES):
        writer.write(block)
        await writer.drain()
    writer.write_eof()
