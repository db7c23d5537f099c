"""Cutting tensors by the labels of their dimensions. One loop serves all families and layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from nemo_minitron.errors import NumericsError
from nemo_minitron.families import ModelShape, Parameter, Row, num_params, parameters, tensor_shape, write_config
from nemo_minitron.families.axes import GROUPS, HEADS
from nemo_minitron.hf.checkpoint import Checkpoint, copy_side_files
from nemo_minitron.hf.checkpoint_writer import CheckpointWriter, Planned
from nemo_minitron.pruning.merge import merge_heads
from nemo_minitron.pruning.plan_file import PrunePlan, require_uniform
from nemo_minitron.pruning.positions import Keep, kept_positions
from nemo_minitron.system.progress import Progress

Item = TypeVar("Item")
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element -> integer type of that size."""


def slice_parameter(tensor: Tensor, row: Row, keep: Keep) -> Tensor:
    """Keep the given positions of each labeled dimension; labels without an entry stay whole."""
    for dim, label in enumerate(row.axes):
        if label in keep:
            tensor = _take(tensor, dim, keep[label])
    return tensor


def _take(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """Select indices on the CPU. numpy picks columns four times as fast as torch; it has no bf16, so bits are moved."""
    bits = tensor.view(_BITS[tensor.element_size()]).numpy()
    return torch.from_numpy(bits.take(index.numpy(), axis=dim)).view(tensor.dtype)


def merge_parameter(tensor: Tensor, row: Row, plan: PrunePlan, source: ModelShape, layer: int | None) -> Tensor:
    """Merge cut heads into kept ones, if the plan has merged heads and the row is made of heads."""
    labels = (*HEADS.coupled, *GROUPS.coupled) if source.heads_per_group == 1 else HEADS.coupled
    for dim, label in enumerate(row.axes):
        if layer is not None and label in labels:
            tensor = merge_heads(tensor, dim, plan.merged.get(layer, {}), source.kv_channels, plan.head_merge)
    return tensor


def kept_parameters(plan: PrunePlan, source: ModelShape) -> Iterator[tuple[Parameter, Parameter]]:
    """Yield (parameter of the student, parameter of the teacher that it is cut from); layers are renumbered."""
    for student in parameters(plan.target_shape(source)):
        layer = None if student.layer is None else plan.layers[student.layer]
        yield student, Parameter(student.row, layer, student.expert)


def prune_checkpoint(source_dir: Path, plan: PrunePlan, out_dir: Path, progress: Progress) -> ModelShape:
    """Cut a checkpoint tensor by tensor; at most two tensors of each model are in memory.

    Returns:
        The shape of the student; each written tensor was checked against it.

    Raises:
        NumericsError: the shape of a tensor, or the total, is not as planned.
    """
    require_uniform(plan, str(source_dir))
    checkpoint = Checkpoint.open(source_dir)
    source, target = checkpoint.shape, plan.target_shape(checkpoint.shape)
    keeps = {layer: kept_positions(plan, source, layer) for layer in (None, *plan.layers)}
    pairs = list(kept_parameters(plan, source))
    planned = [
        Planned(student.hf, tensor_shape(target, student.row), checkpoint.tensors[teacher.hf].dtype)
        for student, teacher in pairs
    ]
    writer = CheckpointWriter(out_dir, write_config(checkpoint.config, target), planned)

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
        raise NumericsError(f"The student has {written} parameters instead of {num_params(target)}, as planned.")
    writer.close()
    copy_side_files(source_dir, out_dir)
    return target


def _one_ahead(make: Callable[[Item], Tensor], items: Iterable[Item]) -> Iterator[Tensor]:
    """Yield make(item) of each item. A thread makes the next one meanwhile, so that reading and writing overlap."""
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
        raise NumericsError(f"{student.hf} has shape {list(tensor.shape)} after the cut, instead of {list(expected)}.")
