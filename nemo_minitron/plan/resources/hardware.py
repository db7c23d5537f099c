"""Peak performance and memory of the hardware that a run is planned for."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_minitron.config.recipe import Recipe
from nemo_minitron.schema.planning import HardwareName


@dataclass(frozen=True)
class Hardware:
    """The hardware of one process: a GPU, or the cores of a laptop."""

    name: HardwareName
    peak_tflops: float
    """Dense bf16 matrix products, without sparsity."""
    memory_gib: float | None
    """Memory of the GPU; None for a CPU, which uses the memory of the machine."""
    usual_mfu: float
    """Typical MFU of trainings; a measured value can be set in execution.planning.mfu."""


HARDWARE: dict[HardwareName, Hardware] = {
    found.name: found
    for found in (
        # From NVIDIA's data sheets, dense bf16 on tensor cores: half of the figure with sparsity.
        Hardware("A100", 312.0, 80.0, 0.45),  # A100 80GB SXM
        Hardware("H100", 989.4, 80.0, 0.40),  # H100 SXM5
        Hardware("H200", 989.4, 141.0, 0.40),  # H200 SXM
        Hardware("B200", 2250.0, 180.0, 0.40),  # HGX B200, for each GPU
        Hardware("L40S", 362.05, 48.0, 0.35),
        # About two cores with AVX-512; set execution.peak_tflops for a measured value.
        Hardware("CPU", 0.15, None, 0.5),
    )
}


def hardware_of(recipe: Recipe) -> Hardware:
    """Return the hardware that the recipe names; by default an H100 if the recipe uses GPUs, else a CPU."""
    execution = recipe.execution
    name = execution.planning.hardware
    if name is None:
        has_gpus = execution.cluster is not None and execution.cluster.gpus_per_node > 0
        name = "H100" if execution.device == "cuda" or has_gpus else "CPU"
    return HARDWARE[name]


def peak_tflops(recipe: Recipe) -> float:
    """Return the peak of one process, in TFLOP/s: execution.peak_tflops, else the value for the hardware."""
    return recipe.execution.peak_tflops or hardware_of(recipe).peak_tflops
