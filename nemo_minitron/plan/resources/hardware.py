"""What one process can compute and hold."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_minitron.config.recipe import Recipe
from nemo_minitron.schema.planning import HardwareName


@dataclass(frozen=True)
class Hardware:
    """One GPU, or the cores of a laptop.

    peak_tflops: bf16 products without sparsity, of one process. memory_gib: None where it is the machine's.
    usual_mfu: reached by trainings of this size; measured values go into execution.planning.mfu.
    """

    name: HardwareName
    peak_tflops: float
    memory_gib: float | None
    usual_mfu: float


HARDWARE: dict[HardwareName, Hardware] = {
    found.name: found
    for found in (
        # NVIDIA's data sheets, dense bf16 tensor cores: half of the figure that is given with sparsity.
        Hardware("A100", 312.0, 80.0, 0.45),  # A100 80GB SXM
        Hardware("H100", 989.4, 80.0, 0.40),  # H100 SXM5
        Hardware("H200", 989.4, 141.0, 0.40),  # H200 SXM
        Hardware("B200", 2250.0, 180.0, 0.40),  # HGX B200, for each GPU
        Hardware("L40S", 362.05, 48.0, 0.35),
        # Two cores with AVX-512 or the like; execution.peak_tflops says it better.
        Hardware("CPU", 0.15, None, 0.5),
    )
}


def hardware_of(recipe: Recipe) -> Hardware:
    """What the recipe plans for; a CPU where it says nothing of GPUs."""
    execution = recipe.execution
    name = execution.planning.hardware
    if name is None:
        has_gpus = execution.cluster is not None and execution.cluster.gpus_per_node > 0
        name = "H100" if execution.device == "cuda" or has_gpus else "CPU"
    return HARDWARE[name]


def peak_tflops(recipe: Recipe) -> float:
    """Of one process: as the recipe says, else the table's."""
    return recipe.execution.peak_tflops or hardware_of(recipe).peak_tflops
