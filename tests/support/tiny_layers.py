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
from nemo_minitron.schema.losses import AnchorLoss, Loss
from nemo_minitron.stages.distill.params import DistillStage
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


def layer_folders(
    root: Path, kept_layers: tuple[int, ...], case: str = "llama_gqa_tied"
) -> tuple[PrunePlan, dict[str, Path]]:
    """Make a teacher of six layers, a student pruned from it, and data below `root`."""
    from nemo_minitron.hf.checkpoint import read_config
    from nemo_minitron.pruning.slicing import prune_checkpoint

    teacher = tiny_model_dir(root / "teacher", case, num_hidden_layers=6)
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
    """Return the gradients of one step in fp64, whole on rank 0, and the loss of each micro-batch."""
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
    """Return the same with transformers' models, whole tensors and autograd; the batch is one micro-batch."""
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


ANCHORED = DistillStage(
    kind="distill",
    num_steps=20,
    global_batch_size=4,
    seq_len_tokens=32,
    lr=1e-3,
    warmup_steps=2,
    precision="fp32",
    valid_interval_steps=10,
    valid_num_tokens=256,
    save_interval_steps=100,
    loss=Loss(anchors=AnchorLoss(weight=1.5)),
)
STEP, WEIGHT = 5, 1.5 * 15 / 20
"""Step of the training above, and the weight of its anchors."""


def anchor_rows(
    params: DistillStage, plan: PrunePlan, parallel: Parallel, folders: dict[str, Path], work: Path, steps: int
) -> list[dict[str, float]]:
    """Train to this step and return the curves, without the speed."""
    from nemo_minitron.backends.megatron.distillation import distill
    from nemo_minitron.backends.megatron.runtime.session import open_session
    from nemo_minitron.backends.megatron.training import loop as training

    models = (folders["student"], folders["teacher"], folders["data"])
    with open_session(parallel, device="cpu", threads=1) as session:
        job = replace(distill.prepare(params, *models, work, session, plan), num_steps=steps)
        rows = training.run(job, work, Progress(silent=True)).rows
    return [{key: row[key] for key in row if key not in ("tokens_per_s", "mfu")} for row in rows]


def anchor_gradients(losses: dict[str, Loss], plan: PrunePlan, parallel: Parallel, folders: dict[str, Path]) -> Any:
    """Return loss -> gradients of one step in fp64, whole on rank 0, and the anchors' loss of the global batch."""
    from nemo_minitron.backends.megatron.distillation import distill
    from nemo_minitron.backends.megatron.runtime.session import open_session
    from nemo_minitron.backends.megatron.training import loop as training

    models = (folders["student"], folders["teacher"], folders["data"], folders["work"])
    found = {}
    with open_session(parallel, device="cpu", threads=1) as session:
        for name, loss in losses.items():
            params = ANCHORED.model_copy(update={"precision": "fp64", "loss": loss})
            job = distill.prepare(params, *models, session, plan)
            training.forward_backward(job, STEP)
            value = job.objective.finish()["anchor_loss"]
            grads = _whole_gradients(job.trainable.model, job.shape, session, lambda p: p.main_grad)
            found[name] = grads, value
    return found


def plain_anchor_gradients(losses: dict[str, Loss], plan: PrunePlan, folders: dict[str, Path]) -> Any:
    """Return the same in one process with whole tensors and autograd; only models and data are from the package."""
    from nemo_minitron.backends.megatron.runtime.session import open_session

    with open_session(Parallel(), device="cpu", threads=1) as session:
        return {name: _plain_anchors(loss, plan, session, folders) for name, loss in losses.items()}


def _plain_anchors(loss: Loss, plan: PrunePlan, session: Any, folders: dict[str, Path]) -> Any:
    from nemo_minitron.backends.megatron.data.datasets import step_batches
    from nemo_minitron.backends.megatron.distillation import distill
    from nemo_minitron.backends.megatron.model.forward import model_logits
    from nemo_minitron.backends.megatron.model.weights import load_model

    params = ANCHORED.model_copy(update={"precision": "fp64", "loss": Loss()})
    job = distill.prepare(params, *(folders[key] for key in ("student", "teacher", "data", "work")), session)
    student, options = job.trainable.model, {"precision": "fp64", "seq_len_tokens": params.seq_len_tokens}
    teacher, _ = load_model(folders["teacher"], session, **options)
    (batch,) = step_batches(job.samples, session, step=STEP, global_batch_size=4, micro_batch_size=4)
    with _inner_outputs(teacher) as of_teacher, torch.no_grad():
        z_t = model_logits(teacher, batch)
    with _inner_outputs(student) as of_student:
        z_s = model_logits(student, batch)
    log_q, log_p = z_s.log_softmax(-1), z_t.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    channels, terms = list(plan.shared["hidden"]), []
    for number, layer in enumerate(plan.layers):
        for name in loss.anchors.of:
            found, expected = of_student[number, name], of_teacher[layer, name]
            if name != "gate_up":
                terms.append(_relative(found, expected[..., channels]))
                continue
            neurons = list(plan.by_layer["ffn"][layer])
            parts = 2 if job.shape.gated else 1
            halves = zip(found.chunk(parts, -1), expected.chunk(parts, -1), strict=True)
            terms.append(torch.stack([_relative(one, other[..., neurons]) for one, other in halves]).mean())
    anchors = torch.stack(terms).mean()
    names, parameters = zip(*student.named_parameters(), strict=True)
    grads = dict(zip(names, torch.autograd.grad(kl + WEIGHT * anchors, parameters), strict=True))
    by_id = {id(parameter): grads[name] for name, parameter in student.named_parameters()}
    return _whole_gradients(student, job.shape, session, lambda p: by_id[id(p)]), float(anchors.detach())


def _relative(found: Tensor, expected: Tensor) -> Tensor:
    return ((found - expected).square().sum(-1) / expected.square().sum(-1)).mean()


class _inner_outputs:  # noqa: N801
    """Collects (layer, name) -> output; the modules are named here."""

    def __init__(self, model: Any) -> None:
        self.modules = {}
        for number, layer in enumerate(model.decoder.layers):
            self.modules[number, "gate_up"] = layer.mlp.linear_fc1
            self.modules[number, "attention_output"] = layer.self_attention.linear_proj
            self.modules[number, "mlp_output"] = layer.mlp.linear_fc2

    def __enter__(self) -> dict[tuple[int, str], Tensor]:
        found: dict[tuple[int, str], Tensor] = {}
        self.handles = [
            module.register_forward_hook(lambda _, __, out, key=key: found.__setitem__(key, out[0]))
            for key, module in self.modules.items()
        ]
        return found

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
