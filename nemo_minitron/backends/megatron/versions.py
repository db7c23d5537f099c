"""What differs between the supported versions of Megatron-Core, 0.10.0 (of NeMo-Aligner's containers) to 0.16.1."""

from __future__ import annotations

from dataclasses import fields
from importlib.metadata import version
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch import distributed as dist

from nemo_minitron.errors import EnvironmentProblem
from nemo_minitron.families import ModelShape

LLAMA_31_ROPE_FACTOR = 8.0

try:
    from megatron.core.activations import squared_relu
except ImportError:  # before 0.11

    def squared_relu(x: Tensor) -> Tensor:
        """relu(x)^2, as later versions have it."""
        return torch.pow(F.relu(x), 2)


try:
    from megatron.core.utils import get_batch_on_this_cp_rank
except ImportError:  # before 0.12

    def get_batch_on_this_cp_rank(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's two of 2 * cp parts of every sequence, as later versions have it: early and late ones balance."""
        size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
        if size == 1:
            return batch
        return {key: _two_parts(value, size, rank, 2 if key == "attention_mask" else 1) for key, value in batch.items()}


def _two_parts(value: Tensor, size: int, rank: int, dim: int) -> Tensor:
    parts = value.chunk(2 * size, dim=dim)
    return torch.cat([parts[rank], parts[2 * size - 1 - rank]], dim=dim)


def known_fields(config: type, options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that this version's config class has; the others are newer switches."""
    known = {field.name for field in fields(config)}
    return {key: value for key, value in options.items() if key in known}


def context_group(pg_collection: Any) -> dist.ProcessGroup:
    """Of what a module is handed; versions before 0.12 hand nothing."""
    return parallel_state.get_context_parallel_group() if pg_collection is None else pg_collection.cp


def rope_scaling_options(shape: ModelShape) -> dict[str, Any]:
    """GPTModel's arguments for Llama 3.1's frequency scaling.

    Raises:
        EnvironmentProblem: before 0.11 the factor is fixed to Llama 3.1's, and the model has another one.
    """
    scaling = shape.rope_scaling
    options: dict[str, Any] = {"rope_scaling": scaling is not None}
    if "rope_scaling_factor" in signature(GPTModel.__init__).parameters:
        return {**options, "rope_scaling_factor": scaling.factor if scaling else 1.0}
    if scaling is not None and scaling.factor != LLAMA_31_ROPE_FACTOR:
        raise EnvironmentProblem(
            f"Megatron-Core {version('megatron-core')} knows no rope scaling by {scaling.factor:g}.",
            allowed=f"{LLAMA_31_ROPE_FACTOR:g}",
            next_step="Use megatron-core 0.11 or later for this model.",
        )
    return options


__all__ = ["context_group", "get_batch_on_this_cp_rank", "known_fields", "rope_scaling_options", "squared_relu"]
