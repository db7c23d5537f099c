"""Variables that an outer job, an outer torchrun or a container's hooks have set, and that are not for our children.

A job that is submitted from inside another one inherits that one's memory, binding and tasks; a process that finds the
ranks of another launcher joins the wrong world, or waits for ever.
"""

from __future__ import annotations

import os
import pwd
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")
"""Settings of Slurm's programs that name the cluster or prove who calls; no job sets them."""
JOB_PREFIXES = ("SLURM_", "SRUN_", "SBATCH_", "SALLOC_", "SLURMD_", "SPANK_", "_SLURM_")
"""Of a job and its steps, and the defaults of sbatch, srun and salloc."""
FILTER_PREFIXES = ("SQUEUE_", "SINFO_", "SACCT_", "SCANCEL_", "SCONTROL_", "PYXIS_")
"""Defaults that would change what Slurm's programs print or end."""
LAUNCHER_PREFIXES = ("PMI_", "PMI2_", "PMIX_", "OMPI_", "MPI_LOCAL", "MV2_COMM_WORLD", "TORCHELASTIC_")
LAUNCHER_NAMES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_NAME",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "MINITRON_MEETING",
    "PET_MASTER_ADDR",
    "PET_MASTER_PORT",
    "PET_NNODES",
    "PET_NODE_RANK",
    "PET_NPROC_PER_NODE",
    "PET_RDZV_BACKEND",
    "PET_RDZV_CONF",
    "PET_RDZV_ENDPOINT",
    "PET_RDZV_ID",
    "PET_STANDALONE",
)
"""What agents, MPI and enroot's PyTorch hook tell each process about its place."""
DEVICE_NAMES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "NVIDIA_VISIBLE_DEVICES")
"""The GPUs of this machine or job, which say nothing about those of another."""
USER_NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")
"""Where Python's getpass looks for the name of the user."""
NOBODY = "minitron"
"""The name of a user that has none."""


def of_a_launcher(names: Iterable[str]) -> set[str]:
    """Those that give a process its rank."""
    return {name for name in names if name in LAUNCHER_NAMES or name.startswith(LAUNCHER_PREFIXES)}


def of_a_job(names: Iterable[str]) -> set[str]:
    """Those of a job of Slurm, its steps and its programs' defaults."""
    return {name for name in names if name.startswith(JOB_PREFIXES) and name not in KEPT}


def outside(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a process that belongs to no job and no group of processes."""
    names = of_a_job(environment) | of_a_launcher(environment)
    return {name: value for name, value in environment.items() if name not in names}


def for_slurm(environment: Mapping[str, str], *, exported: bool = False) -> dict[str, str]:
    """The environment for one of Slurm's programs, whose messages are to be English.

    Args:
        exported: the program hands it on to a job, which keeps the user's encoding.
    """
    kept = {
        name: value
        for name, value in outside(environment).items()
        if name not in DEVICE_NAMES and not name.startswith(FILTER_PREFIXES)
    }
    if "SLURM_JOB_ID" in environment:
        kept.pop("TMPDIR", None)  # of the outer job, and gone with it
    if not exported:
        return {**kept, "LC_ALL": "C"}
    encoding = kept.pop("LC_ALL", "")
    return {**kept, **({"LC_CTYPE": encoding} if encoding else {}), "LC_MESSAGES": "C"}


def dropped_defaults(environment: Mapping[str, str]) -> list[str]:
    """Defaults of sbatch that the user has set and that `for_slurm` leaves out, outside of a job."""
    return sorted(name for name in environment if name.startswith("SBATCH_") and name not in KEPT)


def leave_launcher() -> None:
    """Forget the rank that another launcher, or a hook of the container, has given to this process."""
    for name in of_a_launcher(os.environ):
        del os.environ[name]


def name_the_user() -> None:
    """Give the user a name and a home where the machine knows neither, as in a container run with another uid."""
    try:
        known: pwd.struct_passwd | None = pwd.getpwuid(os.getuid())
    except KeyError:
        known = None
    if known is None and not any(os.environ.get(name) for name in USER_NAMES):
        os.environ["USER"] = os.environ["LOGNAME"] = NOBODY
    if known is None and not os.environ.get("HOME"):
        home = Path(tempfile.gettempdir()) / f"{NOBODY}-{os.getuid()}"
        home.mkdir(mode=0o700, exist_ok=True)
        os.environ["HOME"] = str(home)
