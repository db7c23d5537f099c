"""Copy weights between Hugging Face checkpoints and this rank's Megatron model, through the axis table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn

from nemo_minitron.backends.megatron.model.build import build_model
from nemo_minitron.backends.megatron.model.parts import Model, local_parameters
from nemo_minitron.backends.megatron.runtime.layout import fuse, shard_slices, split
from nemo_minitron.backends.megatron.runtime.session import Session
from nemo_minitron.backends.megatron.runtime.versions import replicas
from nemo_minitron.families import ModelShape, Parameter, parameters, tensor_shape
from nemo_minitron.families.axes import HIDDEN, SPLIT_LABELS
from nemo_minitron.families.split import stage_bounds
from nemo_minitron.hf.checkpoint import Checkpoint, CheckpointWriter


def load_model(
    model_dir: Path, session: Session, *, precision: str, seq_len_tokens: int, padded_vocab: int | None = None
) -> tuple[Model, ModelShape]:
    """Build this rank's model and load its weights.

    Each tensor-parallel and pipeline rank reads only its own part of the files. Of the ranks with the same part, the
    first reads it and broadcasts it to the others.

    Args:
        padded_vocab: rows of the embeddings, so that two models split theirs equally; None: as few as possible.

    Raises:
        CheckpointError: missing, damaged or unexpected tensors.
    """
    checkpoint = Checkpoint.open(model_dir)
    options = {"precision": precision, "seq_len_tokens": seq_len_tokens, "padded_vocab": padded_vocab}
    model = build_model(checkpoint.shape, session, **options)  # type: ignore[arg-type]
    load_weights(model, checkpoint, session, padded_vocab)
    return model, checkpoint.shape


def load_weights(model: Model, checkpoint: Checkpoint, session: Session, padded_vocab: int | None = None) -> None:
    """Copy the checkpoint into the model; every parameter of the model is written exactly once."""
    local, group = local_parameters(model), replicas()
    reader = dist.get_process_group_ranks(group)[0]
    for name, parts in _by_megatron_name(checkpoint.shape):
        if name not in local:
            continue
        target = local.pop(name)
        _mark_split(target, parts[0])
        if session.rank == reader:
            _copy_padded(target, _read(parts, checkpoint, session, padded_vocab))
        if group.size() > 1:
            dist.broadcast(target.detach(), reader, group=group)
    if local:
        raise AssertionError(f"Megatron parameters without a row in the axis table: {sorted(local)}")


def load_layer(model: Model, layer: int, shape: ModelShape, read: Callable[[Parameter], Tensor]) -> None:
    """Fill a model of one layer (`build_layer`) with the weights of one layer of a model of this shape.

    Args:
        layer: 0-based index of the layer whose weights are read.
        read: returns the whole Hugging Face tensor of a parameter.
    """
    local = local_parameters(model)
    for _, group in _by_megatron_name(shape):
        if group[0].layer != layer:
            continue
        parts = {str(parameter.row.part): read(parameter) for parameter in group}
        tensor = parts["None"] if "None" in parts else fuse(parts, shape)
        with torch.no_grad():
            local.pop(Parameter(group[0].row, 0, group[0].expert).megatron).copy_(tensor)
    if local:
        raise AssertionError(f"Megatron parameters without a row in the axis table: {sorted(local)}")


@torch.no_grad()
def load_final_norm(norm: nn.Module, shape: ModelShape, read: Callable[[Parameter], Tensor]) -> None:
    """Fill any norm of a model of this shape with the weights of the norm in front of its head."""
    own = dict(norm.named_parameters())
    for parameter in parameters(shape):
        if parameter.layer is None and parameter.row.axes == HIDDEN.coupled:
            own[parameter.megatron.rpartition(".")[2]].copy_(read(parameter))


def _read(parts: list[Parameter], checkpoint: Checkpoint, session: Session, padded_vocab: int | None) -> Tensor:
    """Read this rank's part of the tensors that make up one Megatron parameter, and fuse them."""
    shape, tp = checkpoint.shape, session.parallel.tp
    found = {
        part.row.part: checkpoint.read(part.hf, shard_slices(part.row, shape, session.tp_rank, tp, padded_vocab))
        for part in parts
    }
    return found[None] if None in found else fuse({str(part): tensor for part, tensor in found.items()}, shape)


def _by_megatron_name(shape: ModelShape) -> Iterator[tuple[str, list[Parameter]]]:
    ordered = sorted(parameters(shape), key=lambda parameter: parameter.megatron)
    for name, group in groupby(ordered, key=lambda parameter: parameter.megatron):
        yield name, list(group)


def _mark_split(tensor: Tensor, parameter: Parameter) -> None:
    """Mark a split parameter for Megatron, whose gradient norm counts unmarked parameters once.

    Megatron sets the marks in its random initialization, which is disabled here.
    """
    split_dims = [dim for dim, axis in enumerate(parameter.row.axes) if axis in SPLIT_LABELS]
    if split_dims and not getattr(tensor, "tensor_model_parallel", False):
        set_tensor_model_parallel_attributes(tensor, True, split_dims[0], 1)


@torch.no_grad()
def _copy_padded(target: Tensor, source: Tensor) -> None:
    """Copy, and set the padding rows of the vocabulary to zero."""
    rows = source.shape[0]
    target[:rows].copy_(source)
    target[rows:].zero_()


def save_model(
    model: Model, shape: ModelShape, session: Session, writer: CheckpointWriter | None, *, dtype: torch.dtype
) -> None:
    """Pass the whole model to rank 0's writer, one Hugging Face tensor at a time.

    Every rank calls this; no rank holds more than one whole tensor.

    Args:
        writer: on rank 0; None on the others.
        dtype: of the written tensors.
    """
    local = local_parameters(model)
    for parameter in parameters(shape):
        whole = _gather(local.get(parameter.megatron), parameter, shape, session, dtype)
        if writer is not None and whole is not None:
            writer.add(parameter.hf, whole)


def _gather(
    local: Tensor | None, parameter: Parameter, shape: ModelShape, session: Session, dtype: torch.dtype
) -> Tensor | None:
    """Return the whole tensor on rank 0, None on the other ranks."""
    if session.world_size == 1:
        return _without_padding(_local_part(local, parameter, shape), parameter, shape).to(dtype).contiguous()
    owner = _owner_stage(parameter, shape, session.parallel.pp)
    whole = None
    if session.pp_rank == owner and session.dp_rank == session.cp_rank == 0:
        whole = _gather_over_tp(_local_part(local, parameter, shape), parameter, shape, session)
    return _send_to_main(whole, parameter, shape, owner, session, dtype)


def _local_part(local: Tensor | None, parameter: Parameter, shape: ModelShape) -> Tensor:
    if local is None:
        raise AssertionError(f"{parameter.megatron} is not on the stage that should own it")
    tensor = local.detach()
    return tensor if parameter.row.part is None else split(tensor, parameter.row.part, shape)


def _owner_stage(parameter: Parameter, shape: ModelShape, pp: int) -> int:
    """Return the pipeline stage that holds the parameter: the first for embeddings, the last for the head."""
    if parameter.layer is not None:
        bounds = stage_bounds(shape.num_layers, pp)
        return next(stage for stage, (start, stop) in enumerate(bounds) if start <= parameter.layer < stop)
    return 0 if parameter.megatron.startswith("embedding.") else pp - 1


def _gather_over_tp(local: Tensor, parameter: Parameter, shape: ModelShape, session: Session) -> Tensor:
    split_dims = [dim for dim, axis in enumerate(parameter.row.axes) if axis in SPLIT_LABELS]
    if session.parallel.tp == 1 or not split_dims:
        return _without_padding(local, parameter, shape)
    shards = [torch.empty_like(local) for _ in range(session.parallel.tp)]
    dist.all_gather(shards, local.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return _without_padding(torch.cat(shards, dim=split_dims[0]), parameter, shape)


def _without_padding(whole: Tensor, parameter: Parameter, shape: ModelShape) -> Tensor:
    """Remove the padding rows of the vocabulary."""
    return whole[: tensor_shape(shape, parameter.row)[0]]


def _send_to_main(
    whole: Tensor | None, parameter: Parameter, shape: ModelShape, owner: int, session: Session, dtype: torch.dtype
) -> Tensor | None:
    """Send the tensor from the owner stage's first tensor-parallel rank to rank 0."""
    # Megatron orders ranks by pipeline stage last.
    source = owner * session.world_size // session.parallel.pp
    if session.is_main and source == 0:
        return None if whole is None else whole.to(dtype).contiguous()
    if session.is_main:
        received = torch.empty(tensor_shape(shape, parameter.row), dtype=dtype, device=session.device)
        dist.recv(received, src=source)
        return received
    if session.rank == source and whole is not None:
        dist.send(whole.to(dtype).contiguous(), dst=0)
    return None
