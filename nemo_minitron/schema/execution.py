"""Where and how a recipe runs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from nemo_minitron.schema.base import Schema, StageName, UserPath
from nemo_minitron.schema.cluster import Cluster
from nemo_minitron.schema.planning import Planning


class Parallel(Schema):
    """Megatron's parallel layout. The number of processes is tp * pp * cp * dp."""

    tp: PositiveInt = 1
    pp: PositiveInt = 1
    cp: PositiveInt = 1
    """Context parallelism: every sequence of a training is split over so many processes."""
    dp: PositiveInt = 1
    sequence_parallel: bool = False
    micro_batch_size: PositiveInt = 1
    """Sequences per forward pass and data-parallel rank."""
    distributed_optimizer: bool = False
    """Each data-parallel rank keeps a part of the optimizer's states (ZeRO-1), in fp32."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass: of attention, or of whole layers. Less memory, more time."""
    overlap_grad_reduce: bool = False
    """Gradients are summed over data-parallel ranks while the backward pass goes on."""
    overlap_param_gather: bool = False
    """Parameters are gathered while the forward pass goes on; needs distributed_optimizer and overlap_grad_reduce."""

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp


class Execution(Schema):
    """Where and how; two runs that differ only here give the same artifacts."""

    run_root: UserPath = "runs"
    assets_dir: UserPath = "assets"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: PositiveInt | None = None
    """CPU threads of each process; None: OMP_NUM_THREADS where that is set, else cores divided by processes."""
    workers: PositiveInt | None = None
    """Processes for tokenization; None: all cores."""
    async_checkpoints: bool = True
    """Training checkpoints are written by a thread while the training goes on, from a copy in memory that is as large
    as weights and optimizer states."""
    wandb_project: str | None = None
    """Log the curves to this project of Weights & Biases as well; needs `pip install "nemo-minitron[tracking]"`."""
    peak_tflops: Annotated[float, Field(gt=0.0)] | None = None
    """Of one process, for the MFU that training shows; null: measured with a matrix product at the start."""
    parallel: Parallel = Parallel()
    parallel_by_stage: dict[StageName, Parallel] = Field(default_factory=dict)
    notify_command: tuple[str, ...] = ()
    """A program and its words, called when a stage has finished, failed or stopped; it finds MINITRON_RUN,
    MINITRON_STAGE, MINITRON_STATUS and MINITRON_MESSAGE in its environment."""
    launcher: Literal["local", "slurm"] = "local"
    """For `minitron launch`; `launcher=slurm` is short for it."""
    cluster: Cluster | None = None
    """Where `minitron launch` submits; `cluster=NAME` takes it from configs/cluster/NAME.yaml."""
    planning: Planning = Planning()
    """What `minitron plan` assumes of machines and prices."""
