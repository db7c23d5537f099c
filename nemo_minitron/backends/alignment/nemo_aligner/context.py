"""What the tasks of one stage share: their log, their device, and the keys of their processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_minitron.backends.alignment.base import TaskContext
from nemo_minitron.backends.alignment.nemo_aligner.environment import require_gpu_kernels
from nemo_minitron.backends.alignment.nemo_aligner.fork_server import ForkServer
from nemo_minitron.backends.alignment.nemo_aligner.process import fork_server
from nemo_minitron.processes.nodes import Nodes
from nemo_minitron.schema.execution import Parallel


def log_file(context: TaskContext) -> Path:
    """Return the file with the output of NeMo-Aligner's processes."""
    return context.work_dir / "aligner.log"


def conversion_dir(context: TaskContext) -> Path:
    """Return the work folder of conversions between Hugging Face and NeMo."""
    return context.work_dir / "border"


def on_cpu(context: TaskContext) -> bool:
    """Return whether trainings use no GPU.

    Raises:
        EnvironmentProblem: there is a GPU, and NeMo-Aligner's environment is not made for one.
    """
    import torch

    if context.device == "cpu" or not torch.cuda.is_available():
        return True
    require_gpu_kernels()
    return False


@contextmanager
def task_server(method: str, context: TaskContext, *, on_cpu: bool) -> Iterator[ForkServer | None]:
    """Start the server for both conversions and the training of a stage; yield None if each needs its own processes.

    On a GPU a process that has initialized CUDA cannot be forked, and several processes start through torchrun.
    """
    if not on_cpu or context.layout.world_size > 1:
        yield None
        return
    with fork_server(("to_nemo", method, "from_nemo"), log_file(context), context.threads) as server:
        yield server


def trainer_keys(layout: Parallel) -> dict[str, Any]:
    """Return the config keys for the processes and nodes of a layout."""
    nodes = Nodes.here().count if layout.world_size > 1 else 1
    return {"trainer.num_nodes": nodes, "trainer.devices": layout.world_size // nodes}
