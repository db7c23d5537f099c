"""Gradients of one distillation step: by the package in any layout, and by plain formulas in one process."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemo_minitron.distillation.sparse import uniforms_of
from nemo_minitron.schema.execution import Kernels, Parallel
from nemo_minitron.schema.losses import HiddenLoss, Loss, Sampled
from nemo_minitron.stages.distill.params import DistillStage
from nemo_minitron.system.progress import Progress
from tests.support.plain_losses import plain_draws, plain_logits_loss, plain_state_loss

Found = tuple[dict[str, NDArray], list[float]]
"""Gradients: Hugging Face parameter (and `projection`) -> gradient, and the loss of each micro-batch."""


def params_of(loss: Loss, precision: str) -> DistillStage:
    stage = DistillStage(
        kind="distill",
        num_steps=1,
        global_batch_size=4,
        seq_len_tokens=32,
        lr=1e-3,
        loss=loss,
        valid_num_tokens=64,
        precision="fp32",
    )
    # Recipes cannot select fp64, but the code supports it.
    return stage.model_copy(update={"precision": precision})


def package_gradients(
    losses: dict[str, Loss], precision: str, parallel: Parallel, folders: dict[str, Path], chunk_tokens: int | None
) -> dict[str, Found]:
    """Return the gradients of every loss in this layout; whole on rank 0."""
    from nemo_minitron.backends.megatron.runtime.session import open_session
    from nemo_minitron.distillation import chunks

    if chunk_tokens is not None:
        chunks.CHUNK_BYTES, chunks.MIN_CHUNK_TOKENS = 0, chunk_tokens
        chunks.CPU_BLOCK_BYTES, chunks.MIN_BLOCK_TOKENS = 0, max(1, chunk_tokens // 2)
    with open_session(parallel, device="cpu", threads=1) as session:
        return {name: _package(params_of(loss, precision), session, folders) for name, loss in losses.items()}


def kernel_gradients(
    losses: dict[str, Loss],
    precision: str,
    parallel: Parallel,
    folders: dict[str, Path],
    kernels: dict[str, Kernels],
) -> dict[str, dict[str, Found]]:
    """Return the gradients of every loss with each choice of kernels."""
    from nemo_minitron.backends.megatron.runtime.session import open_session

    found = {}
    for name, chosen in kernels.items():
        with open_session(parallel, device="cpu", threads=1, kernels=chosen) as session:
            found[name] = {key: _package(params_of(loss, precision), session, folders) for key, loss in losses.items()}
    return found


def gradients_and_losses(
    losses: dict[str, Loss],
    parallel: Parallel,
    folders: dict[str, Path],
    kernels: Kernels,
    chunk_bytes: int,
    block_bytes: int,
) -> tuple[dict[str, Found], dict[str, float], float]:
    """Return the gradients of every loss, a validation, and the student's held-out loss, in fp64."""
    from nemo_minitron.backends.megatron.distillation import distill
    from nemo_minitron.backends.megatron.model.evaluate import heldout_loss
    from nemo_minitron.backends.megatron.runtime.session import open_session
    from nemo_minitron.distillation import chunks

    chunks.CHUNK_BYTES, chunks.CPU_BLOCK_BYTES = chunk_bytes, block_bytes
    models = (folders["student"], folders["teacher"], folders["data"], folders["work"])
    with open_session(parallel, device="cpu", threads=1, kernels=kernels) as session:
        # Ranks that wait for each other should not take half an hour to fail.
        session.set_timeout(timedelta(minutes=1))
        found = {name: _package(params_of(loss, "fp64"), session, folders) for name, loss in losses.items()}
        validation = distill.prepare(params_of(Loss(), "fp64"), *models, session).objective.validate()
        options: dict[str, Any] = {"num_tokens": 256, "seq_len_tokens": 32, "precision": "fp64"}
        heldout = heldout_loss(models[0], models[2], **options, session=session, progress=Progress(silent=True))
        return found, validation, heldout.loss


def _package(params: DistillStage, session: Any, folders: dict[str, Path]) -> Found:
    from nemo_minitron.backends.megatron.distillation import distill
    from nemo_minitron.backends.megatron.training import loop as training

    job = distill.prepare(params, folders["student"], folders["teacher"], folders["data"], folders["work"], session)
    found = training.forward_backward(job, 0)
    values = [float(parts["train_loss"]) for parts in found] if session.is_last_stage else []
    return _whole_gradients(job.trainable.model, job.shape, session, lambda p: p.main_grad), values


def plain_gradients(losses: dict[str, Loss], precision: str, folders: dict[str, Path]) -> dict[str, Found]:
    """Compute the gradients in one process with whole logits, plain formulas and autograd."""
    from nemo_minitron.backends.megatron.runtime.session import open_session

    with open_session(Parallel(), device="cpu", threads=1) as session:
        return {name: _plain(params_of(loss, precision), session, folders) for name, loss in losses.items()}


def _plain(params: DistillStage, session: Any, folders: dict[str, Path]) -> Found:
    from nemo_minitron.backends.megatron.data.datasets import step_batches
    from nemo_minitron.backends.megatron.distillation import distill
    from nemo_minitron.backends.megatron.model.forward import model_logits

    # Only models and data are taken from the package; no loss, no fused head.
    job = distill.prepare(params, folders["student"], folders["teacher"], folders["data"], folders["work"], session)
    student = job.trainable.model
    options = {"precision": params.precision, "seq_len_tokens": params.seq_len_tokens}
    from nemo_minitron.backends.megatron.model.weights import load_model

    teacher, teacher_shape = load_model(folders["teacher"], session, **options)
    student.zero_grad()
    common = min(job.shape.vocab_size, teacher_shape.vocab_size)
    batches = step_batches(job.samples, session, step=0, global_batch_size=4, micro_batch_size=1)
    values = []
    grads: dict[str, Tensor] = {}
    for batch in batches:
        with _norm_outputs(teacher) as teacher_states, torch.no_grad():
            z_t = model_logits(teacher, batch)[..., :common].flatten(0, 1)
        with _norm_outputs(student) as student_states:
            z_s = model_logits(student, batch)[..., :common].flatten(0, 1)
        loss = _mixed(params.loss, z_s, z_t, batch["labels"].flatten(), batch["sample_ids"], params.seed)
        if params.loss.hidden is not None:
            project = getattr(student, "hidden_projection", lambda x: x)
            of_states = _hidden(params.loss.hidden, student_states, teacher_states, project)
            alpha = params.loss.hidden.weight
            if alpha == "dynamic":
                logits_loss = plain_logits_loss(z_s, z_t, params.loss.logits).mean()
                alpha = (logits_loss / of_states).detach()
            loss = loss + alpha * of_states
        values.append(float(loss.detach()))
        names, parameters = zip(*student.named_parameters(), strict=True)
        found = torch.autograd.grad(loss / len(batches), parameters, allow_unused=True)
        for name, grad in zip(names, found, strict=True):
            if grad is not None:
                grads[name] = grads.get(name, torch.zeros_like(grad)) + grad
    by_id = {id(parameter): grads[name] for name, parameter in student.named_parameters() if name in grads}
    return _whole_gradients(student, job.shape, session, lambda p: by_id.get(id(p), torch.zeros_like(p))), values


def _mixed(
    loss: Loss, z_s: Tensor, z_t: Tensor, labels: Tensor, sample_ids: Tensor | None = None, seed: int = 0
) -> Tensor:
    text = -z_s.log_softmax(-1).gather(-1, labels[:, None]).mean()
    if loss.logits is None:
        return loss.next_token * text
    if isinstance(loss.logits.sparse, Sampled):
        return plain_draws(z_s, z_t, uniforms_of(seed, sample_ids, len(labels), loss.logits.sparse.rounds)).mean()
    logits = plain_logits_loss(z_s, z_t, loss.logits).mean()
    weight = (logits / text).detach() if loss.next_token == "balanced" else loss.next_token
    return logits + weight * text


def _hidden(params: HiddenLoss, student: dict[str, Tensor], teacher: dict[str, Tensor], project: Any) -> Tensor:
    """Return the outputs of modules that are named here, because the package finds its taps in another way."""
    names = [("input 0", "input 0")] if params.embedding else []
    for t, s in params.pairs:
        t, s = t % 6, s % 4
        if "mlp_input" in params.states:
            names.append((f"mlp {t}", f"mlp {s}"))
        if "block_output" in params.states:
            names.append(("final" if t == 5 else f"input {t + 1}", "final" if s == 3 else f"input {s + 1}"))
    return sum(plain_state_loss(params.kind, project(student[s]), teacher[t]).mean() for t, s in names)


class _norm_outputs:  # noqa: N801
    def __init__(self, model: Any) -> None:
        from nemo_minitron.backends.megatron.model.parts import final_norm, layers

        self.modules = {"final": final_norm(model)}
        for layer in layers(model):
            self.modules |= {f"input {layer.index}": layer.input_norm, f"mlp {layer.index}": layer.pre_mlp_norm}

    def __enter__(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        self.handles = [
            module.register_forward_hook(lambda _, __, out, name=name: found.__setitem__(name, out))
            for name, module in self.modules.items()
        ]
        return found

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def _whole_gradients(model: Any, shape: Any, session: Any, grad_of: Any) -> dict[str, NDArray]:
    """Return gradients by Hugging Face name, gathered from all ranks, on rank 0."""
    from nemo_minitron.backends.megatron.model.parts import local_parameters
    from nemo_minitron.backends.megatron.model.weights import _gather
    from nemo_minitron.families import parameters

    local = {name: grad_of(parameter) for name, parameter in local_parameters(model).items()}
    dtype = next(iter(local.values())).dtype
    out = {}
    for parameter in parameters(shape):
        whole = _gather(local.get(parameter.megatron), parameter, shape, session, dtype)
        if whole is not None:
            out[parameter.hf] = whole.clone().numpy()
    projection = local.get("hidden_projection.weight")
    if projection is not None:
        out["projection"] = projection.clone().numpy()
    return out


def boundary_gradients(losses: dict[str, Loss], tp: int, chunk_tokens: int | None) -> dict[str, dict[str, NDArray]]:
    """Return the fp32 gradients of the head's input and weight, whole on every rank."""
    from megatron.core import parallel_state

    from nemo_minitron.backends.megatron.model.head import vocab_of
    from nemo_minitron.backends.megatron.runtime.session import open_session
    from nemo_minitron.distillation.objective import live_teacher, token_loss

    with open_session(Parallel(tp=tp), device="cpu", threads=1) as session:
        hidden, weight, teacher_hidden, teacher_weight, labels, tokens = boundary_inputs()
        rows = -(-len(weight) // tp)
        vocab, mine = vocab_of(session, rows, len(weight)), slice(session.tp_rank * rows, (session.tp_rank + 1) * rows)
        out = {}
        for name, loss in losses.items():
            h, w = hidden.clone().requires_grad_(), weight[mine].clone().requires_grad_()
            teacher = None
            if loss.logits is not None:
                teacher = live_teacher(teacher_hidden, teacher_weight[mine], loss.logits, vocab=vocab)
            token_loss(loss, h, w, labels, tokens, teacher, vocab, chunk_tokens=chunk_tokens)[0].backward()
            group = parallel_state.get_tensor_model_parallel_group()
            torch.distributed.all_reduce(h.grad, group=group)
            shards: list[Any] = [None] * tp
            torch.distributed.all_gather_object(shards, w.grad.numpy(), group=group)
            out[name] = {"hidden": h.grad.numpy(), "weight": np.concatenate(shards)}
        return out


def boundary_inputs() -> tuple[Tensor, ...]:
    """Return fp32 inputs: 96 tokens, a vocabulary of 1,003."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    labels = torch.randint(0, 1003, (96,), generator=generator)
    tokens = torch.full((96,), 1 / 96)
    return normal(96, 48), normal(1003, 48) * 0.2, normal(96, 64), normal(1003, 64) * 0.2, labels, tokens


def plain_boundary_gradients(losses: dict[str, Loss]) -> dict[str, dict[str, NDArray]]:
    """Return the same by plain formulas, in fp64."""
    inputs = boundary_inputs()
    hidden, weight, teacher_hidden, teacher_weight = (tensor.double() for tensor in inputs[:4])
    labels = inputs[4]
    out = {}
    for name, loss in losses.items():
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        _mixed(loss, h @ w.t(), teacher_hidden @ teacher_weight.t(), labels).backward()
        out[name] = {"hidden": h.grad.numpy(), "weight": w.grad.numpy()}
    return out
