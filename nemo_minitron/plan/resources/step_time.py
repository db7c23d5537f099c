"""Time of a training step on GPUs, to rank layouts: a model of one micro-batch, not a forecast.

The parts, for one rank: matrix products and the other kernels beside them; Megatron's collectives of tensor
parallelism, which the products wait for; the time in which Python launches the kernels, which limits small
micro-batches; and the sum of gradients over data-parallel ranks, as far as the backward pass does not hide it. The
constants fit one measurement (8B to 4.5B on an H200: 48 % MFU at tp 1, see docs/results.md) and estimates for tp 8 from
counted bytes and kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_minitron.distillation.flops import BACKWARD_OVER_FORWARD
from nemo_minitron.plan.resources.hardware import Hardware
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.workload.load import Load
from nemo_minitron.workload.memory import GRADIENT_BYTES, WEIGHT_BYTES

KERNEL_MFU = 0.48
"""MFU of a rank that neither communicates nor waits for launches, with full-size micro-batches."""
LAUNCH_S_PER_LAYER = 0.85e-3
"""Seconds in which Python launches one pass of one layer: about 100 ms for the 128 passes of 8B to 4.5B."""
FORWARD_COLLECTIVES, BACKWARD_COLLECTIVES = 4, 6
"""Collectives of a layer with sequence parallelism: a gather before and a scatter after attention and MLP; in the
backward pass the inputs of both products are gathered once more for the gradients of their weights."""
NODE_LINK_GB_PER_S = 45.0
"""Rate of a GPU's network card, in each direction: nine tenths of 400 Gbit/s."""
SMALL_BATCH_TOKENS = 2048
"""Tokens of a micro-batch below which matrix products are too small for full speed."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step of a rank."""

    ideal: float
    """If every operation ran at the peak of the data sheet."""
    total: float

    @property
    def mfu(self) -> float:
        """Fraction of the peak that the step reaches; recomputation is no useful work."""
        return self.ideal / self.total


def step_time(load: Load, layout: Parallel, hardware: Hardware, peak_tflops: float, gpus_per_node: int) -> StepTime:
    """Return the time of a training step in a layout."""
    work = load.work
    ranks_of_model = layout.tp * layout.pp * layout.cp
    tokens = work.seq_len_tokens * layout.micro_batch_size
    peak = peak_tflops * 1e12
    useful = tokens * load.useful_flops_per_token / ranks_of_model / peak
    filled = min(1.0, (tokens / layout.cp / SMALL_BATCH_TOKENS) ** 0.25)
    kernels = tokens * _flops_of_last_stage(load, layout) / (layout.tp * layout.cp) / peak / (KERNEL_MFU * filled)
    # The GPU works while Python launches what follows, so the slower of both counts.
    micro_batch = max(kernels + _tensor_parallel_seconds(load, layout, hardware), _launch_seconds(load, layout))
    count = work.num_micro_batches
    reduced = _gradient_seconds(load, layout, hardware, gpus_per_node)
    if layout.overlap_grad_reduce:
        # Hidden by the backward pass of the last micro-batch, about half of its time.
        reduced = max(0.0, reduced - micro_batch / 2)
    bubbles = layout.pp - 1
    return StepTime(ideal=count * useful, total=(count + bubbles) * micro_batch + reduced)


def _flops_of_last_stage(load: Load, layout: Parallel) -> float:
    """Return the operations per token of the pipeline stage that has the output layers, which limits the others."""
    work = load.work
    both = 1 + BACKWARD_OVER_FORWARD
    heads = 2.0 * both * work.shape.hidden_size * work.shape.vocab_size
    if work.teacher is not None:
        passes = both if work.teacher_learns else 1
        heads += 2.0 * passes * work.teacher.hidden_size * work.teacher.vocab_size
    return (load.flops_per_token - heads) / layout.pp + heads


def _layer_passes(load: Load, layout: Parallel) -> tuple[float, float]:
    """Return the forward and backward passes of layers in a micro-batch on one pipeline stage."""
    work, again = load.work, 1 if layout.recompute == "full" else 0
    student = work.shape.num_layers / layout.pp
    teacher = 0.0 if work.teacher is None else work.teacher.num_layers / layout.pp
    backward = student + (teacher if work.teacher_learns else 0.0)
    return student * (1 + again) + teacher, backward


def _tensor_parallel_seconds(load: Load, layout: Parallel, hardware: Hardware) -> float:
    if layout.tp == 1:
        return 0.0
    work, (forward, backward) = load.work, _layer_passes(load, layout)
    student = work.shape.num_layers / layout.pp
    bytes_per_channel = WEIGHT_BYTES[work.precision] * work.seq_len_tokens * layout.micro_batch_size / layout.cp
    moved = (layout.tp - 1) / layout.tp * bytes_per_channel
    teacher_channels = 0 if work.teacher is None else work.teacher.hidden_size
    own_forward = forward - (0.0 if work.teacher is None else work.teacher.num_layers / layout.pp)
    channels = FORWARD_COLLECTIVES * own_forward * work.shape.hidden_size
    channels += BACKWARD_COLLECTIVES * student * work.shape.hidden_size
    channels += FORWARD_COLLECTIVES * (forward - own_forward) * teacher_channels
    channels += BACKWARD_COLLECTIVES * (backward - student) * teacher_channels
    return channels * moved / (hardware.link_gb_per_s * 1e9)


def _launch_seconds(load: Load, layout: Parallel) -> float:
    forward, backward = _layer_passes(load, layout)
    return LAUNCH_S_PER_LAYER * (forward + 2 * backward)


def _gradient_seconds(load: Load, layout: Parallel, hardware: Hardware, gpus_per_node: int) -> float:
    ranks = layout.dp * layout.cp
    if ranks == 1:
        return 0.0
    inside = layout.tp * layout.pp * ranks <= gpus_per_node
    rate = hardware.link_gb_per_s if inside else min(NODE_LINK_GB_PER_S, hardware.link_gb_per_s)
    # A sum over ranks, or a scatter of gradients and a gather of weights: the same bytes at most.
    size = 2 * GRADIENT_BYTES * load.trained_params / (layout.tp * layout.pp)
    return size * (ranks - 1) / ranks / (rate * 1e9)
