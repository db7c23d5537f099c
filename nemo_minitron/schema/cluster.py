"""A site: how its scheduler, its nodes and its containers are asked for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from nemo_minitron.schema.base import Schema, StageName, UserPath

Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.,:/@=+\[\]%&|*()-]+$")]
"""One word of a scheduler's option: no space, quote, `$` or line break, as it stands in an #SBATCH line."""
EnvironmentName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
SbatchOption = Annotated[str, Field(pattern=r"^--[a-z][a-z0-9-]*(=[A-Za-z0-9_.,:/@=+\[\]%&|*()-]+)?$")]


class Resources(Schema):
    """What a job asks for; null: what the cluster says."""

    partition: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    time_min: PositiveInt | None = None
    mem_gib: NonNegativeInt | None = None
    """Of each node; 0: all that it has."""
    gpus_per_node: NonNegativeInt | None = None
    cpus_per_node: PositiveInt | None = None
    max_restarts: NonNegativeInt | None = None


class Mount(Schema):
    """A folder or file of the node, inside the container."""

    source: UserPath
    target: str | None = None
    """null: the same path."""
    read_only: bool = False


class Container(Schema):
    """What the stages run in. The run's folder, the assets and the folder of the call are always mounted."""

    runtime: Literal["none", "pyxis", "apptainer", "singularity", "docker"] = "none"
    core_image: UserPath | None = None
    """A file (./NAME.sqsh for pyxis, NAME.sif for Apptainer), or a name in a registry as the runtime writes it.

    nvcr.io#nvidia/nemo:24.12 for pyxis, docker://nvcr.io/nvidia/nemo:24.12 for Apptainer, nvcr.io/nvidia/nemo:24.12 for
    docker.
    """
    aligner_image: UserPath | None = None
    """For the stages of NeMo-Aligner."""
    mounts: tuple[Mount, ...] = ()
    shm_gib: PositiveInt | None = None
    """Shared memory for docker; null: the host's."""


class Cluster(Schema):
    """One site. Kept as configs/cluster/NAME.yaml and chosen with cluster=NAME, or with cluster=path/to/file.yaml."""

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    reservation: Word | None = None
    gpus_per_node: NonNegativeInt = 8
    """0: a cluster without GPUs."""
    ranks_per_node: PositiveInt | None = None
    """Processes of a layout on each node; null: one for each GPU."""
    gpu_option: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """How GPUs are asked for; none: the partition gives whole nodes."""
    cpus_per_node: PositiveInt | None = None
    mem_gib: NonNegativeInt | None = None
    """Memory of each node to ask for; 0: all that it has; null: the site's default."""
    exclusive: bool = False
    """Whole nodes for stages that use GPUs."""
    time_min: PositiveInt = 240
    """Limit of a job; a stage that takes longer saves itself and goes on in the next."""
    grace_s: Annotated[int, Field(ge=1, le=65535)] = 300
    """Seconds before the limit at which a stage is asked to save: the time of a checkpoint and a minute."""
    requeue: bool = True
    """Whether jobs may be queued again; without it a stage is a chain of `links` jobs."""
    links: PositiveInt = 6
    max_restarts: NonNegativeInt = 50
    """Of a stage, by time limits and lost nodes together; each must have saved something new."""
    array_limit: PositiveInt | None = None
    """Candidates of a search that run at the same time; null: as many as fit."""
    cpu: Resources = Resources(gpus_per_node=0)
    """For stages that use no GPU (reading, selecting, cutting, reporting)."""
    by_stage: dict[StageName, Resources] = Field(default_factory=dict)
    sbatch: tuple[SbatchOption, ...] = ()
    """More options for every job, such as --mail-type=FAIL."""
    modules: tuple[Word, ...] = ()
    """Environment modules to load on the node."""
    setup_script: UserPath | None = None
    """A bash file that every job sources on the node first."""
    environment: dict[EnvironmentName, str] = Field(default_factory=dict)
    """Set in every job."""
    command: str | None = None
    """The minitron program of the jobs; null: the one that submits, or `minitron` in a container."""
    agent: Literal["torchrun", "ft_launcher"] = "torchrun"
    """What starts and watches the processes of a node; ft_launcher is of nvidia-resiliency-ext, and restarts them."""
    container: Container = Container()
