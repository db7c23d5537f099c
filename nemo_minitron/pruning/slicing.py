"""Cut tensors by axis label. One loop serves every family, layer and layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from nemo_minitron.errors import NumericsError
from nemo_minitron.families import ModelShape, Parameter, Row, num_params, parameters, tensor_shape, write_config
from nemo_minitron.hf.checkpoint import Checkpoint, copy_side_files
from nemo_minitron.hf.stream_writer import Planned, StreamWriter
from nemo_minitron.pruning.axes import Keep, expand_keep
from nemo_minitron.pruning.merge import merge_heads
from nemo_minitron.pruning.plan_file import PrunePlan, require_uniform
from nemo_minitron.system.progress import Progress

Item = TypeVar("Item")
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element -> integers of that size."""


def slice_parameter(tensor: Tensor, row: Row, keep: Keep) -> Tensor:
    """Keep the given positions on every labelled dimension; axes without an entry stay whole."""
    for dim, axis in enumerate(row.axes):
        if axis in keep:
            tensor = _take(tensor, dim, keep[axis])
    return tensor


def _take(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """index_select on a CPU. numpy picks columns four times as fast as torch; it has no bf16, so bits are moved."""
    bits = tensor.view(_BITS[tensor.element_size()]).numpy()
    return torch.from_numpy(bits.take(index.numpy(), axis=dim)).view(tensor.dtype)


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
    """Cut a checkpoint tensor by tensor; memory holds two tensors of the teacher and of the student.

    Returns:
        The student's shape, to which every written tensor was checked.

    Raises:
        NumericsError: a tensor or the total did not come out as planned.
    """
    require_uniform(plan, str(source_dir))
    checkpoint = Checkpoint.open(source_dir)
    source, target = checkpoint.shape, plan.target_shape(checkpoint.shape)
    keeps = {layer: expand_keep(plan, source, layer) for layer in (None, *plan.layers)}
    pairs = list(kept_parameters(plan, source))
    planned = [
        Planned(student.hf, tensor_shape(target, student.row), checkpoint.tensors[teacher.hf].dtype)
        for student, teacher in pairs
    ]
    writer = StreamWriter(out_dir, write_config(checkpoint.config, target), planned)

    def cut(pair: tuple[Parameter, Parameter]) -> Tensor:
        student, teacher = pair
        whole = merge_parameter(checkpoint.read(teacher.hf), teacher.row, plan, source, teacher.layer)
        tensor = slice_parameter(whole, teacher.row, keeps[teacher.layer])
        _require_shape(student, tensor, target)
        return tensor

    written = 0
    tensors = progress.track(_one_ahead(cut, pairs), "prune", len(pairs), "tensors")
    for (student, _), tensor in zip(pairs, tensors, strict=True):
        writer.add(student.hf, tensor)
        written += tensor.numel()
    if written != num_params(target):
        raise NumericsError(f"The student has {written} parameters; the plan says {num_params(target)}.")
    writer.close()
    copy_side_files(source_dir, out_dir)
    return target


def _one_ahead(make: Callable[[Item], Tensor], items: Iterable[Item]) -> Iterator[Tensor]:
    """make(item) of each; the next is made in a thread while the caller is busy: reading goes on beside writing."""
    with ThreadPoolExecutor(1) as pool:
        waiting: list[Future[Tensor]] = []
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > 1:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


def _require_shape(student: Parameter, tensor: Tensor, target: ModelShape) -> None:
    expected = tensor_shape(target, student.row)
    if tuple(tensor.shape) != expected:
        raise NumericsError(f"{student.hf} came out as {list(tensor.shape)} instead of {list(expected)}.")
