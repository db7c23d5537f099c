"""The `docker run` command of one stage. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_minitron.launch.containers import bind, image_name, inner_environment, mounts_of
from nemo_minitron.launch.context import JobFolders
from nemo_minitron.launch.jobs import Environment
from nemo_minitron.schema.cluster import Cluster
from nemo_minitron.system.disclosure import looks_secret
from nemo_minitron.system.ownership import TRUST_VARIABLE

BY_NAME = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HF_ENDPOINT",
    "WANDB_API_KEY",
    "WANDB_MODE",
    "OMP_NUM_THREADS",
    TRUST_VARIABLE,
    *(f"{kind}_proxy" for kind in ("http", "https", "no", "all")),
    *(f"{kind}_PROXY" for kind in ("HTTP", "HTTPS", "NO", "ALL")),
)
"""Variables passed to docker by name only, because their values may be secret. pyxis and Apptainer pass on the caller's
environment."""


def docker_run(
    command: Sequence[str],
    cluster: Cluster,
    environment: Environment,
    folders: JobFolders,
    *,
    user: str,
    terminal: bool,
) -> list[str]:
    """Return `docker run` for this machine: the caller owns the files, NCCL can lock memory, GPUs are visible.

    Args:
        user: `uid:gid`.
        terminal: whether the command runs in an interactive terminal.
    """
    container = cluster.container
    words = ["docker", "run", "--rm", "--init", f"--user={user}"]
    words += ["--interactive", "--tty"] if terminal else []
    words += ["--gpus=all"] if cluster.gpus_per_node else []
    words += [f"--shm-size={container.shm_gib}g"] if container.shm_gib else ["--ipc=host"]
    words += ["--ulimit=memlock=-1", "--ulimit=stack=67108864", f"--workdir={folders.cwd}"]
    words += [f"--volume={bind(mount)}" for mount in mounts_of(container, folders)]
    own = inner_environment(cluster, folders)
    own |= {name: value for name, value in cluster.environment.items() if _is_read_by_docker(name)}
    words += [f"--env={name}={value}" for name, value in own.items()]
    words += [f"--env={name}" for name in dict.fromkeys([*docker_environment(cluster), *BY_NAME])]
    return [*words, image_name(container, environment, folders), *command]


def docker_environment(cluster: Cluster) -> dict[str, str]:
    """Return the variables that the docker program needs in its own environment to pass them on by name."""
    return {name: value for name, value in cluster.environment.items() if not _is_read_by_docker(name)}


def _is_read_by_docker(name: str) -> bool:
    """Return whether the variable would change what the docker program does, so that it cannot be passed by name."""
    return not looks_secret(name) and (name in ("PATH", "HOME") or name.startswith(("DOCKER_", "LD_", "XDG_")))
