"""Rendezvous for the processes of one machine, protected from the machine's other users.

The processes use a FileStore in a folder that only their user can open; torch's default is a TCP store on all network
interfaces that accepts commands from anyone. Their traffic uses the loopback interface. Any local user can still
connect there, so the peer of every new connection is looked up and must belong to this user.

This module imports only torch and the standard library: NeMo-Aligner's processes load it by its path.
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

import torch
import torch.distributed as dist

RENDEZVOUS_FOLDER_VARIABLE = "MINITRON_MEETING"
"""Names the rendezvous folder; the same as in processes/agent.py."""
LOOPBACKS = ("lo", "lo0")
TCP_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
ESTABLISHED = "01"
HANDSHAKE_TIMEOUT = timedelta(seconds=60)
"""Time in which all members of a new group must answer each other."""
_store_numbers = count()
"""Counts the process groups of this process: each needs a new file, because torch cannot reuse one."""


class ForeignProcessError(RuntimeError):
    """Another process has connected in place of a rank."""


def is_single_machine() -> bool:
    """Return whether this process runs alone or all ranks are on this machine."""
    return RENDEZVOUS_FOLDER_VARIABLE in os.environ or "RANK" not in os.environ


def join(backend: str, timeout: timedelta) -> None:
    """Initialize torch.distributed: alone, through the FileStore, or through torchrun's store on several machines."""
    folder = os.environ.get(RENDEZVOUS_FOLDER_VARIABLE)
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    elif folder is None:
        dist.init_process_group(backend, timeout=timeout)
    else:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        name = f"store.{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}.{next(_store_numbers)}"
        store = dist.FileStore(str(Path(folder, name)), world_size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


@contextmanager
def restricted_to_own_user() -> Iterator[None]:
    """Restrict the process groups of one machine to the loopback interface and to processes of this user.

    Raises:
        ForeignProcessError: another user's process has connected while a group was created.
    """
    if not is_single_machine():
        yield
        return
    kept = {name: os.environ.get(name) for name in loopback_environment()}
    os.environ.update(loopback_environment())
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


def loopback_environment() -> dict[str, str]:
    """Return the variables that keep gloo and NCCL on the loopback interface; empty if the machine has none.

    On one machine NCCL uses sockets only for its bootstrap; data still use NVLink, PCIe or shared memory.
    """
    try:
        names = {name for _, name in socket.if_nameindex()}
    except OSError:
        names = set()
    name = next((name for name in LOOPBACKS if name in names), None)
    return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"} if name else {}


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that the peers of the connections that it opens are checked."""

    def checked(*args: Any, **kwargs: Any) -> Any:
        before = _own_sockets()
        made = function(*args, **kwargs)
        require_own_peers(_own_sockets() - before)
        require_answers(made)
        return made

    return checked


def require_answers(group: Any) -> None:
    """Let all members of a new gloo group answer each other once.

    gloo accepts the first connection that sends the expected number, which is 0 at first. If a foreign process sends it
    and disconnects, its owner can no longer be looked up, and gloo would retry on the closed connection forever.

    Args:
        group: what `init_process_group` (None) or `new_group` has returned.

    Raises:
        ForeignProcessError: a member does not answer.
    """
    if group is dist.GroupMember.NON_GROUP_MEMBER or dist.get_backend(group) != "gloo":
        return
    if dist.get_world_size(group) == 1:
        return
    # The timeout is that of the operation itself: if only the wait ended, the group could not be destroyed before the
    # operation ends by the group's own timeout, half an hour later.
    options, members = dist.AllreduceOptions(), group or dist.GroupMember.WORLD
    assert members is not None
    options.timeout = HANDSHAKE_TIMEOUT
    try:
        members.allreduce([torch.ones(1)], options).wait(HANDSHAKE_TIMEOUT)
    except RuntimeError as error:
        raise ForeignProcessError(
            "The processes of this run do not reach each other: another process of this machine has probably connected "
            "in place of one of them."
        ) from error


def require_own_peers(sockets: set[str]) -> None:
    """Raise ForeignProcessError if the peer of one of these sockets (inodes) belongs to another user.

    Only Linux provides this information; on other systems nothing is checked.
    """
    rows = list(_connections())
    users = {(local, remote): user for local, remote, user, _ in rows}
    for local, remote, _, inode in rows:
        if inode in sockets and users.get((remote, local), os.geteuid()) != os.geteuid():
            raise ForeignProcessError(
                f"Another user of this machine (uid {users[remote, local]}) has connected to a process of this run."
            )


def _own_sockets() -> set[str]:
    """Return the inodes of this process's sockets; empty if the system does not show them."""
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
    """Yield (local address, remote address, user id, inode) of the established TCP connections of this machine."""
    for table in TCP_TABLES:
        try:
            lines = table.read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            words = line.split()
            if len(words) > 9 and words[3] == ESTABLISHED:
                yield words[1], words[2], int(words[7]), words[9]
