"""Child processes for tests on a GPU, with torch layers or Transformer Engine."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from tests.support.distributed import run_ranks

TORCH, ENGINE = "torch", "transformer_engine"
LAYERS = [TORCH, *([ENGINE] if importlib.util.find_spec("transformer_engine_torch") else [])]


DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "NCCL_ALGO": "Ring",
}
"""Variables with which cuBLAS, Transformer Engine and NCCL add in the same order each time."""


def on_gpu(layers: str, function: Callable[..., Any], *args: Any) -> Any:
    """Run function(*args) in a separate process, with these layers."""
    return run_ranks(1, _with_layers, layers, function, *args)[0]


def on_gpu_deterministic(layers: str, function: Callable[..., Any], *args: Any) -> Any:
    """Run it without kernels whose result depends on timing, such as atomic sums of embedding gradients."""
    return run_ranks(1, _deterministic, layers, function, *args)[0]


def _deterministic(layers: str, function: Callable[..., Any], *args: Any) -> Any:
    import os

    import torch

    os.environ.update(DETERMINISTIC)
    torch.use_deterministic_algorithms(True, warn_only=True)
    return _with_layers(layers, function, *args)


def _with_layers(kind: str, function: Callable[..., Any], *args: Any) -> Any:
    from nemo_minitron.backends.megatron.model import layers

    if kind == ENGINE:
        assert layers.has_transformer_engine(), "Transformer Engine is installed and cannot be used"
        return function(*args)
    with patch.object(layers, "has_transformer_engine", lambda: False):
        return function(*args)


def distill_peak_bytes(order: dict[str, Any]) -> dict[str, int]:
    """Return the peak of allocated memory in two steps after the first, and the memory held between steps."""
    from pathlib import Path

    import torch

    from nemo_minitron.backends.megatron.distillation import distill
    from nemo_minitron.backends.megatron.runtime.session import open_session
    from nemo_minitron.backends.megatron.training import loop as training
    from nemo_minitron.schema.execution import Parallel
    from nemo_minitron.stages.distill.params import DistillStage

    params = DistillStage.model_validate(order["params"])
    with open_session(Parallel(**order["parallel"]), device="cuda") as session:
        folders = (Path(order[name]) for name in ("student", "teacher", "data"))
        job = distill.prepare(params, *folders, Path(order["work"]), session)
        training.train_step(job, 0)
        # The plan does not include the workspaces of cuBLAS, 32 MiB for each thread that multiplies.
        torch._C._cuda_clearCublasWorkspaces()
        fixed = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for step in (1, 2):
            training.train_step(job, step)
        return {"peak": torch.cuda.max_memory_allocated(), "fixed": fixed}
