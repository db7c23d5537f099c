"""Self-test of this environment."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

from task import Task

PACKAGES = ("nemo_toolkit", "megatron-core", "nemo-aligner", "torch", "lightning", "transformers", "safetensors")


def self_test(task: Task) -> dict[str, Any]:
    """Import what the tasks import, and create a tensor on the CUDA device or its replacement."""
    import checkpoints
    import distillation
    import dpo
    import ppo
    import reinforce
    import reward_model
    import sft
    import steerlm2
    import torch
    import triton_socket

    total = torch.ones(4, device="cuda").sum().item()
    if total != 4.0:
        raise RuntimeError(f"1 + 1 + 1 + 1 = {total}")
    tested = [
        module.__name__
        for module in (checkpoints, distillation, dpo, ppo, reinforce, reward_model, sft, steerlm2, triton_socket)
    ]
    return {
        "tested": tested,
        "versions": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
    }
