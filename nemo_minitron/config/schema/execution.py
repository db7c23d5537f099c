"""Where and how a recipe runs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from nemo_minitron.config.schema.base import Schema, StageName


class Parallel(Schema):
    """Megatron's parallel layout. The number of processes is tp * pp * dp."""

    tp: PositiveInt = 1
    pp: PositiveInt = 1
    dp: PositiveInt = 1
    sequence_parallel: bool = False
    micro_batch_size: PositiveInt = 1
    """Sequences per forward pass and data-parallel rank."""

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp


class Execution(Schema):
    """Where and how; two runs that differ only here give the same artifacts."""

    run_root: str = "runs"
    assets_dir: str = "assets"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: PositiveInt | None = None
    """CPU threads of each process; None: cores divided by processes."""
    workers: PositiveInt | None = None
    """Processes for tokenization; None: all cores."""
    async_checkpoints: bool = True
    """Training checkpoints are written by a thread while the training goes on, from a copy in memory that is as large
    as weights and optimizer states."""
    wandb_project: str | None = None
    """Log the curves to this project of Weights & Biases as well; needs `pip install "nemo-minitron[tracking]"`."""
    parallel: Parallel = Parallel()
    parallel_by_stage: dict[StageName, Parallel] = Field(default_factory=dict)
