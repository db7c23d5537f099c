"""Another user of the machine, who connects to every listening socket of a run and sends commands."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.support.processes import marked

UID = 54321
"""User id of nobody. The stranger is this user if the tests run as root, otherwise the same user."""
ANSWER_S = 0.5


@dataclass
class Seen:
    """Listening sockets of the run's processes, and those that responded as a store."""

    addresses: set[str] = field(default_factory=set)
    stores: list[str] = field(default_factory=list)
    attacked: list[str] = field(default_factory=list)
    delay_s: float = 0.0
    """Seconds from the opening of a socket to its attack. The ranks of a run connect to it within a few seconds."""

    @property
    def beyond_loopback(self) -> set[str]:
        return {address for address in self.addresses if not address.startswith("127.0.0.1:")}


@contextmanager
def stranger(mark: str, marker: Path) -> Iterator[Seen]:
    """Attack every listening socket of a process with this mark, `Seen.delay_s` after it opens, until the block ends.

    Args:
        marker: a file that a command of the stranger would create if it were run.
    """
    seen, over = Seen(), threading.Event()
    words = [sys.executable, "-m", "tests.support.stranger", str(marker)]
    child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    watcher = threading.Thread(target=_watch, args=(mark, child, seen, over))
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()
        message, _ = child.communicate(timeout=120)
        output = [json.loads(line) for line in message.splitlines()]
        seen.attacked = [one["address"] for one in output]
        seen.stores = [one["address"] for one in output if one["is_store"]]
        print("sockets:", *sorted(seen.addresses), file=sys.stderr)


def _watch(mark: str, child: subprocess.Popen[str], seen: Seen, over: threading.Event) -> None:
    assert child.stdin is not None
    due_s: dict[str, float] = {}
    while not over.is_set() or due_s:
        for process in list(marked(mark)):
            for address in _listening(process) - seen.addresses:
                seen.addresses.add(address)
                due_s[address] = time.monotonic() + seen.delay_s
        for address in [address for address, when_s in due_s.items() if over.is_set() or when_s <= time.monotonic()]:
            del due_s[address]
            child.stdin.write(address + "\n")
            child.stdin.flush()
        over.wait(0.05)


def _listening(process: psutil.Process) -> set[str]:
    try:
        found = process.net_connections("inet")
    except psutil.Error:
        return set()
    return {f"{one.laddr.ip}:{one.laddr.port}" for one in found if one.status == psutil.CONN_LISTEN}


# --- the stranger's own process -------------------------------------------------------------------


class _Command:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


def _attack(address: str, marker: str) -> dict[str, Any]:
    host, port = address.rsplit(":", 1)
    host = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    poison = pickle.dumps(_Command(marker))
    for message in (b"", b"\0" * 64, poison, (0).to_bytes(8, "little") + poison, os.urandom(4096)):
        try:
            with socket.create_connection((host, int(port)), ANSWER_S) as line:
                line.sendall(message)
        except ConnectionRefusedError:  # its process has ended
            return {"address": address, "is_store": False}
        except OSError:
            pass
    return {"address": address, "is_store": _is_store(host, int(port), poison)}


def _is_store(host: str, port: int, poison: bytes) -> bool:
    """Return whether torch's client can read and write there; it puts the poison where a rendezvous keeps its state."""
    from datetime import timedelta

    import torch.distributed as dist

    try:
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=ANSWER_S), wait_for_workers=False)
        for key in ("a", "torch.rendezvous.none", "/torch.rendezvous.none"):
            store.set(key, poison)
        return bool(store.get("a") == poison)
    except Exception:
        return False


def _main(marker: str) -> None:
    # Import it now, because the other user may be unable to read this Python.
    import torch.distributed  # noqa: F401

    "host".encode("idna")  # loads the codec for host names

    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(UID)
        os.setuid(UID)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(_attack(line.strip(), marker)), flush=True)


if __name__ == "__main__":
    _main(sys.argv[1])
