"""Command lines that run a program in a container: lists of words, quoted where they reach a shell."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from nemo_minitron.errors import PlanError
from nemo_minitron.launch import images
from nemo_minitron.launch.context import JobFolders
from nemo_minitron.launch.jobs import Environment, image_of
from nemo_minitron.schema.cluster import Cluster, Container, Mount

USER = "minitron"
"""Name of the user inside a container; the caller need not be in the image's list of users."""
HOST_VARIABLES = (
    "PYTHONPATH",
    "PYTHONHOME",
    "HF_HUB_CACHE",
    "HUGGINGFACE_HUB_CACHE",
    "TRANSFORMERS_CACHE",
    "HF_DATASETS_CACHE",
    "MINITRON_ALIGNER_PYTHON",
)
"""Variables with paths of the host. pyxis and Apptainer pass on the caller's environment, where these are wrong."""
_HUB_VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
_MOST_LINKS = 40
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
    if not any(name in cluster.environment for name in _HUB_VARIABLES):
        own["HF_HUB_CACHE"] = str(folders.hub / "hub")  # a module or a script of the site may have set another one
    if cluster.agent != "torchrun":
        own["MINITRON_AGENT"] = cluster.agent
    return {name: value for name, value in own.items() if name not in cluster.environment}


def without_host_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the variables whose paths do not exist in a container."""
    return {name: value for name, value in environment.items() if name not in HOST_VARIABLES}


def image_name(container: Container, environment: Environment, folders: JobFolders) -> str:
    """Return the image of a job as the runtime takes it; `missing_images` has checked that there is one."""
    image = image_of(container, environment)
    assert image is not None, environment
    return images.absolute(container.runtime, image, folders.cwd)


def mounts_of(container: Container, folders: JobFolders) -> list[Mount]:
    """Return every mount: the run's own folders, unless one contains another, then the site's mounts.

    A folder that is reached through a link in another one, such as `runs -> /scratch/me/runs`, has a mount of its own
    where the link leads.

    Raises:
        PlanError: a path that the runtime's option cannot carry.
    """
    sites = site_mounts(container, folders)
    own = [path for path in folders.mounted if not any(other in path.parents for other in folders.mounted)]
    visible = [*own, *_same_places(mount for mount in sites if not mount.read_only)]
    linked = [place for path in folders.mounted if (place := _behind_links(path, visible)) is not None]
    found = [Mount(source=str(path)) for path in dict.fromkeys([*own, *linked])] + sites
    for mount in found:
        for path in (mount.source, mount.target or mount.source):
            if any(letter in path for letter in ',:"\n'):
                raise PlanError(
                    f"A container cannot mount {path!r}: its option takes no comma, colon, quote or line break.",
                    next_step="Rename the folder, or set execution.run_root to another one.",
                )
    return found


def site_mounts(container: Container, folders: JobFolders) -> list[Mount]:
    """Return the site's mounts with absolute sources; docker takes a relative one for the name of a new volume."""
    return [
        mount.model_copy(update={"source": os.path.normpath(folders.cwd / mount.source)}) for mount in container.mounts
    ]


def is_visible(path: Path, mounts: Sequence[Mount]) -> bool:
    """Return whether a container with these mounts sees what the host has at this absolute path."""
    return _behind_links(path, _same_places(mounts)) is None


def _same_places(mounts: Iterable[Mount]) -> list[Path]:
    """Return the folders that are at the same paths in the container and on the host."""
    return [Path(mount.source) for mount in mounts if mount.target in (None, mount.source)]


def _behind_links(path: Path, visible: Sequence[Path]) -> Path | None:
    """Follow the links of a path as a container does, and return the first place that it does not see.

    Args:
        visible: folders that the container sees at the same paths as the host.
    """
    for _ in range(_MOST_LINKS):
        bases = [other for other in visible if path == other or other in path.parents]
        if not bases:
            return path
        base = max(bases, key=lambda other: len(other.parts))
        steps = [step for step in (*reversed(path.parents), path) if base in step.parents]
        link = next((step for step in steps if os.path.islink(step)), None)
        if link is None:
            return None
        path = Path(os.path.normpath(link.parent / os.readlink(link) / path.relative_to(link)))
    return None


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
