"""Differences between the supported versions of Megatron-Core, 0.10.0 (in NeMo-Aligner's containers) to 0.19.2.

Each difference names the version where it begins or ends, so that it can be deleted when the versions on one side are
no longer supported. Megatron-Core 0.17 and later require Python 3.12.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core import __version__ as megatron_version
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch import distributed as dist
from torch.distributed.checkpoint import filesystem as torch_filesystem

from nemo_minitron.errors import CheckpointError, EnvironmentProblem
from nemo_minitron.families import ModelShape

LLAMA_31_ROPE_FACTOR = 8.0
# Not that of the installed package: some containers only extend PYTHONPATH.
_VERSION = tuple(int(part) for part in megatron_version.split(".")[:2])
_OLDER_NAMES = {
    "num_layers_in_first_pipeline_stage": "first_pipeline_num_layers",
    "num_layers_in_last_pipeline_stage": "last_pipeline_num_layers",
}
"""Names of config fields before 0.11."""
_NOT_NEEDED = {
    "recompute_modules",  # before 0.12 selective recomputation always covers the core attention only
    "overlap_param_gather",  # of the optimizer config; older versions read the data-parallel wrapper's
}
"""Config fields that may be missing in a version."""

try:
    from megatron.core.activations import squared_relu
except ImportError:  # before 0.11

    def squared_relu(x: Tensor) -> Tensor:
        """Compute relu(x)^2, as in later versions."""
        return torch.pow(F.relu(x), 2)


def known_fields(config: type, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options under the names that this version's config class uses."""
    known = {field.name for field in fields(config)}
    named = {_OLDER_NAMES.get(key, key) if key not in known else key: value for key, value in options.items()}
    unknown = named.keys() - known - _NOT_NEEDED
    if unknown:
        raise AssertionError(f"{config.__name__} of Megatron-Core {megatron_version} has no {sorted(unknown)}")
    return {key: value for key, value in named.items() if key in known}


def share_of_loss(loss: Tensor) -> Tensor:
    """Scale a context-parallel rank's share of a loss for Megatron's schedule.

    Megatron averages gradients over context-parallel ranks. Since 0.12 it first multiplies the loss by their number;
    before 0.12 this function does.
    """
    return loss if _VERSION >= (0, 12) else loss * parallel_state.get_context_parallel_world_size()


def mlp_spec(submodules: MLPSubmodules) -> Any:
    """Return the spec of a layer's MLP. Since 0.18 it is a function; a ModuleSpec is wrapped with a warning."""
    if hasattr(MLP, "as_mlp_submodule"):
        return partial(MLP.as_mlp_submodule, submodules=submodules)
    return ModuleSpec(module=MLP, submodules=submodules)


def context_group(pg_collection: Any) -> dist.ProcessGroup:
    """Return the context-parallel group of a module's process groups; versions before 0.12 pass none."""
    return parallel_state.get_context_parallel_group() if pg_collection is None else pg_collection.cp


class SaveStrategy(FullyParallelSaveStrategyWrapper):  # type: ignore[misc]
    """How the ranks with the same state share a save: each writes other tensors.

    Keep it for all saves of a training: at the first one each rank gets a description of all tensors from every other
    rank, which takes longer the more ranks there are.
    """

    def __init__(self) -> None:
        super().__init__(_plain_strategy(), replicas(), do_cache_distribution=True)
        self.on_distributed: Callable[[dict[str, Any]], object] = lambda _: None
        self.has_saved = False

    def apply_saving_parallelization(self, sharded_state_dict: dict[str, Any]) -> None:
        """Distribute the tensors over the ranks, then call `on_distributed` with the state."""
        super().apply_saving_parallelization(sharded_state_dict)
        self.on_distributed(sharded_state_dict)


def _plain_strategy() -> Any:
    return dist_checkpointing.serialization.get_default_save_sharded_strategy()


def begin_checkpoint(
    state: dict[str, Any], folder: Path, strategy: SaveStrategy, on_distributed: Callable[[dict[str, Any]], object]
) -> AsyncRequest:
    """Return Megatron's request to write this state; nothing is written yet.

    Args:
        on_distributed: called with the state when its tensors are distributed over the ranks that write them.
    """
    strategy.base_strategy, strategy.on_distributed = _plain_strategy(), on_distributed
    options: dict[str, Any] = {"async_sharded_save": True, "sharded_strategy": strategy}
    options["validate_access_integrity"] = not strategy.has_saved
    if "async_strategy" in signature(dist_checkpointing.save).parameters:
        # Since 0.17 the default is nvidia-resiliency-ext, whose requests have another form.
        options["async_strategy"] = "mcore"
    request: AsyncRequest = dist_checkpointing.save(state, str(folder), **options)
    strategy.has_saved = True
    return request


def replicas() -> dist.ProcessGroup:
    """Return the ranks that hold the same part of the model: data-parallel and context-parallel ones."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def load_checkpoint(wanted: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Load a training checkpoint; ranks with the same state read different parts of it and exchange them."""
    plain = dist_checkpointing.serialization.get_default_load_sharded_strategy(str(checkpoint))
    strategy = FullyParallelLoadStrategyWrapper(plain, replicas())
    return dict(dist_checkpointing.load(wanted, str(checkpoint), sharded_strategy=strategy))


def require_readable(checkpoint: Path) -> None:
    """Check that this version can read the checkpoint.

    Since 0.19 the state common to all ranks is stored with the tensors. Earlier versions need it in common.pt, which
    0.19 and later still read.

    Raises:
        CheckpointError: this version needs common.pt, and the checkpoint has none.
    """
    if _VERSION < (0, 19) and not (checkpoint / "common.pt").is_file():
        raise CheckpointError(
            f"The training checkpoint was written by Megatron-Core 0.19 or later; {megatron_version} cannot read it.",
            where=str(checkpoint),
            next_step="Use megatron-core 0.19 or later, or delete the checkpoints to start from the first step.",
        )


def checkpoint_buckets(request: AsyncRequest, *, on_host: bool) -> list[Any]:
    """Return what this rank writes, one bucket for each file.

    Args:
        on_host: copy tensors of a GPU to host memory; otherwise they stay there (before 0.12 they are always copied).
    """
    if _VERSION < (0, 12):
        return list(request.async_fn_args[0])
    return list(request.preload_fn() if on_host and request.preload_fn is not None else request.async_fn_args[1])


def write_checkpoint_file(request: AsyncRequest, number: int, bucket: Any) -> Any:
    """Write one bucket of a request; return the result that Megatron expects, or the exception if it failed."""
    results: queue.Queue[Any] = queue.Queue()
    open_jobs: queue.Queue[int] = queue.Queue()
    open_jobs.put(number)
    # Since 0.12 the first argument is the list of stream transforms.
    leading = getattr(request.async_fn, "args", ())[:1]
    filesystem_async.FileSystemWriterAsync.write_preloaded_data(*leading, number, bucket, results, open_jobs, True)
    return results.get()[1]


if _VERSION < (0, 13) and "serialization_format" in signature(torch_filesystem._write_item).parameters:

    def _write_item(*given: Any) -> Any:
        """Adapt calls of torch's `_write_item`: add torch 2.7's format argument, and before 0.12 the transforms."""
        transforms = given[0] if len(given) > 4 else torch_filesystem._StorageWriterTransforms()
        stream, data, item, key = given[-4:]
        as_before = torch_filesystem.SerializationFormat.TORCH_SAVE
        return torch_filesystem._write_item(transforms, stream, data, item, key, as_before)

    filesystem_async._write_item = _write_item


if _VERSION < (0, 15) and not hasattr(np, "product"):
    # These versions call np.product when they validate checkpoints of a distributed optimizer; numpy 2 removed it.
    np.product = np.prod  # type: ignore[attr-defined]


# Since 0.19 GPTModel logs a deprecation warning on every start; users cannot act on it (see parts.py).
logging.getLogger(GPTModel.__module__).addFilter(lambda record: "GPTModel IS DEPRECATED" not in record.getMessage())


def rope_scaling_options(shape: ModelShape) -> dict[str, Any]:
    """Return GPTModel's arguments for Llama 3.1's frequency scaling.

    Raises:
        EnvironmentProblem: the model's factor is not Llama 3.1's, which is the only one before 0.11.
    """
    scaling = shape.rope_scaling
    options: dict[str, Any] = {"rope_scaling": scaling is not None}
    if "rope_scaling_factor" in signature(GPTModel.__init__).parameters:
        return {**options, "rope_scaling_factor": scaling.factor if scaling else 1.0}
    if scaling is not None and scaling.factor != LLAMA_31_ROPE_FACTOR:
        raise EnvironmentProblem(
            f"Megatron-Core {megatron_version} does not support the rope scaling factor {scaling.factor:g}.",
            allowed=f"{LLAMA_31_ROPE_FACTOR:g}",
            next_step="Use megatron-core 0.11 or later for this model.",
        )
    return options


__all__ = [
    "SaveStrategy",
    "begin_checkpoint",
    "checkpoint_buckets",
    "context_group",
    "known_fields",
    "load_checkpoint",
    "mlp_spec",
    "replicas",
    "require_readable",
    "rope_scaling_options",
    "share_of_loss",
    "squared_relu",
    "write_checkpoint_file",
]
