"""How the processes of one machine find each other, out of reach of its other users.

They meet in a file of a folder that only their user can open. torch's own way is a store on all network interfaces that
takes commands from anyone. What they say to each other goes over the loopback, where any user can still connect; so the
other end of each connection is looked up, and must belong to this user.

Processes of NeMo-Aligner load this file by its path: it imports torch and the standard library only.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import torch.distributed as dist

MEETING_VARIABLE = "MINITRON_MEETING"
"""As in processes/agent.py."""
LOOPBACKS = ("lo", "lo0")
TCP_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
ESTABLISHED = "01"
_meetings = count()
"""Those of this process: each has a file of its own, because torch cannot use one twice."""


class StrangerError(RuntimeError):
    """A process of another user has taken the place of a rank."""


def is_of_one_machine() -> bool:
    """Whether this process is alone, or one of ranks that are all on this machine."""
    return MEETING_VARIABLE in os.environ or "RANK" not in os.environ


def join(backend: str, timeout: timedelta) -> None:
    """Start torch.distributed: alone, in the meeting's file, or as torchrun says on several machines."""
    folder = os.environ.get(MEETING_VARIABLE)
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    elif folder is None:
        dist.init_process_group(backend, timeout=timeout)
    else:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        name = f"store.{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}.{next(_meetings)}"
        store = dist.FileStore(str(Path(folder, name)), world_size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


@contextmanager
def among_ourselves() -> Iterator[None]:
    """Inside, groups of processes of one machine talk over the loopback, and only with processes of this user.

    Raises:
        StrangerError: where a group was made, another user's process has taken part.
    """
    if not is_of_one_machine():
        yield
        return
    kept = {name: os.environ.get(name) for name in loopback_only()}
    os.environ.update(loopback_only())
    plain = {name: getattr(dist, name) for name in ("init_process_group", "new_group")}
    for name, function in plain.items():
        setattr(dist, name, _checked(function))
    try:
        yield
    finally:
        for name, function in plain.items():
            setattr(dist, name, function)
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def loopback_only() -> dict[str, str]:
    """What keeps gloo and NCCL on the loopback; empty where the machine has none.

    NCCL uses its sockets on one machine to begin with; data go by NVLink, PCIe or shared memory as before.
    """
    try:
        names = {name for _, name in socket.if_nameindex()}
    except OSError:
        names = set()
    name = next((name for name in LOOPBACKS if name in names), None)
    return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"} if name else {}


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, after which the other ends of new connections are looked up."""

    def checked(*args: Any, **kwargs: Any) -> Any:
        before = _own_sockets()
        made = function(*args, **kwargs)
        require_own_peers(_own_sockets() - before)
        return made

    return checked


def require_own_peers(sockets: set[str]) -> None:
    """Raises StrangerError where the other end of one of these sockets (inodes) is not this user's.

    Only Linux tells; elsewhere nothing is looked up.
    """
    rows = list(_connections())
    users = {(local, remote): user for local, remote, user, _ in rows}
    for local, remote, _, inode in rows:
        if inode in sockets and users.get((remote, local), os.geteuid()) != os.geteuid():
            raise StrangerError(
                f"Another user of this machine (uid {users[remote, local]}) has connected to a process of this run."
            )


def _own_sockets() -> set[str]:
    """The inodes of this process's sockets; empty where the system does not show them."""
    found = set()
    try:
        names = os.listdir("/proc/self/fd")
    except OSError:
        return set()
    for name in names:
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if target.startswith("socket:["):
            found.add(target[len("socket:[") : -1])
    return found


def _connections() -> Iterator[tuple[str, str, int, str]]:
    """(own end, other end, user, inode) of the established TCP connections of this machine."""
    for table in TCP_TABLES:
        try:
            lines = table.read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            words = line.split()
            if len(words) > 9 and words[3] == ESTABLISHED:
                yield words[1], words[2], int(words[7]), words[9]
