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
    fp32_tflops: float
    """Matrix products in fp32, without tensor cores, because stages do not allow TF32."""
    memory_gib: float | None
    """Memory of the GPU; None for a CPU, which uses the memory of the machine."""
    usual_mfu: float
    """Typical MFU of trainings; a measured value can be set in execution.planning.mfu."""
    link_gb_per_s: float = 1.0
    """Rate at which a GPU of a node exchanges data with the others, in each direction: about four fifths of NVLink's or
    PCIe's nominal figure, which NCCL reaches with large messages."""


HARDWARE: dict[HardwareName, Hardware] = {
    found.name: found
    for found in (
        # Peaks from NVIDIA's data sheets, dense bf16 on tensor cores with fp32 sums: half of the figure with sparsity.
        # Then the same data sheets' FP32 without tensor cores.
        # Memory as nvidia-smi reports it where that is known to be less than the data sheet says.
        Hardware("A100", 312.0, 19.5, 80.0, 0.45, 240.0),  # A100 80GB SXM; NVLink 3: 300 GB/s
        Hardware("H100", 989.4, 67.0, 80.0, 0.40, 370.0),  # H100 SXM5; NVLink 4: 450 GB/s
        Hardware("H200", 989.4, 67.0, 141.0, 0.40, 370.0),  # H200 SXM
        Hardware("B200", 2250.0, 75.0, 180.0, 0.40, 740.0),  # HGX B200, for each GPU; NVLink 5: 900 GB/s
        Hardware("GB200", 2500.0, 80.0, 186.0, 0.40, 740.0),  # GB200 NVL72: 360 PFLOP/s sparse, 13.4 TB for 72 GPUs
        Hardware("B300", 2250.0, 75.0, 268.0, 0.40, 740.0),  # HGX B300: 36 PFLOP/s sparse for 8 GPUs of 288 GB
        Hardware("RTX_PRO_6000", 503.8, 125.0, 95.0, 0.40, 50.0),  # RTX PRO 6000 Blackwell Workstation Edition; PCIe 5
        Hardware("L40S", 362.05, 91.6, 45.0, 0.35, 25.0),  # 48 GB with ECC; PCIe 4
        Hardware("A6000", 154.8, 38.7, 48.0, 0.40, 25.0),  # RTX A6000 (GA102 white paper, appendix A); PCIe 4
        # About two cores with AVX-512; set execution.peak_tflops for a measured value.
        Hardware("CPU", 0.15, 0.15, None, 0.5),
    )
}


def hardware_of(recipe: Recipe) -> Hardware:
    """Return the hardware that the recipe names; by default an H100 for `device: cuda`, and for `auto` with a cluster
    that has GPUs, else a CPU."""
    execution = recipe.execution
    name = execution.planning.hardware
    if name is None:
        has_gpus = execution.cluster is not None and execution.cluster.gpus_per_node > 0
        uses_gpus = execution.device == "cuda" or (execution.device == "auto" and has_gpus)
        name = "H100" if uses_gpus else "CPU"
    return HARDWARE[name]


def peak_tflops(recipe: Recipe, precision: str = "bf16") -> float:
    """Return the peak of one process, in TFLOP/s: execution.peak_tflops, else the value for hardware and precision."""
    hardware = hardware_of(recipe)
    return recipe.execution.peak_tflops or (hardware.fp32_tflops if precision == "fp32" else hardware.peak_tflops)
