"""Memory of a training, measured in a separate process: `python -m tests.support.memory_child JSON`."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STEPS = 3
FIXED_THRESHOLDS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Options with which glibc returns freed tensors at once, so that resident memory is the memory in use."""


def main(order: dict[str, Any]) -> dict[str, int]:
    from nemo_minitron.backends.megatron.distillation import distill
    from nemo_minitron.backends.megatron.distillation import layerwise as layer_local
    from nemo_minitron.backends.megatron.runtime.session import open_session
    from nemo_minitron.backends.megatron.training import loop as training
    from nemo_minitron.schema.execution import Parallel
    from nemo_minitron.stages.distill.params import DistillStage
    from nemo_minitron.stages.distill_layers.params import DistillLayersStage

    layerwise = order["params"]["kind"] == "distill_layers"
    params = (DistillLayersStage if layerwise else DistillStage).model_validate(order["params"])
    with open_session(Parallel(**order["parallel"]), device="cpu", threads=2) as session:
        _warm_up()
        before = _resident("VmRSS")
        folders = (Path(order[name]) for name in ("student", "teacher", "data"))
        if layerwise:
            job = layer_local.prepare(params, _cut_plan(order["teacher"]), *folders, Path(order["work"]), session)
        else:
            job = distill.prepare(params, *folders, Path(order["work"]), session)
        training.train_step(job, 0)
        Path("/proc/self/clear_refs").write_text("5")
        for step in range(1, STEPS):
            training.train_step(job, step)
        peak = _resident("VmHWM") - before
        return {"peak": peak, "fixed": _held(job)}


def _cut_plan(teacher: str) -> Any:
    """Drop the teacher's last two layers, which the student does not have, and name a cut in all layers.

    So all layers are trained; nothing depends on which neurons are kept.
    """
    from nemo_minitron.families import read_shape
    from nemo_minitron.pruning.plan_file import PrunePlan

    shape = read_shape(json.loads((Path(teacher) / "config.json").read_text()))
    kept = tuple(range(shape.num_layers - 2))
    neurons = tuple(range(shape.ffn_hidden_size - 1))
    hidden = tuple(range(shape.hidden_size))
    return PrunePlan("importance", kept, {"hidden": hidden}, {"ffn": dict.fromkeys(kept, neurons)})


def _warm_up() -> None:
    """Multiply once in each way, because libraries create their threads and buffers at the first product."""
    import torch

    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(64, 64, dtype=dtype, requires_grad=True)
        (x @ x).sum().backward()


def _held(job: Any) -> int:
    """Return the bytes of all tensors of both models, gradient buffers and optimizer; each storage counts once."""
    storages: dict[int, int] = {}
    for tensor in _tensors(job):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(job: Any) -> Iterator[Any]:
    import torch

    from nemo_minitron.backends.megatron.model.parts import Model

    trainable = job.trainable
    # The teacher is inside a closure of the objective.
    for model in (found for found in gc.get_objects() if issubclass(type(found), Model)):
        yield from model.parameters()
    for buffer in (*trainable.ddp.buffers, *trainable.ddp.expert_parallel_buffers):
        yield buffer.grad_data
        if buffer.param_data is not None:
            yield buffer.param_data
    optimizer = trainable.optimizer
    for single in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in single.optimizer.param_groups:
            yield from group["params"]
        for state in single.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(key)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    print(json.dumps(main(json.loads(sys.argv[1]))))
