"""Layer-local distillation of tiny pruned models, for the tests that run it in several ways. Importable by ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.families import read_shape
from nemo_minitron.pruning.plan_file import PrunePlan
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.stages.distill_layers.params import DistillLayersStage
from nemo_minitron.system.progress import Progress
from tests.support.gradients import Found, _whole_gradients
from tests.support.tiny_data import tiny_data_dir
from tests.support.tiny_models import load_transformers, tiny_model_dir

TWENTY_STEPS = DistillLayersStage(
    kind="distill_layers",
    num_steps=20,
    global_batch_size=4,
    seq_len_tokens=32,
    lr=5e-3,
    warmup_steps=2,
    precision="fp32",
    valid_interval_steps=10,
    valid_num_tokens=256,
    save_interval_steps=100,
)
DEPTHS = {"width": (0, 1, 2, 3, 4, 5), "width and depth": (1, 2, 5)}
"""Name of a student -> the teacher's layers that it keeps. Two stages have 3 + 3 layers, or 2 + 1 (uneven)."""


def layer_folders(root: Path, kept_layers: tuple[int, ...]) -> tuple[PrunePlan, dict[str, Path]]:
    """Make a teacher of six layers, a student pruned from it, and data below `root`."""
    from nemo_minitron.hf.checkpoint import read_config
    from nemo_minitron.pruning.slicing import prune_checkpoint

    teacher = tiny_model_dir(root / "teacher", "llama_gqa_tied", num_hidden_layers=6)
    # Indices on both sides of the tensor-parallel border, other ones in each layer.
    neurons = {layer: tuple(range(layer, 96, 3)) for layer in kept_layers}
    plan = PrunePlan(
        method="importance",
        layers=kept_layers,
        shared={"hidden": tuple(index for index in range(64) if index % 4 != 1)},
        by_layer={
            "ffn": {layer: tuple(sorted({*kept, 0, 95}))[:32] for layer, kept in neurons.items()},
            "groups": dict.fromkeys(kept_layers, (0, 1, 2, 3)),
            "heads": dict.fromkeys(kept_layers, (0, 1, 2, 3, 4, 5, 6, 7)),
        },
    )
    student = root / "student"
    student.mkdir()
    prune_checkpoint(teacher, plan, student, Progress(silent=True))
    assert plan.target_shape(read_shape(read_config(teacher))) == read_shape(read_config(student))
    return plan, {"student": student, "teacher": teacher, "data": tiny_data_dir(root / "data"), "work": root}


def layer_rows(
    params: DistillLayersStage, plan: PrunePlan, parallel: Parallel, folders: dict[str, Path], work: Path, steps: int
) -> list[dict[str, float]]:
    """Train to this step and return the curves, without the speed."""
    from nemo_minitron.backends.megatron.distillation import layerwise
    from nemo_minitron.backends.megatron.runtime.session import open_session
    from nemo_minitron.backends.megatron.training import loop as training

    models = (folders["student"], folders["teacher"], folders["data"])
    with open_session(parallel, device="cpu", threads=1) as session:
        job = replace(layerwise.prepare(params, plan, *models, work, session), num_steps=steps)
        rows = training.run(job, work, Progress(silent=True)).rows
        (work / "published").mkdir(exist_ok=True)
        training.publish(job, folders["student"], work, work / "published")
    return [{key: row[key] for key in row if key not in ("tokens_per_s", "mfu")} for row in rows]


def layer_gradients(plan: PrunePlan, parallel: Parallel, folders: dict[str, Path]) -> Found:
    """Gradients of one step in fp64, whole on rank 0, and the loss of each micro-batch."""
    from nemo_minitron.backends.megatron.distillation import layerwise
    from nemo_minitron.backends.megatron.runtime.session import open_session
    from nemo_minitron.backends.megatron.training import loop as training

    params = TWENTY_STEPS.model_copy(update={"precision": "fp64"})
    models = (folders["student"], folders["teacher"], folders["data"], folders["work"])
    with open_session(parallel, device="cpu", threads=1) as session:
        job = layerwise.prepare(params, plan, *models, session)
        found = training.forward_backward(job, 0)
        losses = [float(parts["train_loss"]) for parts in found]

        def gradient(parameter: Tensor) -> Tensor:
            return parameter.main_grad if parameter.requires_grad else torch.zeros_like(parameter)

        return _whole_gradients(job.trainable.model, job.shape, session, gradient), losses


def plain_layer_gradients(plan: PrunePlan, folders: dict[str, Path]) -> Found:
    """The same with transformers' models, whole tensors and autograd; one micro-batch of the whole batch."""
    tokens = _first_batch(folders)
    teacher, student = (load_transformers(folders[name], torch.float64) for name in ("teacher", "student"))
    channels = list(plan.shared["hidden"])
    streams = _teacher_streams(teacher, tokens)
    ends = [*plan.layers[1:], len(teacher.model.layers)]
    starts = [0, *ends[:-1]]
    outputs: dict[int, Tensor] = {}
    for number, layer in enumerate(student.model.layers):
        given = streams[starts[number]][..., channels]

        def replaced(_: Any, args: Any, kwargs: Any, given: Tensor = given) -> Any:
            if "hidden_states" in kwargs:
                return args, {**kwargs, "hidden_states": given}
            return (given, *args[1:]), kwargs

        def kept(_: Any, __: Any, out: Any, number: int = number) -> None:
            outputs[number] = out if isinstance(out, Tensor) else out[0]

        layer.register_forward_pre_hook(replaced, with_kwargs=True)
        layer.register_forward_hook(kept)
    student(tokens)
    losses = []
    for number, end in enumerate(ends):
        target = streams[end][..., channels]
        errors = (outputs[number] - target).square().sum(-1) / target.square().sum(-1)
        losses.append(errors.mean())
    torch.stack(losses).sum().backward()
    grads = {
        name: (torch.zeros_like(tensor) if tensor.grad is None else tensor.grad).numpy()
        for name, tensor in student.named_parameters()
    }
    return grads, [float(torch.stack(losses).mean().detach())]


def _teacher_streams(teacher: Any, tokens: Tensor) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(_: Any, args: Any, kwargs: Any) -> None:
        found.append((kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).detach())

    for module in (*teacher.model.layers, teacher.model.norm):
        module.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        teacher(tokens)
    return found


def _first_batch(folders: dict[str, Path]) -> Tensor:
    from nemo_minitron.backends.megatron.data.datasets import step_batches, training_samples
    from nemo_minitron.backends.megatron.runtime.session import open_session

    params = TWENTY_STEPS
    with open_session(Parallel(), device="cpu", threads=1) as session:
        samples = training_samples(
            folders["data"],
            num_samples=params.num_steps * params.global_batch_size,
            seq_len_tokens=params.seq_len_tokens,
            seed=params.seed,
            cache_dir=folders["work"] / "plain_index",
        )
        (batch,) = step_batches(samples, session, step=0, global_batch_size=4, micro_batch_size=4)
        return batch["tokens"]
