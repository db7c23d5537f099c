"""Stages that fine-tune a model, optimize preferences or train a reward model, through an alignment backend."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.backends.alignment.base import (
    AnswerWeightsObjective,
    PreferenceObjective,
    RewardObjective,
    SftObjective,
    alignment_backend,
)
from nemo_minitron.data.chat.render import Purpose
from nemo_minitron.data.chat.rows import ATTRIBUTES
from nemo_minitron.errors import DataError
from nemo_minitron.evaluation.attributes import agreement
from nemo_minitron.stages.align.params import AttributeModelStage, DpoStage, SftStage, Steerlm2Stage, SteerlmSftStage
from nemo_minitron.stages.artifacts import ChatRows, Model, SampledAnswers
from nemo_minitron.stages.common.alignment_rows import PARTS, Rows, write_rows
from nemo_minitron.stages.common.alignment_training import task_context, train, train_and_publish
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.kind import Result


@dataclass(frozen=True)
class Inputs:
    """What the stages read."""

    model: Model
    chats: ChatRows


@dataclass(frozen=True)
class Steerlm2Inputs:
    """What a steerlm2 stage reads."""

    model: Model
    answers: SampledAnswers


def sft(params: SftStage | SteerlmSftStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Fine-tune on conversations; publish a Hugging Face model and the curves.

    Raises:
        DataError: rows that cannot be used.
        ConfigError: a key or model that the backend does not support, or sizes that do not fit.
        Interrupted: a stop was requested; the same command resumes.
    """
    required_keys = ("attributes",) if isinstance(params, SteerlmSftStage) else ()
    rows = write_rows(params, inputs.model, inputs.chats, ctx, "sft", required_keys=required_keys)
    return train_and_publish(params, SftObjective(), inputs.model.path, rows, ctx, template=params.template)


def steerlm2(params: Steerlm2Stage, inputs: Steerlm2Inputs, ctx: StageContext) -> Result:
    """Train on weighted answers of a steerlm2_answers stage; publish a Hugging Face model and the curves.

    Raises:
        DataError: fewer prompts than a batch takes, or answers longer than the training reads.
        Otherwise as `sft`.
    """
    answers = inputs.answers
    _require_fit(params, answers, ctx)
    train_file, valid_file = (answers.file(part) for part in PARTS)
    lengths = {part: answers.lengths(part) for part in PARTS}
    rows = Rows(train_file, valid_file, answers.num_prompts("train"), lengths)
    objective = AnswerWeightsObjective(answers.answers_per_prompt)
    return train_and_publish(params, objective, inputs.model.path, rows, ctx, template=answers.template)


def _require_fit(params: Steerlm2Stage, answers: SampledAnswers, ctx: StageContext) -> None:
    for part in PARTS:
        if answers.num_prompts(part) < params.global_batch_size:
            raise DataError(
                f"Stage {answers.stage} has answers to {answers.num_prompts(part)} prompts of the {part} part, and a "
                f"batch takes {params.global_batch_size}.",
                where=f"stages.{ctx.name}.global_batch_size",
                next_step="Lower it, or let that stage answer more prompts.",
            )
    if answers.max_seq_len_tokens > params.max_seq_len_tokens:
        raise DataError(
            f"Stage {answers.stage} has answers of up to {answers.max_seq_len_tokens} tokens with their prompts, and "
            f"max_seq_len_tokens = {params.max_seq_len_tokens}. They would be cut off.",
            where=f"stages.{ctx.name}.max_seq_len_tokens",
            next_step=f"Set it to {answers.max_seq_len_tokens}.",
        )


def dpo(params: DpoStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Optimize preferences against the input model; publish a Hugging Face model and the curves.

    Raises:
        As `sft`.
    """
    needs_rewards = params.preference_loss.startswith("rpo")
    required_keys = ("chosen_reward", "rejected_reward") if needs_rewards else ()
    rows = write_rows(params, inputs.model, inputs.chats, ctx, "pairs", required_keys=required_keys)
    objective = PreferenceObjective(
        loss=params.preference_loss,
        beta=params.beta,
        reward_scale=params.reward_scale,
        sft_loss_weight=params.sft_loss_weight,
        average_log_probs=params.average_log_probs,
    )
    return train_and_publish(params, objective, inputs.model.path, rows, ctx, template=params.template)


def train_attribute_model(params: AttributeModelStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Train a reward model; publish it in the backend's form, which `annotate` reads.

    Raises:
        As `sft`.
    """
    regression = params.reward == "regression"
    purpose: Purpose = "rated" if regression else "pairs"
    rows = write_rows(params, inputs.model, inputs.chats, ctx, purpose, split_pairs=not regression)
    objective = RewardObjective(params.reward, num_outputs=len(ATTRIBUTES) if regression else 1)
    facts = {
        **train(params, objective, inputs.model.path, rows, ctx),
        "reward": params.reward,
        "template": params.template,
        "whole_markers": params.whole_markers,
        "template_date": params.template_date.isoformat(),
    }
    return {**facts, "agreement": _agreement(rows, ctx)} if regression else facts


def _agreement(rows: Rows, ctx: StageContext) -> dict[str, Any]:
    """Compare the model's attributes with those of people, on the held-out rows."""
    texts, labels = zip(*_read_labels(rows.valid), strict=True)
    context = task_context(ctx)
    found = alignment_backend().predict_rewards(ctx.out_dir, texts, context.layout.micro_batch_size, context)
    return agreement(labels, found, (label for _, label in _read_labels(rows.train)))


def _read_labels(file: Path) -> Iterator[tuple[str, list[float]]]:
    """Yield (text, label) of rendered rows."""
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield row["text"], row["label"]
