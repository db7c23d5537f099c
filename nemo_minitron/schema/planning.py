"""What `minitron plan` reckons with. Never enters a fingerprint, changes no result."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from nemo_minitron.schema.base import Schema

HardwareName = Literal["CPU", "A100", "H100", "H200", "B200", "L40S"]


class Planning(Schema):
    """Assumptions about the machines and the money."""

    hardware: HardwareName | None = None
    """null: CPU on a CPU and for clusters without GPUs, else H100."""
    num_gpus: PositiveInt | None = None
    """For proposals of layouts; null: as many as the recipe's layout uses."""
    mfu: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Share of the peak that a training reaches; null: the hardware's usual one."""
    price_per_gpu_hour: Annotated[float, Field(ge=0.0)] | None = None
    """In the currency of your choice; null: no cost is shown."""
    reserve_gib: Annotated[float, Field(ge=0.0)] = 6.0
    """Of each GPU, for the CUDA context, NCCL and fragmentation."""
