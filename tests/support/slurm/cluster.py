"""A real Slurm of a few nodes on this machine: on loopback, without systemd, inside one folder.

The programs come from Debian's packages, unpacked into a cache and not installed. Each node is a slurmd in a UTS
namespace of its own, so that `hostname` tells them apart and all that runs "on" a node can be found and killed.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
HEADERS = "libslurm-dev"
LIBRARIES = f"lib/{os.uname().machine}-linux-gnu"
READY_TIMEOUT_S, GPUS, CPUS, MEM_MB = 60.0, 8, 8, 64000
MAX_HOME = 60
"""Maximum length of the folder in characters: paths of unix sockets have at most 107."""


class Unavailable(Exception):
    """This machine cannot run Slurm; the message names what is missing."""


def prefix() -> Path:
    """Return the folder of the unpacked packages, which are fetched the first time.

    Raises:
        Unavailable: apt does not have them, or there is no apt.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nemo-minitron-tests/slurm"
    if (cache / "usr/sbin/slurmctld-wlm").is_file():
        return cache
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise Unavailable("the tests take Slurm from Debian's packages, and there is no apt-get")
    simulated = subprocess.run(
        ["apt-get", "install", "-s", "--no-install-recommends", *PACKAGES], capture_output=True, text=True, check=False
    )
    names = [line.split()[1] for line in simulated.stdout.splitlines() if line.startswith("Inst")]
    if not names:
        raise Unavailable("apt knows no slurmctld: run `apt-get update` first")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        _fetch([*names, HEADERS], Path(folder), cache)
    return cache


def _fetch(names: list[str], folder: Path, cache: Path) -> None:
    done = subprocess.run(
        ["apt-get", "download", "-q", *names], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Unavailable(f"apt-get download: {done.stderr.strip()[-200:]}")
    tree = folder / "tree"
    for package in sorted(folder.glob("*.deb")):
        subprocess.run(["dpkg", "-x", str(package), str(tree)], check=True)
    for plugin in tree.glob("usr/lib/*/slurm-wlm/mpi_pmix*.so"):
        plugin.unlink()  # would only log that libpmix is not there
    cache.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(cache, ignore_errors=True)
    shutil.copytree(tree, cache, symlinks=True)


@dataclass
class SlurmCluster:
    """A cluster: start it, use it with `environment`, stop it."""

    home: Path
    nodes: int = 4
    containers: bool = False
    """Whether there is a stand-in for pyxis: its options, a separate root, the mounts."""
    extra: tuple[str, ...] = ()
    """Additional lines of slurm.conf."""
    _daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _port: int = 0

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment for programs that use the cluster."""
        tree = prefix()
        paths = f"{tree}/usr/bin:{tree}/usr/sbin:{os.environ['PATH']}"
        libraries = f"{tree}/usr/{LIBRARIES}:{tree}/usr/{LIBRARIES}/slurm-wlm"
        outer = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        return {**outer, "SLURM_CONF": str(self.home / "slurm.conf"), "PATH": paths, "LD_LIBRARY_PATH": libraries}

    def start(self) -> None:
        """Start all daemons; raise Unavailable if the machine does not allow it."""
        if len(str(self.home)) > MAX_HOME:
            raise Unavailable(f"the folder {self.home} is too long for Slurm's sockets")
        if not socket.gethostbyname(socket.gethostname()).startswith("127."):
            raise Unavailable("this machine's name does not resolve to 127.*")
        for folder in ("bin", "state", "log", "dev", "tmp", *(f"spool/{name}" for name in self.node_names)):
            (self.home / folder).mkdir(parents=True, exist_ok=True)
        self._port = _free_block(self.nodes + 2)
        self._write_configuration()
        self._start("munged", self._munged())
        _until(lambda: (self.home / "munge.sock").exists(), self._tail)
        self.start_controller()
        for name in self.node_names:
            self.start_node(name)
        _until(lambda: self._ready() == self.nodes, self._tail)

    @property
    def node_names(self) -> list[str]:
        return [f"node{number}" for number in range(1, self.nodes + 1)]

    def daemon_pid(self, node: str) -> int:
        """The process of a node's slurmd."""
        return self._daemons[f"slurmd-{node}"].pid

    def start_controller(self) -> None:
        self._start("slurmctld", [str(self._program("slurmctld")), "-D", "-f", str(self.home / "slurm.conf")])

    def stop_controller(self) -> None:
        """Kill the controller, as in a crash."""
        self._daemons.pop("slurmctld").kill()

    def start_node(self, name: str) -> None:
        slurmd = [str(self._program("slurmd")), "-D", "-N", name, "-f", str(self.home / "slurm.conf")]
        slurmd += ["-d", str(self._program("slurmstepd"))]
        own_name = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
        inside = ["unshare", "--uts", "--mount", "sh", "-c", own_name, "sh", name, str(self.home / "hosts"), *slurmd]
        self._start(f"slurmd-{name}", inside)

    def kill_node(self, name: str) -> None:
        """Kill everything on the node at once, and mark it as down, because Slurm itself would take longer."""
        daemon = self._daemons.pop(f"slurmd-{name}")
        for process in list(_in_namespace_of(daemon.pid)):
            _kill(process)
        daemon.wait()
        self.call("scontrol", "update", f"nodename={name}", "state=down", "reason=killed by a test")

    def call(self, *words: str, check: bool = True) -> str:
        """Return the output of a program of Slurm."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        assert not check or done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """Return the facts of `scontrol show job`."""
        words = self.call("scontrol", "show", "job", job_id, "-o").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_until_idle(self, timeout_s: float) -> None:
        """Wait until no job waits or runs."""
        until = time.monotonic() + timeout_s
        while self.call("squeue", "-h", check=False).strip() or self.call("sinfo", "-h", check=False) == "":
            assert time.monotonic() < until, self.call("squeue", "-l") + self._tail()
            time.sleep(0.5)

    def stop(self) -> None:
        """End every daemon, and every process that a job has left."""
        self.call("scancel", f"--user={os.getuid()}", check=False)
        time.sleep(0.5)
        left = [found for daemon in self._daemons.values() for found in _in_namespace_of(daemon.pid)]
        for daemon in self._daemons.values():
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(5)
            except subprocess.TimeoutExpired:
                daemon.kill()
        for process in left:
            _kill(process)
        shutil.rmtree(self.home, ignore_errors=True)

    # --- parts --------------------------------------------------------------------------------

    def _program(self, name: str) -> Path:
        """Return a link with the plain name, because under Debian's `-wlm` names the daemons silently ignore Gres=."""
        link = self.home / "bin" / name
        if not link.is_symlink():
            link.symlink_to(prefix() / "usr/sbin" / f"{name}-wlm")
        return link

    def _start(self, name: str, command: list[str]) -> None:
        log = (self.home / "log" / f"{name}.out").open("ab")
        environment = {key: value for key, value in self.environment.items() if key != "SLURM_CONF"}
        self._daemons[name] = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )

    def _munged(self) -> list[str]:
        key = self.home / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        files = {"socket": "munge.sock", "key-file": "munge.key", "seed-file": "munge.seed", "pid-file": "munge.pid"}
        files["log-file"] = "log/munged.log"
        words = [f"--{option}={self.home / name}" for option, name in files.items()]
        return [str(prefix() / "usr/sbin/munged"), "--foreground", "--force", "--origin=127.0.0.1", "--syslog", *words]

    def _ready(self) -> int:
        return len(
            [
                line
                for line in self.call("sinfo", "-h", "-N", "-p", "main", "-o", "%t", check=False).split()
                if line == "idle"
            ]
        )

    def _tail(self) -> str:
        logs = sorted((self.home / "log").glob("*"))
        return "\n".join(line for log in logs for line in log.read_text(errors="replace").splitlines()[-4:])

    def _write_configuration(self) -> None:
        home, plugins = self.home, f"{prefix()}/usr/{LIBRARIES}/slurm-wlm"
        names = f"node[1-{self.nodes}]"
        own = {
            "ClusterName": "test",
            "SlurmctldHost": f"{socket.gethostname()}(127.0.0.1)",
            "SlurmctldPort": self._port,
        }
        own |= {"SlurmUser": _user(), "SlurmdUser": _user(), "PluginDir": plugins, "TmpFS": home / "tmp"}
        own |= {"AuthInfo": f"socket={home}/munge.sock,cred_expire=5", "StateSaveLocation": home / "state"}
        own |= {"SlurmdSpoolDir": f"{home}/spool/%n", "SlurmctldPidFile": home / "ctld.pid"}
        own |= {"SlurmdPidFile": f"{home}/slurmd-%n.pid", "SlurmctldLogFile": home / "log/slurmctld.log"}
        own |= {"SlurmdLogFile": f"{home}/log/slurmd-%n.log", "PlugStackConfig": home / "plugstack.conf"}
        ports = f"[{self._port + 1}-{self._port + self.nodes}]"
        nodes = f"NodeName={names} NodeHostname={names} NodeAddr=127.0.0.1 Port={ports} CPUs={CPUS} RealMemory={MEM_MB}"
        partitions = [
            "PartitionName=main Nodes=ALL Default=YES DefaultTime=10 MaxTime=INFINITE State=UP",
            "PartitionName=short Nodes=ALL MaxTime=2 State=UP",
        ]
        lines = [*(f"{key}={value}" for key, value in own.items()), FIXED_CONFIGURATION, *self.extra]
        (home / "slurm.conf").write_text(
            "\n".join([*lines, f"{nodes} Gres=gpu:{GPUS} State=UNKNOWN", *partitions]) + "\n"
        )
        for number in range(GPUS):
            (home / f"dev/nvidia{number}").symlink_to("/dev/null")
        gpus = f"NodeName={names} Name=gpu File={home}/dev/nvidia[0-{GPUS - 1}]"
        (home / "gres.conf").write_text(f"AutoDetect=off\n{gpus}\n")
        (home / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        hosts = [Path("/etc/hosts").read_text(), *(f"127.0.0.1 {name}" for name in self.node_names)]
        (home / "hosts").write_text("\n".join(hosts) + "\n")
        (home / "plugstack.conf").write_text(self._container_plugin() if self.containers else "# none\n")

    def _container_plugin(self) -> str:
        library = self.home / "containers.so"
        source = Path(__file__).with_name("containers.c")
        if shutil.which("gcc") is None:
            raise Unavailable("there is no gcc for the stand-in of pyxis")
        include = f"-I{prefix()}/usr/include"
        subprocess.run(["gcc", "-shared", "-fPIC", "-O1", include, "-o", str(library), str(source)], check=True)
        (self.home / "root").mkdir(exist_ok=True)
        return f"required {library} log={self.home}/log/containers.log root={self.home}/root\n"


FIXED_CONFIGURATION = """\
AuthType=auth/munge
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=86400
InactiveLimit=0
Waittime=0
SlurmdTimeout=10
MessageTimeout=10
KillOnBadExit=1
EnforcePartLimits=ALL
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
SlurmdParameters=config_overrides
GresTypes=gpu
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none"""


def _user() -> str:
    return subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()


def _free_block(size: int) -> int:
    """Return the first of this many consecutive ports without a listener."""
    for first in range(16800, 19800, 100):
        with_listener = False
        for port in range(first, first + size):
            with socket.socket() as probe:
                with_listener |= probe.connect_ex(("127.0.0.1", port)) == 0
        if not with_listener:
            return first
    raise Unavailable("no free ports")


def _in_namespace_of(pid: int) -> Iterator[int]:
    """Return the processes in the UTS namespace of this one, if that is a separate namespace."""
    try:
        wanted = os.readlink(f"/proc/{pid}/ns/uts")
    except OSError:
        return
    if wanted == os.readlink("/proc/self/ns/uts"):
        return
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(folder / "ns/uts") == wanted:
                yield int(folder.name)
        except OSError:
            continue


def _kill(process: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def _until(condition: Callable[[], bool], explain: Callable[[], str]) -> None:
    until = time.monotonic() + READY_TIMEOUT_S
    while not condition():
        if time.monotonic() > until:
            raise Unavailable(f"did not come up:\n{explain()}")
        time.sleep(0.1)
