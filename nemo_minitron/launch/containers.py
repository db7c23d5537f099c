"""Command lines that run a program in a container. Pure; lists of words, quoted where they reach a shell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_minitron.errors import PlanError
from nemo_minitron.launch import images
from nemo_minitron.launch.jobs import Environment, image_of
from nemo_minitron.schema.cluster import Cluster, Container, Mount
from nemo_minitron.system.disclosure import looks_secret

IN_CONTAINER = "minitron"
USER = "minitron"
"""The name of the user inside; the image's list of users need not have the caller."""
BY_NAME = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HF_ENDPOINT",
    "WANDB_API_KEY",
    *(f"{kind}_proxy" for kind in ("http", "https", "no", "all")),
    *(f"{kind}_PROXY" for kind in ("HTTP", "HTTPS", "NO", "ALL")),
)
"""Handed to docker without their values, which may be secret; pyxis and Apptainer hand on the caller's environment."""
ENVIRONMENT_FILE = "environment.sh"
"""In the folder of a submission, for its owner alone: `execution.cluster.environment`, as a shell reads it."""
_SOURCING = '. "$1" && shift && exec "$@"'
"""For a shell inside a container: take the variables of a file, then become the program."""


@dataclass(frozen=True)
class Place:
    """What the stages of one run need to see, and where they start."""

    cwd: Path
    run: Path
    assets: Path
    launch: Path
    """Folder of this submission, in the run's."""

    @property
    def environment_file(self) -> Path:
        return self.launch / ENVIRONMENT_FILE

    @property
    def folders(self) -> tuple[Path, ...]:
        """Mounted at the same path."""
        return (self.run, self.assets, self.cwd)

    @property
    def home(self) -> Path:
        """The home folder inside containers, which belongs to the run."""
        return self.run / ".home"

    @property
    def hub(self) -> Path:
        """Where the Hugging Face hub's downloads lie, for containers."""
        return self.assets / ".huggingface"


def folders_to_make(place: Place) -> tuple[Path, ...]:
    """What must be there before a container starts: a mount that is missing would be refused, or made by root."""
    return (place.home, place.hub)


def inner_environment(cluster: Cluster, place: Place) -> dict[str, str]:
    """Variables of processes inside a container, but for those that the site sets itself.

    Torch and Triton ask for the user's name and keep caches in the home folder, and a container has neither.
    """
    own = {
        "HOME": str(place.home),
        "USER": USER,
        "LOGNAME": USER,
        "TORCHINDUCTOR_CACHE_DIR": str(place.home / "torchinductor"),
        "TRITON_CACHE_DIR": str(place.home / "triton"),
        "HF_HOME": str(place.hub),
    }
    return {name: value for name, value in own.items() if name not in cluster.environment}


def _image(container: Container, environment: Environment, place: Place) -> str:
    """The image of a job that has one; see `missing_images`."""
    image = image_of(container, environment)
    assert image is not None, environment
    return images.absolute(container.runtime, image, place.cwd)


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
        f"--container-image={_image(container, environment, place)}",
        f"--container-mounts={','.join(_bind(mount) for mount in mounts_of(container, place))}",
        f"--container-workdir={place.cwd}",
        "--no-container-mount-home",
    ]


def inside(command: Sequence[str], cluster: Cluster, environment: Environment, place: Place) -> list[str]:
    """The command as the node starts it."""
    container = cluster.container
    if container.runtime == "none":
        return list(command)
    # Set inside, where neither the image nor the runtime changes them any more. The site's come from a file: everybody
    # on a node can read command lines.
    words = ["env", *(f"{name}={value}" for name, value in inner_environment(cluster, place).items())]
    words += ["sh", "-c", _SOURCING, "sh", str(place.environment_file)] if cluster.environment else []
    command = [*words, *command]
    if container.runtime not in images.APPTAINER:
        return command
    words = [container.runtime, "exec", "--no-home", f"--pwd={place.cwd}"]
    words += ["--nv"] if cluster.gpus_per_node else []
    words += [f"--bind={_bind(mount)}" for mount in mounts_of(container, place)]
    return [*words, _image(container, environment, place), *command]


def docker_run(
    command: Sequence[str], cluster: Cluster, environment: Environment, place: Place, *, user: str, terminal: bool
) -> list[str]:
    """`docker run` for this machine: files belong to the caller, memory is locked for NCCL, GPUs are seen.

    Args:
        user: `uid:gid`.
        terminal: whether a person watches.
    """
    container = cluster.container
    words = ["docker", "run", "--rm", "--init", f"--user={user}"]
    words += ["--interactive", "--tty"] if terminal else []
    words += ["--gpus=all"] if cluster.gpus_per_node else []
    words += [f"--shm-size={container.shm_gib}g"] if container.shm_gib else ["--ipc=host"]
    words += ["--ulimit=memlock=-1", "--ulimit=stack=67108864", f"--workdir={place.cwd}"]
    words += [f"--volume={_bind(mount)}" for mount in mounts_of(container, place)]
    own = inner_environment(cluster, place)
    own |= {name: value for name, value in cluster.environment.items() if _is_read_by_docker(name)}
    words += [f"--env={name}={value}" for name, value in own.items()]
    words += [f"--env={name}" for name in dict.fromkeys([*docker_environment(cluster), *BY_NAME])]
    return [*words, _image(container, environment, place), *command]


def docker_environment(cluster: Cluster) -> dict[str, str]:
    """What the docker program itself needs in its environment: it hands these on by name, without showing values."""
    return {name: value for name, value in cluster.environment.items() if not _is_read_by_docker(name)}


def _is_read_by_docker(name: str) -> bool:
    """Whether the variable would change what the docker program does, so that it cannot be handed on by name."""
    return not looks_secret(name) and (name in ("PATH", "HOME") or name.startswith(("DOCKER_", "LD_", "XDG_")))


def _bind(mount: Mount) -> str:
    return f"{mount.source}:{mount.target or mount.source}" + (":ro" if mount.read_only else "")
