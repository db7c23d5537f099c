"""A fixed teacher whose layers run in FP8, and the check that its logits are close to those of the bf16 teacher.

Only keys of the teacher's own Megatron config change: Megatron reads them in each forward pass, and Transformer Engine
keeps the FP8 weights of the first one. Embeddings, norms and output layer stay in bf16.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from itertools import islice
from pathlib import Path

import torch
from megatron.core import __version__ as megatron_version
from torch import Tensor

from nemo_minitron.backends.megatron.data.datasets import HeldOutBatches
from nemo_minitron.backends.megatron.model.forward import Batch, evaluating, forward_batches
from nemo_minitron.backends.megatron.model.head import head_weight, model_hidden, vocab_of
from nemo_minitron.backends.megatron.model.layers import has_transformer_engine
from nemo_minitron.backends.megatron.model.parts import Model, head
from nemo_minitron.backends.megatron.runtime.session import Session
from nemo_minitron.distillation.linear import Head
from nemo_minitron.distillation.losses import forward_kl
from nemo_minitron.distillation.vocab import Vocab
from nemo_minitron.errors import EnvironmentProblem, NumericsError
from nemo_minitron.schema.losses import LogitsLoss
from nemo_minitron.schema.training import Fp8Teacher
from nemo_minitron.system.files import write_whole

MEASUREMENT_FILE = "teacher_fp8.json"
"""File of the work folder with the measured KL."""
MAX_BATCHES = 4
"""Held-out batches of the measurement, for each data-parallel rank."""


def run_in_fp8(teacher: Model, params: Fp8Teacher, session: Session) -> None:
    """Let the layers of a model run in FP8 from its next forward pass.

    Raises:
        EnvironmentProblem: Transformer Engine is not used, or this Megatron-Core lacks the scaling.
    """
    if not (session.on_gpu and has_transformer_engine()):
        raise EnvironmentProblem(
            "teacher_fp8 needs Transformer Engine on a GPU.",
            allowed="a GPU of compute capability 8.9 or later, with transformer-engine installed",
            next_step="Set teacher_fp8 to null.",
        )
    set_fp8(teacher, params)


def set_fp8(teacher: Model, params: Fp8Teacher) -> None:
    """Set the keys of the model's config."""
    known = {field.name for field in fields(teacher.config)}
    if "fp8_recipe" not in known:
        raise EnvironmentProblem(
            f"Megatron-Core {megatron_version} has delayed scaling only, which a fixed teacher cannot use.",
            next_step="Use megatron-core 0.12 or later, or set teacher_fp8 to null.",
        )
    teacher.config.fp8, teacher.config.fp8_recipe = params.format, params.scaling


@contextmanager
def _without_fp8(teacher: Model) -> Iterator[None]:
    config = teacher.config
    before, config.fp8 = config.fp8, None
    try:
        yield
    finally:
        config.fp8 = before


def require_close_teacher(
    teacher: Model,
    vocab_size: int,
    heldout: HeldOutBatches,
    params: Fp8Teacher,
    session: Session,
    work_dir: Path,
) -> float:
    """Measure the KL from the bf16 teacher to the FP8 teacher on held-out text; return it, in nats per token.

    Args:
        vocab_size: tokens that are compared; the rows after them are padding.

    Raises:
        NumericsError: the KL is above params.max_kl, or not finite.
    """
    batches = list(islice(heldout.batches, MAX_BATCHES))
    with evaluating(teacher):
        # FP8 first, so that Transformer Engine keeps FP8 weights from the first pass.
        in_fp8 = _head_inputs(teacher, batches, session)
        with _without_fp8(teacher):
            in_bf16 = _head_inputs(teacher, batches, session)
    sums = torch.zeros(2, dtype=torch.float64, device=session.device)
    if session.is_last_stage:
        weight_VD = head_weight(teacher, vocab_size)
        vocab = vocab_of(session, head(teacher).output_size_per_partition, vocab_size)
        for batch, exact, approximate in zip(batches, in_bf16, in_fp8, strict=True):
            sums += _kl_sums(exact, approximate, weight_VD, batch["loss_mask"].flatten(), vocab)
    if session.tp_rank != 0:
        sums.zero_()
    total, count = session.sum(sums).tolist()
    kl = total / count
    if session.is_main:
        work_dir.mkdir(parents=True, exist_ok=True)
        facts = {"kl_nats_per_token": kl, "num_tokens": int(count), "max_kl": params.max_kl}
        write_whole(work_dir / MEASUREMENT_FILE, json.dumps(facts, indent=2) + "\n")
    if not kl <= params.max_kl:
        raise NumericsError(
            f"The FP8 teacher is not close to the bf16 teacher: KL {kl:.4g} nats per token on {int(count):,} tokens.",
            allowed=f"at most teacher_fp8.max_kl = {params.max_kl:g}",
            next_step="Use another scaling, raise max_kl, or set teacher_fp8 to null.",
        )
    return kl


def _head_inputs(model: Model, batches: list[Batch], session: Session) -> list[Tensor]:
    """Return the input of the output layer for each batch; on the last stage only."""
    found: list[Tensor] = []
    forward_batches(model, batches, session, lambda hidden, _: found.append(hidden.clone()), forward=model_hidden)
    return found


def _kl_sums(exact_BSD: Tensor, approximate_BSD: Tensor, weight_VD: Tensor, mask: Tensor, vocab: Vocab) -> Tensor:
    """Return the sum of the KL over the tokens of a batch, and their number."""
    exact, approximate = (Head(weight_VD, hidden.flatten(0, 1), vocab) for hidden in (exact_BSD, approximate_BSD))
    sums = torch.zeros(2, dtype=torch.float64, device=mask.device)
    for rows in exact.all_blocks():
        kl, _ = forward_kl(approximate.logits(rows), exact.logits(rows), LogitsLoss(), vocab)
        weights = mask[rows].double()
        sums += torch.stack([kl.double() @ weights, weights.sum()])
    return sums
