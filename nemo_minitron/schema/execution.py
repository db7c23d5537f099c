"""Where and how a recipe runs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from nemo_minitron.schema.base import Off, Schema, StageName, UserPath
from nemo_minitron.schema.cluster import Cluster
from nemo_minitron.schema.planning import Planning


class Parallel(Schema):
    """Megatron's parallel layout. The number of processes is tp * pp * cp * dp."""

    tp: PositiveInt = 1
    """Tensor parallelism: every layer is split over this many processes."""
    pp: PositiveInt = 1
    """Pipeline parallelism: the layers are split into this many stages."""
    cp: PositiveInt = 1
    """Context parallelism: every sequence is split over this many processes."""
    dp: PositiveInt = 1
    """Data parallelism: every batch is split over this many copies of the model."""
    sequence_parallel: bool = False
    """Split norms and the residual stream over the tensor-parallel processes as well."""
    micro_batch_size: PositiveInt = 1
    """Sequences per forward pass on each data-parallel process."""
    distributed_optimizer: bool = False
    """Split the optimizer state over the data-parallel processes (ZeRO-1), in fp32."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Compute activations again in the backward pass, those of attention (selective) or of whole layers (full). This
    takes less memory and more time."""
    overlap_grad_reduce: bool = False
    """Sum gradients over the data-parallel processes during the backward pass."""
    overlap_param_gather: bool = False
    """Gather parameters during the forward pass. Needs distributed_optimizer and overlap_grad_reduce."""

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp


class Kernels(Schema):
    """Faster paths of a training step. Loss and gradients stay the same up to rounding."""

    chunk_tokens: PositiveInt | None = None
    """Tokens whose logits are in memory at a time. null: on a GPU a multiple of 256, at least 4096, for fast matrix
    products; on a CPU the tokens of 256 MiB of logits."""
    head_gradient_in_place: bool = True
    """Add the gradient of the output layer's weight to Megatron's fp32 gradient buffer directly, without a buffer of
    its own and without rounding to bf16."""
    fused_kl: Annotated[Literal["auto", "triton", "torch", "off"], Off] = "auto"
    """How forward KL and its gradient are computed if the loss has no other term on logits. triton: two Triton kernels
    that read logits in bf16 and overwrite them with the gradient. torch: the same in PyTorch, compiled by torch.compile
    on a GPU. off: as all other losses. auto: triton on a GPU if Triton is installed, else off."""
    fuse_rope: bool = True
    """Rotate queries and keys by one kernel of Transformer Engine, where it is used."""
    fuse_weight_gradient: bool = True
    """Let Transformer Engine's linear layers add weight gradients to Megatron's fp32 gradient buffer inside the matrix
    product, where it is used."""


class Execution(Schema):
    """Where and how a recipe runs. Two runs that differ only here give the same artifacts."""

    run_root: UserPath = "runs"
    """Folder that holds the folders of all runs."""
    assets_dir: UserPath = "assets"
    """Folder of downloaded assets."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the stages. auto: a GPU if there is one."""
    threads: PositiveInt | None = None
    """CPU threads of each process. null: OMP_NUM_THREADS if it is set, else cores divided by processes."""
    workers: PositiveInt | None = None
    """Processes for tokenization. null: one for each core."""
    deterministic: bool = False
    """Use only algorithms that give the same bits each time on the same number of GPUs of the same kind, where there
    are any. This is slower. On a CPU, results are the same bits anyway."""
    async_checkpoints: bool = True
    """Write training checkpoints from a thread while the training continues. This needs memory for a copy of the
    weights and the optimizer state."""
    wandb_project: str | None = None
    """Log the curves to this project of Weights & Biases as well. Needs `pip install "nemo-minitron[tracking]"`."""
    peak_tflops: Annotated[float, Field(gt=0.0)] | None = None
    """Peak TFLOP/s of one process, for the MFU that training shows. null: measured with a matrix product at the start.
    """
    parallel: Parallel = Parallel()
    """Parallel layout of all stages that have one."""
    parallel_by_stage: dict[StageName, Parallel] = Field(default_factory=dict)
    """Stage name -> its own parallel layout. A search stands for its candidates."""
    server_nodes_by_stage: dict[StageName, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)
    """Stage name -> nodes of its Slurm job, in addition to those of its layout, that run only the servers of a
    training on rewards (one for the rewards, for ppo one for the critic). A stage that is not listed has one such node
    if its layout takes several nodes, else none: its servers then run beside its processes."""
    kernels: Kernels = Kernels()
    """Faster paths of a training step."""
    notify_command: tuple[str, ...] = ()
    """A program and its arguments, called when a stage has finished, failed or stopped. It gets MINITRON_RUN,
    MINITRON_STAGE, MINITRON_STATUS and MINITRON_MESSAGE as environment variables."""
    launcher: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$")] = "local"
    """Where `minitron launch` runs the stages. `launcher=slurm` is short for execution.launcher=slurm."""
    cluster: Cluster | None = None
    """The site of `minitron launch`. `cluster=NAME` takes it from configs/cluster/NAME.yaml."""
    planning: Planning = Planning()
    """What `minitron plan` assumes about hardware and prices."""
