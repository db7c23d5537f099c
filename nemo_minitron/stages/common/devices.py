"""The device of a stage that runs a model in its own process."""

from __future__ import annotations

from nemo_minitron.stages.context import StageContext


def torch_device(ctx: StageContext) -> str:
    """Return cpu or cuda; `execution.device: auto` takes a GPU if there is one."""
    import torch

    wanted = ctx.execution.device
    return wanted if wanted != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
