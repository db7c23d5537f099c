"""Variables of an outer job or launcher, and users without an entry in the user database."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_minitron.processes import nodes
from nemo_minitron.processes.nodes import Nodes, start_everywhere
from nemo_minitron.system.outer_job import SCRIPT_NAMES, dropped_defaults, for_slurm, without_outer_job
from tests.conftest import REPO, TOY

HOOKS = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
"""Variables that enroot's PyTorch hook sets in every step on two nodes."""


def test_variables_of_an_outer_job_are_removed_and_others_are_kept() -> None:
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SRUN_DEBUG": "1", "SBATCH_QOS": "x", "PMI_RANK": "0", **HOOKS}
    mine = {"PATH": "/bin", "SLURM_CONF": "/etc/x", "NCCL_DEBUG": "WARN", "GROUP_ID": "1"}
    assert without_outer_job({**job, **mine}) == mine
    here = {"TMPDIR": "/tmp/7", "CUDA_VISIBLE_DEVICES": "0", **dict.fromkeys(SCRIPT_NAMES, "2")}
    assert for_slurm({**job, **mine, **here}) == {**mine, "LC_ALL": "C"}
    assert for_slurm({"TMPDIR": "/scratch"})["TMPDIR"] == "/scratch", "not of a job"
    assert dropped_defaults({**job, **mine}) == ["SBATCH_QOS"]


def test_all_variables_that_a_script_sets_are_known() -> None:
    scripts = (REPO / "tests/golden/launch").glob("*.sh")
    found = {name for file in scripts for name in re.findall(r"export (MINITRON_\w+)=", file.read_text())}
    assert found == set(SCRIPT_NAMES) - {"MINITRON_LAST_LINK"}, "sbatch sets the latter"


PRINT = "import json, os, sys; json.dump(dict(os.environ), open(sys.argv[1], 'w'))"


@pytest.mark.parametrize("outside_job", [True, False])
def test_ranks_ignore_the_variables_of_another_launcher(
    outside_job: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**HOOKS, "SLURM_NTASKS": "2", "SLURM_CONF": "/etc/x"}.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-c", PRINT, str(tmp_path / "seen")]
    start_everywhere(
        command,
        {"OMP_NUM_THREADS": "3"},
        Nodes(),
        tmp_path,
        lambda words, own: subprocess.Popen(words, env=own),
        outside_job=outside_job,
    ).wait()
    seen = json.loads((tmp_path / "seen").read_text())
    assert not set(HOOKS) & set(seen)
    assert ("SLURM_NTASKS" in seen) is not outside_job
    assert seen["OMP_NUM_THREADS"] == "3"


LEAVES = """
import atexit, os, sys
from nemo_minitron.cli.main import main
atexit.register(lambda: print(sorted(os.environ)))
sys.argv[1:] = ["version"]
main()
"""


def test_the_command_ignores_a_rank_that_a_hook_has_set() -> None:
    """With rank 1 of 2, a stage with one process would refuse to start or wait forever for the other rank."""
    own = {**os.environ, **HOOKS, "SLURM_NODEID": "1"}
    done = subprocess.run([sys.executable, "-c", LEAVES], env=own, cwd=REPO, capture_output=True, text=True, check=True)
    names = done.stdout.splitlines()[-1]
    assert "'SLURM_NODEID'" in names
    assert not any(f"'{name}'" in names for name in HOOKS)


AS_NOBODY = """
import getpass, os, sys
os.getuid = lambda: 54321  # without an entry in the list of users
try:
    getpass.getuser()
except (KeyError, OSError):
    print("nameless")
from nemo_minitron.cli.main import main
try:
    main()
finally:
    print(getpass.getuser(), os.path.expanduser("~"))
"""


def test_a_user_without_an_entry_a_name_and_a_home_can_run_a_stage(tmp_path: Path) -> None:
    """This is the situation in docker with --user=UID:GID, without the name and home that `launch` sets."""
    gone = ("USER", "LOGNAME", "LNAME", "USERNAME", "HOME", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in gone}
    environment |= {"TMPDIR": str(tmp_path), "PYTHONPATH": str(REPO)}
    words = ["run", str(TOY), "--until=teacher", f"execution.run_root={tmp_path}/runs"]
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, *words],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("nameless")
    assert done.stdout.splitlines()[-1] == f"minitron {tmp_path}/minitron-54321"
    assert (tmp_path / "runs/toy/width/teacher/manifest.json").is_file()
    assert not (tmp_path / "~").exists()


def test_gloo_gets_an_interface_if_the_host_name_is_the_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    several = Nodes(2, 1, "node1", 20001, "7-0")
    monkeypatch.setattr(nodes, "_default_interface", lambda: "eth0")
    wrong = {"node2": "127.0.1.1", "node1": "10.0.0.1"}
    monkeypatch.setattr("socket.gethostname", lambda: "node2")
    monkeypatch.setattr(nodes, "_address_of", lambda host: wrong[host])
    assert nodes.gloo_interface(several, {}) == {"GLOO_SOCKET_IFNAME": "eth0"}
    assert nodes.gloo_interface(several, {"GLOO_SOCKET_IFNAME": "ib0"}) == {}
    assert nodes.gloo_interface(Nodes(), {}) == {}
    wrong["node2"] = "10.0.0.2"
    assert nodes.gloo_interface(several, {}) == {}
    wrong |= {"node2": "127.0.0.1", "node1": "127.0.0.1"}
    assert nodes.gloo_interface(several, {}) == {}, "all nodes are this machine"
