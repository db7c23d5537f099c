"""Servers of a training on a node of their own; `nemo_minitron/start` calls this module with the folder of the node.

The runner on the first node writes SERVERS_FILE there and requests the end with STOP_FILE. This process writes where it
listens, or the error with which a server ended.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.backends.alignment.nemo_aligner import tunnel
from nemo_minitron.backends.alignment.nemo_aligner.servers import POLL_S, SOCKETS_VARIABLE, ServerTask, running
from nemo_minitron.errors import Interrupted, MinitronError, ProcessesDied
from nemo_minitron.processes import exchange
from nemo_minitron.processes.nodes import Nodes
from nemo_minitron.processes.same_code import require_same
from nemo_minitron.system.disclosure import masked
from nemo_minitron.system.interrupts import SIGNALS, StopRequest
from nemo_minitron.system.safe_files import write_whole

SERVERS_FILE, LISTENING_FILE = "servers.json", "listening.json"


class _Stop(StopRequest):
    """Requested by STOP_FILE, or because the parent process has ended."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._parent = os.getppid()

    def source(self) -> str | None:
        return super().source() or (None if os.getppid() == self._parent else "the end of the job")


def main(folder: Path) -> int:
    """Run the servers of SERVERS_FILE until a stop is requested or one of them ends."""
    for number in SIGNALS.values():
        # The runner decides when servers end. A signal that is only ignored would be ignored by the servers as well.
        signal.signal(number, lambda *_: None)
    try:
        _serve(json.loads((folder / SERVERS_FILE).read_text()), folder)
    except Interrupted:
        pass
    except MinitronError as error:
        fields = {key: getattr(error, key) for key in ("what", "where", "next_step")}
        texts = {key: text and masked(text) for key, text in fields.items()}
        exchange.save_error({"died": isinstance(error, ProcessesDied), **texts}, folder)
    except OSError as error:
        exchange.save_error({"what": f"The servers could not be started: {error}"}, folder)
    exchange.save_result({}, folder)
    return 0


def _serve(content: Mapping[str, Any], folder: Path) -> None:
    require_same(content["code"])
    servers = [ServerTask(**{**server, "work_dir": Path(server["work_dir"])}) for server in content["servers"]]
    threads = content["threads"] or Nodes().threads_of_each(len(servers))
    secret = (folder.parent / tunnel.SECRET_FILE).read_bytes()
    address = tunnel.local_address(content["first_node"])
    stop = _Stop(folder)
    with running(servers, threads, stop, on_cpu=content["on_cpu"]) as started:
        sockets = Path(started.variables[SOCKETS_VARIABLE])
        with tunnel.listening(address, secret, sockets, [server.number for server in servers]) as port:
            write_whole(folder / LISTENING_FILE, json.dumps([address, port]))
            while stop.source() is None:
                started.watch()
                time.sleep(POLL_S)
