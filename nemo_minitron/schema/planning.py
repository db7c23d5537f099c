"""Keys of the assumptions of `minitron plan`. They enter no fingerprint and change no result."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from nemo_minitron.schema.base import Schema

HardwareName = Literal["CPU", "A100", "H100", "H200", "B200", "GB200", "B300", "RTX_PRO_6000", "L40S", "A6000"]


class Planning(Schema):
    """What `minitron plan` assumes about hardware and prices. It never changes a result."""

    hardware: HardwareName | None = None
    """Hardware of one process. null: H100 for execution.device: cuda, and for auto with a cluster that has GPUs; else
    CPU, also on a machine that has a GPU."""
    num_gpus: PositiveInt | None = None
    """Number of GPUs for which layouts are proposed. null: as many as the recipe's layout uses."""
    mfu: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Fraction of the peak that a training reaches. null: the usual one of the hardware."""
    price_per_gpu_hour: Annotated[float, Field(ge=0.0)] | None = None
    """Price in any currency. null: no cost is shown."""
    reserve_gib: Annotated[float, Field(ge=0.0)] = 6.0
    """GiB of each GPU that are reserved for the CUDA context, NCCL and fragmentation."""
