"""PyTriton over Unix sockets in a folder that only this user can open, instead of TCP ports.

Triton's HTTP interface can load models, which are programs, and any user of the machine can connect to a port of the
loopback interface. So a server with the number N listens on the socket `N` of the folder, and a client that connects to
port N of any host connects there. gRPC and metrics are off. PyTriton's own sockets and pickles are in the same folder.
If the servers run on other nodes, clients reach these sockets through `tunnel.py`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sysconfig
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from task import after_runner, load_backend_module

tunnel = load_backend_module("alignment/nemo_aligner/tunnel.py")
FOLDER_VARIABLE = "MINITRON_SOCKETS"
"""Names the folder; the same as in servers.py of the parent folder."""
SHARED_MEMORY = Path("/dev/shm")
MASK_OF_FILES = 0o077
MAX_BATCH = 9_999_999
"""Requests are cut into batches by the servers themselves."""


def prepare() -> None:
    """Redirect PyTriton's servers and clients of this process to the folder. Call it before importing PyTriton.

    If the servers run on other nodes, this process is only a client, and there is no folder.
    """
    remote = os.environ.get(tunnel.SERVERS_VARIABLE)
    if remote is not None:
        _remote_clients(Path(remote))
        return
    folder = Path(os.environ[FOLDER_VARIABLE])
    os.umask(MASK_OF_FILES)  # also of shared memory
    os.environ["PYTRITON_HOME"] = str(folder)
    after_runner.append(_remove_traces)
    _let_triton_find_python()
    _clients(folder)
    _servers(folder)


def _let_triton_find_python() -> None:
    """Put this Python's library before others of the same version that Triton's Python backend might load."""
    found = [sysconfig.get_config_var("LIBDIR"), os.environ.get("LD_LIBRARY_PATH")]
    os.environ["LD_LIBRARY_PATH"] = ":".join(path for path in found if path)


def _clients(folder: Path) -> None:
    import gevent.socket
    from geventhttpclient.connectionpool import ConnectionPool

    def resolve(self: Any) -> list[tuple[Any, ...]]:
        path = str(folder / str(self._connection_port))
        return [(gevent.socket.AF_UNIX, gevent.socket.SOCK_STREAM, 0, "", path)]

    connect = ConnectionPool._connect_socket

    def connect_or_refuse(self: Any, *args: Any) -> Any:
        """Report a socket that does not exist yet as a refused connection, which PyTriton repeats."""
        try:
            return connect(self, *args)
        except FileNotFoundError as error:
            raise ConnectionRefusedError(str(error)) from error

    ConnectionPool._resolve, ConnectionPool._connect_socket = resolve, connect_or_refuse


def _remote_clients(folder: Path) -> None:
    """Connect clients to the servers on other nodes; `folder` has their addresses and the secret."""
    import gevent.socket
    from geventhttpclient.connectionpool import ConnectionPool

    secret = (folder / tunnel.SECRET_FILE).read_bytes()
    connect = ConnectionPool._connect_socket

    def resolve(self: Any) -> Any:
        return gevent.socket.getaddrinfo(
            *tunnel.address_of(self._connection_port, folder), type=gevent.socket.SOCK_STREAM
        )

    def connect_and_introduce(self: Any, *args: Any) -> Any:
        connection = connect(self, *args)
        connection.setsockopt(gevent.socket.IPPROTO_TCP, gevent.socket.TCP_NODELAY, 1)
        connection.setsockopt(gevent.socket.SOL_SOCKET, gevent.socket.SO_KEEPALIVE, 1)
        tunnel.introduce(connection, secret, self._connection_port)
        return connection

    ConnectionPool._resolve, ConnectionPool._connect_socket = resolve, connect_and_introduce


def _servers(folder: Path) -> None:
    import sh
    from pytriton.server.triton_server_config import TritonServerConfig

    to_args = TritonServerConfig.to_args_list

    def with_socket(self: Any) -> list[str]:
        args: list[str] = to_args(self)
        args[args.index("--http-address") + 1] = f"unix:{folder / str(self['http-port'])}"
        return args

    TritonServerConfig.to_args_list = with_socket
    start, group = sh.Command.__call__, os.getpgrp()

    def start_in_group(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Start Triton in this process's group and session, so that all of them end together."""
        before = kwargs.get("_preexec_fn")

        def preexec() -> None:
            if before is not None:
                before()
            os.setpgid(0, group)

        return start(self, *args, **{**kwargs, "_new_session": False, "_preexec_fn": preexec})

    sh.Command.__call__ = start_in_group


def serve(
    number: int,
    name: str,
    infer: Callable[..., Mapping[str, Any]],
    inputs: tuple[Any, ...],
    outputs: tuple[Any, ...],
    ready_file: Path,
) -> None:
    """Serve a function as a model until the process ends; create `ready_file` once it can be called."""
    announce(ready_file)
    from pytriton.model_config import ModelConfig
    from pytriton.model_config.common import DynamicBatcher
    from pytriton.triton import Triton

    config = ModelConfig(batching=True, max_batch_size=MAX_BATCH, batcher=DynamicBatcher(2000))
    with Triton(config=triton_config(number)) as triton:
        triton.bind(model_name=name, infer_func=infer, inputs=list(inputs), outputs=list(outputs), config=config)
        triton.serve()
    raise RuntimeError("Triton has ended")


def announce(ready_file: Path) -> None:
    """Let every server of this process create a file once its models can be called."""
    from pytriton.triton import Triton

    serve = Triton.serve

    def announced(self: Any, *args: Any, **kwargs: Any) -> None:
        self.run()
        after_runner.extend(partial(shutil.rmtree, copy, ignore_errors=True) for copy in _copies_of_models())
        for file in shared_memory():
            file.chmod(0o600)  # it is created for all users to read
        ready_file.touch()
        serve(self, *args, **kwargs)

    Triton.serve = announced


def shared_memory() -> list[Path]:
    """Return the shared memory of this process's server, which PyTriton names after the process."""
    return list(SHARED_MEMORY.glob(f"pytrtion{os.getpid()}-*"))


def _copies_of_models() -> list[str]:
    """Return Triton's folders in /tmp with the programs that it runs; a killed Triton leaves them behind."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ProcessLookupError):
            if os.getpgid(int(process.name)) == os.getpgrp():
                found += re.findall(r"/tmp/folder\w{6}", (process / "cmdline").read_text(errors="replace"))
    return found


def _remove_traces() -> None:
    """Remove the files that a killed server leaves behind."""
    for file in shared_memory():
        file.unlink(missing_ok=True)
    shutil.rmtree(os.environ[FOLDER_VARIABLE], ignore_errors=True)


def triton_config(number: int) -> Any:
    """Return the settings of a server with this number."""
    from pytriton.triton import TritonConfig

    return TritonConfig(
        allow_http=True, allow_grpc=False, allow_metrics=False, http_address="127.0.0.1", http_port=number
    )
