"""Environment variables of an outer job, an outer torchrun or container hooks, which child processes must not inherit.

A job submitted from inside another job would inherit that job's memory, binding and task settings. A process that
inherits the rank variables of another launcher joins the wrong process group or waits forever.
"""

from __future__ import annotations

import os
import pwd
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")
"""Slurm settings that select the cluster or authenticate the user; jobs do not set them."""
JOB_PREFIXES = ("SLURM_", "SRUN_", "SBATCH_", "SALLOC_", "SLURMD_", "SPANK_", "_SLURM_")
"""Prefixes of the variables of a job and its steps, and of the defaults of sbatch, srun and salloc."""
FILTER_PREFIXES = ("SQUEUE_", "SINFO_", "SACCT_", "SCANCEL_", "SCONTROL_", "PYXIS_")
"""Prefixes of defaults that would change the output of Slurm's programs or the jobs that they cancel."""
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
"""Variables in which launch agents, MPI and enroot's PyTorch hook give each process its rank and rendezvous."""
SCRIPT_NAMES = (
    "MINITRON_NODES",
    "MINITRON_SERVER_NODES",
    "MINITRON_RENDEZVOUS",
    "MINITRON_ATTEMPT",
    "MINITRON_AGENT",
    "MINITRON_LAST_LINK",
    "MINITRON_STOP_FILE",
    "MINITRON_FAILED_FILE",
    "MINITRON_INTERRUPTED_FILE",
    "MINITRON_DIED_FILE",
)
"""Variables that the script of a job of `minitron launch` sets for its stage."""
DEVICE_NAMES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "NVIDIA_VISIBLE_DEVICES")
"""Variables that select the GPUs of this machine or job; they do not apply to another one."""
USER_NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")
"""Variables from which Python's getpass reads the user name."""
FALLBACK_USER = "minitron"
"""Name for a user who has no entry in the user database."""


def launcher_variables(names: Iterable[str]) -> set[str]:
    """Select the variables that give a process its rank."""
    return {name for name in names if name in LAUNCHER_NAMES or name.startswith(LAUNCHER_PREFIXES)}


def job_variables(names: Iterable[str]) -> set[str]:
    """Select the variables of a Slurm job, its steps and the defaults of Slurm's programs."""
    return {name for name in names if name.startswith(JOB_PREFIXES) and name not in KEPT}


def outer_job_ids(environment: Mapping[str, str]) -> set[str]:
    """Return the id of the Slurm job that this process belongs to, and that of its array; empty outside of a job."""
    return {environment[name] for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID") if name in environment}


def without_outer_job(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for a process that belongs to no job and no process group."""
    names = job_variables(environment) | launcher_variables(environment)
    return {name: value for name, value in environment.items() if name not in names}


def for_slurm(environment: Mapping[str, str], *, exported: bool = False) -> dict[str, str]:
    """Return the environment for one of Slurm's programs, so that its messages are in English.

    Args:
        exported: the program exports the environment to a job, which must keep the user's encoding.
    """
    kept = {
        name: value
        for name, value in without_outer_job(environment).items()
        if name not in (*DEVICE_NAMES, *SCRIPT_NAMES) and not name.startswith(FILTER_PREFIXES)
    }
    if "SLURM_JOB_ID" in environment:
        kept.pop("TMPDIR", None)  # often a folder that is deleted when the outer job ends
    if not exported:
        return {**kept, "LC_ALL": "C"}
    encoding = kept.pop("LC_ALL", "")
    return {**kept, **({"LC_CTYPE": encoding} if encoding else {}), "LC_MESSAGES": "C"}


def dropped_defaults(environment: Mapping[str, str]) -> list[str]:
    """List the sbatch defaults that the user has set and that `for_slurm` removes. Use it outside of a job."""
    return sorted(name for name in environment if name.startswith("SBATCH_") and name not in KEPT)


def unset_launcher_variables() -> None:
    """Remove the rank variables that another launcher or a container hook has set for this process."""
    for name in launcher_variables(os.environ):
        del os.environ[name]


def ensure_user_name() -> None:
    """Set a user name and a home folder if the uid has none, as in a container that runs with another uid."""
    try:
        known: pwd.struct_passwd | None = pwd.getpwuid(os.getuid())
    except KeyError:
        known = None
    if known is None and not any(os.environ.get(name) for name in USER_NAMES):
        os.environ["USER"] = os.environ["LOGNAME"] = FALLBACK_USER
    if known is None and not os.environ.get("HOME"):
        home = Path(tempfile.gettempdir()) / f"{FALLBACK_USER}-{os.getuid()}"
        home.mkdir(mode=0o700, exist_ok=True)
        os.environ["HOME"] = str(home)
