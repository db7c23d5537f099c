"""Training objectives: match a teacher, or predict the text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.backends.megatron.data.datasets import (
    HeldOutBatches,
    eod_id_of,
    heldout_batches,
    training_samples,
    training_sources,
)
from nemo_minitron.backends.megatron.distillation.anchors import Anchors, attached_anchors
from nemo_minitron.backends.megatron.distillation.correction import Correction
from nemo_minitron.backends.megatron.distillation.fp8_teacher import require_close_teacher, run_in_fp8
from nemo_minitron.backends.megatron.distillation.hidden import (
    HiddenLossWeight,
    HiddenStates,
    attached_losses,
    hidden_states,
    share_weight,
    total_loss,
)
from nemo_minitron.backends.megatron.distillation.setup import DistillSetup, caches_heldout, teacher_targets
from nemo_minitron.backends.megatron.distillation.teacher_targets import TeacherTargets
from nemo_minitron.backends.megatron.model.forward import Batch, evaluating, forward_batches
from nemo_minitron.backends.megatron.model.head import head_main_grad, head_weight, model_hidden
from nemo_minitron.backends.megatron.model.layers import require_document_mask
from nemo_minitron.backends.megatron.model.parts import Model
from nemo_minitron.backends.megatron.model.weights import load_model
from nemo_minitron.backends.megatron.runtime.context import own_rows, sum_over_context
from nemo_minitron.backends.megatron.runtime.session import Session
from nemo_minitron.backends.megatron.training.loop import Job, Objective
from nemo_minitron.backends.megatron.training.optim import Trainable, make_trainable
from nemo_minitron.backends.megatron.training.schedule import ForwardStep, Parts, Round, accumulate
from nemo_minitron.distillation import fused_kl
from nemo_minitron.distillation.cache import TeacherCache, require_same_keys
from nemo_minitron.distillation.flops import training_flops_per_token
from nemo_minitron.distillation.linear import Head
from nemo_minitron.distillation.losses import forward_kl, next_token
from nemo_minitron.distillation.objective import Distance, cached_teacher, live_teacher, token_loss
from nemo_minitron.distillation.rounds import round_size
from nemo_minitron.distillation.sparse import uniforms_of
from nemo_minitron.errors import DataError, EnvironmentProblem, error_context
from nemo_minitron.families import ModelShape
from nemo_minitron.families.split import padded_vocab_size
from nemo_minitron.hf.checkpoint import Checkpoint
from nemo_minitron.pruning.plan_file import PrunePlan
from nemo_minitron.schema.losses import LogitsLoss, Loss, Sampled
from nemo_minitron.schema.training import Distillation, Optimization, TextTraining
from nemo_minitron.workload.heldout import heldout_batch_size

NEXT_TOKEN = Loss(logits=None, next_token=1.0)
KL = LogitsLoss()
HeadLoss = Callable[[Tensor], tuple[Tensor, Parts]]
"""Input of the student's output layer [B, S, D] -> loss, parts."""


def prepare_cached(
    params: Distillation, student_dir: Path, cache_dir: Path, data_dir: Path, work_dir: Path, session: Session
) -> Job:
    """Load the student and open a teacher cache, whose samples are the training samples."""
    require_document_mask(params.reset_attention_mask, session.parallel.cp)
    cache = TeacherCache(cache_dir)
    require_same_keys(cache.facts, params, cache_dir)
    student, shape = load_model(student_dir, session, precision=params.precision, seq_len_tokens=params.seq_len_tokens)
    if shape.vocab_size < cache.facts.vocab_size:
        raise DataError(
            f"The student has {shape.vocab_size:,} tokens, but the teacher cache has {cache.facts.vocab_size:,}.",
            where=f"{student_dir}, {cache_dir}",
        )
    heldout = heldout_text(params, data_dir, session)
    size, loss = cache.facts.vocab_size, cache.facts.teacher_loss(params)
    setup = DistillSetup(
        params.loss, student, None, size, heldout, session, params.seed, cache=cache, teacher_loss=loss
    )
    return make_job(params, params.num_steps, setup, shape, data_dir, work_dir, cache.facts.num_samples)


def prepare(
    params: Distillation,
    student_dir: Path,
    teacher_dir: Path,
    data_dir: Path,
    work_dir: Path,
    session: Session,
    plan: PrunePlan | None = None,
) -> Job:
    """Load the student and, if the loss needs it, the teacher; open the data.

    Args:
        plan: the plan by which the student was pruned, for a loss with anchors.
    """
    require_document_mask(params.reset_attention_mask, session.parallel.cp)
    heldout = heldout_text(params, data_dir, session)
    if not params.loss.needs_teacher:
        options = _shared_options(params, (student_dir, teacher_dir), session)
        student, shape = load_model(student_dir, session, **options)
        size = min(shape.vocab_size, Checkpoint.open(teacher_dir).shape.vocab_size)
        setup = DistillSetup(params.loss, student, None, size, heldout, session, params.seed)
        return make_job(params, params.num_steps, setup, shape, data_dir, work_dir)
    (student, shape), (teacher, teacher_shape) = load_pair(params, student_dir, teacher_dir, session)
    size = min(shape.vocab_size, teacher_shape.vocab_size)
    if params.teacher_fp8 is not None:
        run_in_fp8(teacher, params.teacher_fp8, session)
        require_close_teacher(teacher, size, heldout, params.teacher_fp8, session, work_dir)
    micro_batches = params.global_batch_size // (session.parallel.dp * session.parallel.micro_batch_size)
    hidden, anchors = None, None
    if params.loss.hidden is not None:
        hidden = hidden_states(params.loss.hidden, teacher_shape, student, shape, session, micro_batches)
    if params.loss.anchors is not None:
        assert plan is not None
        steps = params.num_steps
        anchors = Anchors(params.loss.anchors, plan, teacher_shape, shape, session, micro_batches, steps)
    setup = DistillSetup(
        params.loss, student, teacher, size, heldout, session, params.seed, hidden, anchors, teacher_shape=teacher_shape
    )
    if params.of_teacher is None:
        teacher.requires_grad_(False).eval()
    else:
        corrected = _correction(setup, params.of_teacher, params.num_steps, teacher, teacher_shape.vocab_size)
        setup = replace(setup, correction=corrected)
    return make_job(params, params.num_steps, setup, shape, data_dir, work_dir)


def load_pair(
    params: Optimization, student_dir: Path, teacher_dir: Path, session: Session
) -> tuple[tuple[Model, ModelShape], tuple[Model, ModelShape]]:
    """Load student and teacher."""
    folders = (student_dir, teacher_dir)
    options = _shared_options(params, folders, session)
    student, teacher = (load_model(folder, session, **options) for folder in folders)
    return student, teacher


def _shared_options(params: Optimization, folders: tuple[Path, Path], session: Session) -> dict[str, Any]:
    """Return the options with which both models use the same split of the vocabulary, padded for the larger one."""
    vocab_size = max(Checkpoint.open(folder).shape.vocab_size for folder in folders)
    padded = padded_vocab_size(vocab_size, session.parallel.tp)
    return {"precision": params.precision, "seq_len_tokens": params.seq_len_tokens, "padded_vocab": padded}


def _correction(
    setup: DistillSetup, params: Optimization, num_steps: int, teacher: Model, vocab_size: int
) -> Correction:
    """Set up the teacher's training in the same way as `prepare_training`."""
    own = DistillSetup(NEXT_TOKEN, teacher, None, vocab_size, setup.heldout, setup.session, params.seed)
    trainable = make_trainable(teacher, params, num_steps, setup.session.parallel, setup.session.kernels)
    return Correction(trainable, _forward_step(own), setup.hidden, setup.session)


def prepare_training(params: TextTraining, model_dir: Path, data_dir: Path, work_dir: Path, session: Session) -> Job:
    """Load the model and open the data: next-token cross entropy, no teacher."""
    require_document_mask(params.reset_attention_mask, session.parallel.cp)
    model, shape = load_model(model_dir, session, precision=params.precision, seq_len_tokens=params.seq_len_tokens)
    heldout = heldout_text(params, data_dir, session)
    setup = DistillSetup(NEXT_TOKEN, model, None, shape.vocab_size, heldout, session, params.seed)
    return make_job(params, params.num_steps, setup, shape, data_dir, work_dir)


def heldout_text(params: Optimization, data_dir: Path, session: Session) -> HeldOutBatches:
    return heldout_batches(
        data_dir,
        session,
        num_tokens=params.valid_num_tokens,
        seq_len_tokens=params.seq_len_tokens,
        batch_size=heldout_batch_size(params.seq_len_tokens),
        whole_documents=False,
    )


def make_job(
    params: Optimization,
    num_steps: int,
    setup: DistillSetup,
    shape: ModelShape,
    data_dir: Path,
    work_dir: Path,
    num_samples: int | None = None,
) -> Job:
    samples = training_samples(
        data_dir,
        # The order of the samples depends on their number.
        num_samples=num_samples or num_steps * params.global_batch_size,
        seq_len_tokens=params.seq_len_tokens,
        seed=params.seed,
        cache_dir=work_dir / "data_index",
    )
    trainable = make_trainable(setup.student, params, num_steps, setup.session.parallel, setup.session.kernels)
    if setup.correction is not None:
        trainable = replace(trainable, teacher=setup.correction.trainable)
    return Job(
        params=params,
        num_steps=num_steps,
        trainable=trainable,
        shape=shape,
        samples=samples,
        session=setup.session,
        objective=objective_of(setup),
        flops_per_token=training_flops_per_token(
            shape, setup.teacher_shape, params.seq_len_tokens, teacher_learns=setup.correction is not None
        ),
        separate_at=eod_id_of(data_dir) if params.reset_attention_mask else None,
        sources=training_sources(data_dir),
    )


def objective_of(setup: DistillSetup) -> Objective:
    """Make the training objective of the recipe's loss."""
    correction, anchors, forward = setup.correction, setup.anchors, _forward_step(setup)

    def prepare(part: Round, batches: Iterable[Batch]) -> Iterator[TeacherTargets]:
        if correction is not None:
            return iter(correction.teacher_targets(part, list(batches)))
        return teacher_targets(setup, batches, 0.0 if anchors is None else anchors.weight_at(part.step))

    def gradients(
        trainable: Trainable, part: Round, batches: Iterator[Batch], targets: Iterator[TeacherTargets]
    ) -> list[Parts]:
        return accumulate(trainable, forward, zip(batches, targets, strict=False), part)

    finishes = [part.finish for part in (correction, anchors) if part is not None]
    finish = finishes[0] if finishes else dict
    largest = round_size(
        setup.session.parallel.pp, teacher_is_live=setup.teacher is not None, teacher_learns=correction is not None
    )
    return Objective(_part_names(setup.loss), prepare, gradients, lambda: validate(setup), finish, largest)


def _forward_step(setup: DistillSetup) -> ForwardStep:
    def forward(model: torch.nn.Module, batch: Batch, targets: TeacherTargets | None) -> Any:
        given = targets or TeacherTargets()

        def loss(hidden_BSD: Tensor) -> tuple[Tensor, Parts]:
            return _head_loss(setup, model, batch, given, hidden_BSD)

        with attached_anchors(model, setup.anchors, given.anchors, given.anchor_weight, batch["token_weights"]):
            if setup.hidden is None:
                return model_hidden(model, batch), loss
            return _forward_with_hidden_losses(setup, setup.hidden, model, batch, given, loss)

    return forward


def _part_names(loss: Loss) -> tuple[str, ...]:
    used = {
        "logits_loss": loss.logits is not None,
        "lm_loss": bool(loss.next_token),
        "hidden_loss": loss.hidden is not None,
    }
    return ("train_loss", *(name for name, is_used in used.items() if is_used))


def _head_loss(
    setup: DistillSetup, model: torch.nn.Module, batch: Batch, targets: TeacherTargets, hidden_BSD: Tensor
) -> tuple[Tensor, Parts]:
    return token_loss(
        setup.loss,
        hidden_BSD.flatten(0, 1),
        head_weight(model, setup.vocab_size),
        batch["labels"].flatten(),
        batch["token_weights"].flatten(),
        _distance(setup, batch, targets),
        setup.vocab,
        over_ranks=sum_over_context,
        chunk_tokens=setup.session.kernels.chunk_tokens,
        main_grad=head_main_grad(model),
    )


def _forward_with_hidden_losses(
    setup: DistillSetup,
    hidden: HiddenStates,
    model: torch.nn.Module,
    batch: Batch,
    targets: TeacherTargets,
    head_loss: HeadLoss,
) -> Any:
    """Run the forward pass with hidden-state losses attached."""
    weight = HiddenLossWeight(hidden)
    with attached_losses(model, hidden, targets.states, batch["token_weights"], weight) as values:
        output = model_hidden(model, batch)
    of_states = total_loss(hidden, values)

    def loss(hidden_BSD: Tensor) -> tuple[Tensor, Parts]:
        value, parts = head_loss(hidden_BSD)
        alpha = share_weight(hidden, weight, parts.get("logits_loss"), of_states)
        # The attached losses add their own gradients; `of_states` adds only their value.
        return value + alpha * of_states, {**parts, "hidden_loss": of_states}

    return output, loss


def _distance(setup: DistillSetup, batch: Batch, targets: TeacherTargets) -> Distance | None:
    loss = setup.loss.logits
    if loss is None:
        return None
    if targets.cached is not None:
        return cached_teacher(targets.cached, loss, setup.vocab)
    assert setup.teacher is not None
    assert targets.head_input is not None
    kernels, hidden_TD = setup.session.kernels, targets.head_input.flatten(0, 1)
    weight = head_weight(setup.teacher, setup.vocab_size)
    with error_context(EnvironmentProblem, where="execution.kernels"):
        fused = fused_kl.chosen(kernels.fused_kl, setup.loss, hidden_TD.dtype, on_gpu=hidden_TD.is_cuda)
    if fused is not None:
        passes = fused_kl.kernels_of(fused, on_gpu=hidden_TD.is_cuda)
        weights = batch["token_weights"].flatten()
        return fused_kl.FusedForwardKl(
            hidden_TD, weight, weights, loss, passes, setup.vocab, chunk_tokens=kernels.chunk_tokens
        )
    uniforms = None
    if isinstance(loss.sparse, Sampled):
        size, length = batch["sample_tokens"].shape
        uniforms = uniforms_of(setup.seed, batch["sample_ids"], length, loss.sparse.rounds)
        uniforms = own_rows(uniforms, size, setup.session).to(batch["tokens"].device)
    return live_teacher(hidden_TD, weight, loss, uniforms, setup.vocab, chunk_tokens=kernels.chunk_tokens)


def validate(setup: DistillSetup) -> dict[str, float]:
    """Measure KL to the teacher at temperature 1 and both next-token losses on held-out text, in nats per token."""
    sums = torch.zeros(4, dtype=torch.float64, device=setup.session.device)
    # Hidden states are not compared, so they need not be kept.
    without_states = replace(setup, hidden=None)
    with evaluating(setup.student):
        for batch in setup.heldout.batches:
            targets = next(teacher_targets(without_states, [batch]))

            def add(hidden: Tensor, batch: Batch, targets: TeacherTargets = targets) -> None:
                sums.add_(_measure(setup, hidden, batch, targets))

            forward_batches(setup.student, [batch], setup.session, add, forward=model_hidden)
    if not (setup.session.is_last_stage and setup.session.tp_rank == 0):
        sums.zero_()
    setup.session.sum(sums)
    kl, loss, teacher_loss = (sums[:3] / sums[3]).tolist()
    if setup.teacher is None:
        extra = {} if setup.teacher_loss is None else {"valid_teacher_loss": setup.teacher_loss}
        return ({"valid_kl": kl} if caches_heldout(setup) else {}) | {"valid_loss": loss, **extra}
    return {"valid_kl": kl, "valid_loss": loss, "valid_teacher_loss": teacher_loss}


def _measure(setup: DistillSetup, hidden_BSD: Tensor, batch: Batch, targets: TeacherTargets) -> Tensor:
    """Return sums over the batch's tokens: KL, loss of the student, loss of the teacher, number of tokens."""
    labels, mask, vocab = batch["labels"].flatten(), batch["loss_mask"].flatten(), setup.vocab
    student = Head(head_weight(setup.student, setup.vocab_size), hidden_BSD.flatten(0, 1), vocab)
    teacher = None
    if setup.teacher is not None and targets.head_input is not None:
        teacher = Head(head_weight(setup.teacher, setup.vocab_size), targets.head_input.flatten(0, 1), vocab)
    sums = torch.zeros(4, dtype=torch.float64, device=mask.device)
    for rows in student.all_blocks():
        logits = student.logits(rows)
        values = [torch.zeros_like(mask[rows]), next_token(logits.clone(), labels[rows], vocab)[0]]
        if teacher is not None:
            expected = teacher.logits(rows)
            values.append(next_token(expected.clone(), labels[rows], vocab)[0])
            values[0] = forward_kl(logits, expected, KL, vocab)[0]
        else:
            values.append(values[0])
            if targets.cached is not None:
                values[0] = cached_teacher(targets.cached, KL, vocab)(logits, rows)[0]
        weights = mask[rows].double()
        sums += torch.stack([value.double() @ weights for value in (*values, torch.ones_like(mask[rows]))])
    return sums
