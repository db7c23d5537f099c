"""Command lines that run a program in a container. Pure; lists of words, quoted where they reach a shell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_minitron.config.schema import Cluster, Container, Mount
from nemo_minitron.errors import PlanError
from nemo_minitron.launch.jobs import Environment, image_of

IN_CONTAINER = "minitron"


@dataclass(frozen=True)
class Place:
    """What the stages of one run need to see, and where they start."""

    cwd: Path
    folders: tuple[Path, ...]
    """Mounted at the same path: the run, the assets, the folder of the call."""


def _image(container: Container, environment: Environment) -> str:
    """Of jobs that `missing_images` has nothing to say of."""
    image = image_of(container, environment)
    assert image is not None, environment
    return image


def mounts_of(container: Container, place: Place) -> list[Mount]:
    """Every mount: the run's own, without those that lie in another, then the site's.

    Raises:
        PlanError: a path that the runtime's option cannot carry.
    """
    folders = [path for path in place.folders if not any(other in path.parents for other in place.folders)]
    found = [Mount(source=str(path)) for path in dict.fromkeys(folders)] + list(container.mounts)
    for mount in found:
        for path in (mount.source, mount.target or mount.source):
            if any(letter in path for letter in ',:"\n'):
                raise PlanError(
                    f"A container cannot mount {path!r}: its option takes no comma, colon, quote or line break.",
                    next_step="Rename the folder, or set execution.run_root to another one.",
                )
    return found


def srun_options(cluster: Cluster, environment: Environment, place: Place) -> list[str]:
    """Options of srun for pyxis; none for other runtimes."""
    container = cluster.container
    if container.runtime != "pyxis":
        return []
    return [
        f"--container-image={_image(container, environment)}",
        f"--container-mounts={','.join(_bind(mount) for mount in mounts_of(container, place))}",
        f"--container-workdir={place.cwd}",
        "--no-container-mount-home",
    ]


def inside(command: Sequence[str], cluster: Cluster, environment: Environment, place: Place) -> list[str]:
    """The command as the node starts it."""
    container = cluster.container
    if container.runtime not in ("apptainer", "singularity"):
        return list(command)
    words = [container.runtime, "exec", "--no-home", f"--pwd={place.cwd}"]
    words += ["--nv"] if cluster.gpus_per_node else []
    words += [f"--bind={_bind(mount)}" for mount in mounts_of(container, place)]
    return [*words, _image(container, environment), *command]


def docker_run(
    command: Sequence[str], cluster: Cluster, environment: Environment, place: Place, *, user: str, terminal: bool
) -> list[str]:
    """`docker run` for this machine: files belong to the caller, memory is locked for NCCL, GPUs are seen.

    Args:
        user: `uid:gid`.
        terminal: whether a person watches.
    """
    container = cluster.container
    words = ["docker", "run", "--rm", "--init", f"--user={user}", "--env=HOME=/tmp"]
    words += ["--interactive", "--tty"] if terminal else []
    words += ["--gpus=all"] if cluster.gpus_per_node else []
    words += [f"--shm-size={container.shm_gib}g"] if container.shm_gib else ["--ipc=host"]
    words += ["--ulimit=memlock=-1", "--ulimit=stack=67108864", f"--workdir={place.cwd}"]
    words += [f"--volume={_bind(mount)}" for mount in mounts_of(container, place)]
    words += [f"--env={name}={value}" for name, value in cluster.environment.items()]
    return [*words, _image(container, environment), *command]


def _bind(mount: Mount) -> str:
    return f"{mount.source}:{mount.target or mount.source}" + (":ro" if mount.read_only else "")
