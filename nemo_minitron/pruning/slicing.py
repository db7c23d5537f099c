"""Cut tensors by axis label. One loop serves every family, layer and layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from nemo_minitron.errors import NumericsError
from nemo_minitron.families import ModelShape, Parameter, Row, num_params, parameters, tensor_shape, write_config
from nemo_minitron.hf.checkpoint import Checkpoint, CheckpointWriter, copy_side_files
from nemo_minitron.progress import Progress
from nemo_minitron.pruning.axes import Keep, expand_keep
from nemo_minitron.pruning.merge import merge_heads
from nemo_minitron.pruning.plan_file import PrunePlan, require_uniform


def slice_parameter(tensor: Tensor, row: Row, keep: Keep) -> Tensor:
    """Keep the given positions on every labelled dimension; axes without an entry stay whole."""
    for dim, axis in enumerate(row.axes):
        if axis in keep:
            tensor = tensor.index_select(dim, keep[axis])
    return tensor


def merge_parameter(tensor: Tensor, row: Row, plan: PrunePlan, source: ModelShape, layer: int | None) -> Tensor:
    """The parameter with cut heads merged into kept ones, where the plan says so and the row is made of heads."""
    axes = ("q", "kv") if source.heads_per_group == 1 else ("q",)
    for dim, axis in enumerate(row.axes):
        if layer is not None and axis in axes:
            tensor = merge_heads(tensor, dim, plan.merged.get(layer, {}), source.kv_channels, plan.head_merge)
    return tensor


def kept_parameters(plan: PrunePlan, source: ModelShape) -> Iterator[tuple[Parameter, Parameter]]:
    """(parameter of the student, parameter of the teacher it is cut from); layers are renumbered."""
    for student in parameters(plan.target_shape(source)):
        layer = None if student.layer is None else plan.layers[student.layer]
        yield student, Parameter(student.row, layer)


def prune_checkpoint(source_dir: Path, plan: PrunePlan, out_dir: Path, progress: Progress) -> ModelShape:
    """Cut a checkpoint tensor by tensor; memory holds one shard of the student.

    Returns:
        The student's shape, to which every written tensor was checked.

    Raises:
        NumericsError: a tensor or the total did not come out as planned.
    """
    require_uniform(plan, str(source_dir))
    checkpoint = Checkpoint.open(source_dir)
    source, target = checkpoint.shape, plan.target_shape(checkpoint.shape)
    writer = CheckpointWriter(out_dir, write_config(checkpoint.config, target))
    keeps = {layer: expand_keep(plan, source, layer) for layer in (None, *plan.layers)}
    pairs = list(kept_parameters(plan, source))
    written = 0
    for student, teacher in progress.track(pairs, "prune", len(pairs), "tensors"):
        whole = merge_parameter(checkpoint.read(teacher.hf), teacher.row, plan, source, teacher.layer)
        tensor = slice_parameter(whole, teacher.row, keeps[teacher.layer])
        _require_shape(student, tensor, target)
        written += tensor.numel()
        writer.add(student.hf, tensor)
    if written != num_params(target):
        raise NumericsError(f"The student has {written} parameters; the plan says {num_params(target)}.")
    writer.close()
    copy_side_files(source_dir, out_dir)
    return target


def _require_shape(student: Parameter, tensor: Tensor, target: ModelShape) -> None:
    expected = tensor_shape(target, student.row)
    if tuple(tensor.shape) != expected:
        raise NumericsError(f"{student.hf} came out as {list(tensor.shape)} instead of {list(expected)}.")
