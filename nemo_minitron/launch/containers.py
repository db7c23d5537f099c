"""Command lines that run a program in a container. Pure: lists of words, quoted where they reach a shell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemo_minitron.errors import PlanError
from nemo_minitron.launch import images
from nemo_minitron.launch.context import JobFolders
from nemo_minitron.launch.jobs import Environment, image_of
from nemo_minitron.schema.cluster import Cluster, Container, Mount

PROGRAM = "minitron"
"""The program inside a container."""
USER = "minitron"
"""Name of the user inside a container; the caller need not be in the image's list of users."""
_SOURCE_FIRST = '. "$1" && shift && exec "$@"'
"""Command for a shell inside a container: source a file of variables, then become the program."""


def folders_to_make(folders: JobFolders) -> tuple[Path, ...]:
    """Return the folders that must exist before a container starts, or their mounts fail or are created by root."""
    return (folders.home, folders.hub)


def inner_environment(cluster: Cluster, folders: JobFolders) -> dict[str, str]:
    """Return variables of processes inside a container, without those that the site sets itself.

    Torch and Triton look up the user's name and keep caches in the home folder, and a container has neither.
    """
    own = {
        "HOME": str(folders.home),
        "USER": USER,
        "LOGNAME": USER,
        "TORCHINDUCTOR_CACHE_DIR": str(folders.home / "torchinductor"),
        "TRITON_CACHE_DIR": str(folders.home / "triton"),
        "HF_HOME": str(folders.hub),
    }
    return {name: value for name, value in own.items() if name not in cluster.environment}


def image_name(container: Container, environment: Environment, folders: JobFolders) -> str:
    """Return the image of a job as the runtime takes it; `missing_images` has checked that there is one."""
    image = image_of(container, environment)
    assert image is not None, environment
    return images.absolute(container.runtime, image, folders.cwd)


def mounts_of(container: Container, folders: JobFolders) -> list[Mount]:
    """Return every mount: the run's own folders, unless one contains another, then the site's mounts.

    Raises:
        PlanError: a path that the runtime's option cannot carry.
    """
    own = [path for path in folders.mounted if not any(other in path.parents for other in folders.mounted)]
    found = [Mount(source=str(path)) for path in dict.fromkeys(own)] + list(container.mounts)
    for mount in found:
        for path in (mount.source, mount.target or mount.source):
            if any(letter in path for letter in ',:"\n'):
                raise PlanError(
                    f"A container cannot mount {path!r}: its option takes no comma, colon, quote or line break.",
                    next_step="Rename the folder, or set execution.run_root to another one.",
                )
    return found


def bind(mount: Mount) -> str:
    """Return a mount as SOURCE:TARGET[:ro]."""
    return f"{mount.source}:{mount.target or mount.source}" + (":ro" if mount.read_only else "")


def inside(command: Sequence[str], cluster: Cluster, environment: Environment, folders: JobFolders) -> list[str]:
    """Return the command as the node starts it."""
    container = cluster.container
    if container.runtime == "none":
        return list(command)
    # Variables are set inside, where neither the image nor the runtime changes them any more. The site's variables come
    # from a file, because every user of a node can read command lines.
    words = ["env", *(f"{name}={value}" for name, value in inner_environment(cluster, folders).items())]
    words += ["sh", "-c", _SOURCE_FIRST, "sh", str(folders.environment_file)] if cluster.environment else []
    command = [*words, *command]
    if container.runtime not in images.APPTAINER:
        return command
    words = [container.runtime, "exec", "--no-home", f"--pwd={folders.cwd}"]
    words += ["--nv"] if cluster.gpus_per_node else []
    words += [f"--bind={bind(mount)}" for mount in mounts_of(container, folders)]
    return [*words, image_name(container, environment, folders), *command]
