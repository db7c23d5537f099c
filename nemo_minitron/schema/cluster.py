"""Keys of a site: its scheduler, its nodes and its containers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from nemo_minitron.schema.base import Schema, StageName, UserPath

Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.,:/@=+\[\]%&|*()-]+$")]
"""One word of a scheduler's option: no space, quote, `$` or line break, which an #SBATCH line cannot hold."""
EnvironmentName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
SbatchOption = Annotated[str, Field(pattern=r"^--[a-z][a-z0-9-]*(=[A-Za-z0-9_.,:/@=+\[\]%&|*()-]+)?$")]


class Resources(Schema):
    """Resources that a job requests. null: the value of the cluster."""

    partition: Word | None = None
    """Slurm partition."""
    qos: Word | None = None
    """Slurm quality of service."""
    constraint: Word | None = None
    """Slurm node features."""
    time_min: PositiveInt | None = None
    """Time limit in minutes."""
    mem_gib: NonNegativeInt | None = None
    """Memory of each node in GiB. 0: all of it."""
    gpus_per_node: NonNegativeInt | None = None
    """GPUs of each node."""
    cpus_per_node: PositiveInt | None = None
    """CPU cores of each node."""
    max_restarts: NonNegativeInt | None = None
    """How often a stage may restart."""


class Mount(Schema):
    """A folder or file of the node that containers see."""

    source: UserPath
    """Path on the node; a relative one begins at the folder of the call."""
    target: Annotated[str, Field(pattern="^/")] | None = None
    """Absolute path in the container. null: the same path."""
    read_only: bool = False
    """Do not allow writing."""


class Container(Schema):
    """What the stages run in. The run's folder, the assets and the working folder are always mounted."""

    runtime: Literal["none", "pyxis", "apptainer", "singularity", "docker"] = "none"
    """Container runtime."""
    core_image: UserPath | None = None
    """Image for all stages but those of NeMo-Aligner: a file (./NAME.sqsh for pyxis, NAME.sif for Apptainer), or a name
    in a registry in the notation of the runtime.

    For example nvcr.io#nvidia/nemo:24.12 for pyxis, docker://nvcr.io/nvidia/nemo:24.12 for Apptainer,
    nvcr.io/nvidia/nemo:24.12 for docker.
    """
    aligner_image: UserPath | None = None
    """Image for the stages of NeMo-Aligner."""
    mounts: tuple[Mount, ...] = ()
    """More folders and files to mount."""
    shm_gib: PositiveInt | None = None
    """Shared memory for docker in GiB. null: that of the host."""


class Cluster(Schema):
    """One site. It is kept as configs/cluster/NAME.yaml and chosen with cluster=NAME, or with
    cluster=path/to/file.yaml."""

    partition: Word | None = None
    """Slurm partition."""
    account: Word | None = None
    """Slurm account."""
    qos: Word | None = None
    """Slurm quality of service."""
    constraint: Word | None = None
    """Slurm node features."""
    reservation: Word | None = None
    """Slurm reservation."""
    gpus_per_node: NonNegativeInt = 8
    """GPUs of each node. 0: a cluster without GPUs."""
    ranks_per_node: PositiveInt | None = None
    """Processes on each node. null: one for each GPU."""
    gpu_option: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """How jobs request GPUs. none: the partition always gives whole nodes."""
    cpus_per_node: PositiveInt | None = None
    """CPU cores of each node. null: the site's default."""
    mem_gib: NonNegativeInt | None = None
    """Memory of each node in GiB. 0: all of it. null: the site's default."""
    exclusive: bool = False
    """Request whole nodes for stages that use GPUs or several nodes."""
    time_min: PositiveInt = 240
    """Time limit of a job in minutes. A stage that takes longer saves its state and continues in the next job.
    evaluate and score save nothing before they end, so it must be enough for them."""
    grace_s: Annotated[int, Field(ge=1, le=65535)] = 300
    """Seconds before the time limit at which a checkpoint is requested: the time of a checkpoint plus a minute."""
    requeue: bool = True
    """Whether jobs may be requeued. If not, a stage becomes a chain of `links` jobs."""
    links: PositiveInt = 6
    """Jobs in the chain of a stage, if jobs cannot be requeued."""
    max_restarts: NonNegativeInt = 50
    """How often a stage may restart after time limits and lost nodes. Each restart must have saved new progress."""
    array_limit: PositiveInt | None = None
    """Candidates of a search that run at the same time. null: as many as fit."""
    cpu: Resources = Resources(gpus_per_node=0)
    """What stages without a GPU request (reading, selecting, pruning, reporting), and with execution.device: cpu all
    stages."""
    by_stage: dict[StageName, Resources] = Field(default_factory=dict)
    """Stage name -> what its job requests. A search stands for its candidates, too."""
    sbatch: tuple[SbatchOption, ...] = ()
    """More options for every job, such as --mail-type=FAIL."""
    modules: tuple[Word, ...] = ()
    """Environment modules to load on the node."""
    setup_script: UserPath | None = None
    """A bash file that every job sources first on the node."""
    environment: dict[EnvironmentName, str] = Field(default_factory=dict)
    """Environment variables of every job."""
    command: str | None = None
    """The minitron program in the jobs. null: the one that submits, or `minitron` in a container."""
    agent: Literal["torchrun", "ft_launcher"] = "torchrun"
    """Program that starts and watches the processes of a node. ft_launcher is part of nvidia-resiliency-ext and
    restarts them."""
    container: Container = Container()
    """What the stages run in."""
