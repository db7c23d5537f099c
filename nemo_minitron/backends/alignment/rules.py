"""Rules for trainings with an alignment backend; each function yields one line for each broken rule."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_minitron.backends.alignment.base import Method, alignment_backend
from nemo_minitron.families import ModelShape
from nemo_minitron.schema.alignment import RowTraining
from nemo_minitron.schema.chats import ChatRowFacts, RowKind
from nemo_minitron.schema.execution import Parallel

CHAT_SEQ_MULTIPLE = 8
"""Conversations are padded to a multiple of this number of tokens: GPTSFTChatDataset of NeMo, SteerLM2Dataset of
NeMo-Aligner."""


def option_problems(key: str, params: RowTraining, method: Method) -> Iterator[str]:
    """Yield what is wrong with the keys of the backend's own config."""
    problems = alignment_backend().override_problems(method, params.aligner)
    yield from (f"{key}.aligner.{problem}" for problem in problems)


def row_problems(
    key: str, params: RowTraining, chats: str, held: ChatRowFacts | None, needed: RowKind
) -> Iterator[str]:
    """Yield what is wrong with the rows for this training.

    Args:
        chats: name of the stage that makes the rows.
        held: facts about the rows; None if they are unknown.
        needed: kind of rows that the training reads.
    """
    if held is None:
        return
    if held.rated_from is not None and needed == "pairs":
        yield f"{key}.inputs.chats: an annotate stage has conversations, not pairs."
    elif held.rated_from is None and held.rows != needed:
        yield f"{key}.inputs.chats: stage {chats} has rows: {held.rows}, not {needed}."
    if held.valid_rows < params.global_batch_size:
        yield (
            f"{key}.global_batch_size = {params.global_batch_size}: validation takes whole batches, and stage "
            f"{held.rated_from or chats} has valid_rows = {held.valid_rows}."
        )


def size_problems(key: str, params: RowTraining, layout: Parallel) -> Iterator[str]:
    """Yield conflicts between batch sizes, learning rates and steps."""
    unit = layout.micro_batch_size * layout.dp
    if params.global_batch_size % unit:
        yield (
            f"{key}.global_batch_size = {params.global_batch_size}: not a multiple of micro_batch_size * dp = "
            f"{layout.micro_batch_size} * {layout.dp}."
        )
    yield from step_problems(key, params)


def step_problems(key: str, params: RowTraining) -> Iterator[str]:
    """Yield conflicts between learning rates and steps."""
    if params.min_lr > params.lr:
        yield f"{key}.min_lr = {params.min_lr}: above lr = {params.lr}."
    if params.num_steps is not None and params.warmup_steps >= params.num_steps:
        yield f"{key}.warmup_steps = {params.warmup_steps}: must be fewer than num_steps = {params.num_steps}."


def sequence_problems(
    key: str, max_seq_len_tokens: int, layout: Parallel, padded_to: int | None = None
) -> Iterator[str]:
    """Yield why sequence parallelism cannot split the sequences of a batch over tensor-parallel ranks.

    Args:
        padded_to: shorter batches are padded to a multiple of this number of tokens. None: to a multiple of tp.
    """
    if not layout.sequence_parallel:
        return
    if max_seq_len_tokens % layout.tp:
        yield (
            f"{key}.max_seq_len_tokens = {max_seq_len_tokens}: sequence_parallel needs a multiple of tp = {layout.tp}."
        )
    elif padded_to is not None and padded_to % layout.tp:
        yield (
            f"{key}: sequence_parallel cannot split sequences over tp = {layout.tp}: they are padded to a multiple of "
            f"{padded_to} tokens. Allowed: a tp that divides {padded_to}, or sequence_parallel: false for this stage "
            "(execution.parallel_by_stage)."
        )


def model_problems(key: str, shape: ModelShape | None, layout: Parallel) -> Iterator[str]:
    """Yield why the backend cannot train a model of this shape; nothing for an unknown shape."""
    if shape is not None:
        yield from (f"{key}: {problem}" for problem in alignment_backend().model_problems(shape, layout))
