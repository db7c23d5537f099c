"""The stage that samples answers for SteerLM 2.0 and computes their log-probabilities."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from nemo_minitron.backends.alignment.base import alignment_backend
from nemo_minitron.data.chat.tokenizing import ChatTemplate
from nemo_minitron.errors import DataError, PlanError
from nemo_minitron.hf.tokenizer_identity import TokenizerIdentity
from nemo_minitron.stages.artifacts import ChatRows, Model, RewardModel
from nemo_minitron.stages.common.alignment_rows import PARTS
from nemo_minitron.stages.common.alignment_training import task_context
from nemo_minitron.stages.common.batch_file import SUFFIX, BatchFile
from nemo_minitron.stages.common.devices import torch_device
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.kind import Result
from nemo_minitron.stages.steerlm2_answers.params import Steerlm2AnswersStage
from nemo_minitron.stages.steerlm2_answers.prompts import Prompt, select_prompts
from nemo_minitron.stages.steerlm2_answers.rows import write_part
from nemo_minitron.stages.steerlm2_answers.sampling import AnswerReader, Record, reference_batch, sample_batch

RATED_AT_ONCE = 4096
"""Approximate number of texts that one process of the attribute model rates. Starting a process takes half a minute on
a CPU. A resumed stage does not rate the texts of finished processes again."""


@dataclass(frozen=True)
class Inputs:
    """What the stage reads."""

    model: Model
    reference: Model
    attribute_model: RewardModel
    chats: ChatRows


def steerlm2_answers(params: Steerlm2AnswersStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Sample answers with a SteerLM model; publish rows in NeMo-Aligner's format with their three log-probabilities.

    One model is in memory at a time. Finished batches survive a kill, and the same command goes on after them.

    Raises:
        Interrupted: a stop was requested.
        PlanError: the attribute model was trained by ranking, or the data are pairs.
        DataError: prompts without attributes, too many unusable rows, models with different tokenizers, or a part
            without enough usable answers.
        CheckpointError: a model cannot be read.
        NumericsError: transformers and Megatron do not compute the same logits of a model.
    """
    _require_kinds(inputs, ctx)
    _require_comparable(params, inputs, ctx)
    reader = _reader(params, inputs)
    prompts = select_prompts(params, reader.template, inputs.chats, f"stages.{ctx.name}")
    batches = prompts.batches(max(1, params.batch_size // params.answers_per_prompt))
    sampled = _sample(batches, reader, inputs.model, ctx)
    reference = _reference(batches, sampled, reader, inputs.reference, ctx)
    rated = _rate(sampled, params, inputs.attribute_model, ctx)
    facts: dict[str, Any] = {}
    for part in PARTS:
        found = write_part(ctx.out_dir / f"{part}.jsonl", _assembled(part, batches, sampled, reference, rated))
        facts[part] = {**prompts.counts[part], **found.facts()}
        if not facts[part]["rows"]:
            raise _no_answers(part, facts[part], params, ctx)
    return {
        **facts,
        "answers_per_prompt": params.answers_per_prompt,
        "max_seq_len_tokens": params.max_seq_len_tokens,
        "template": params.template,
    }


def _require_kinds(inputs: Inputs, ctx: StageContext) -> None:
    if inputs.attribute_model.reward != "regression" or inputs.chats.rows != "conversations":
        raise PlanError(
            "steerlm2_answers needs an attribute model that was trained by regression, and conversations.",
            where=f"stages.{ctx.name}.inputs",
        )


def _require_comparable(params: Steerlm2AnswersStage, inputs: Inputs, ctx: StageContext) -> None:
    """Check that both language models read the same tokens and use the same chat template."""
    models = (inputs.model, inputs.reference)
    one, other = (TokenizerIdentity.of(model.path) for model in models)
    parts = one.differences(other)
    if not parts:
        templates = [_template(params, model) for model in models]
        parts = ["chat template"] if templates[0].jinja != templates[1].jinja else []
    if parts:
        raise DataError(
            f"Stages {inputs.model.stage} and {inputs.reference.stage} differ in the tokenizer's {', '.join(parts)}, "
            "so their probabilities of an answer cannot be compared.",
            where=f"stages.{ctx.name}.inputs",
            next_step="Train both from the same model, with the same template.",
        )


def _template(params: Steerlm2AnswersStage, model: Model) -> ChatTemplate:
    return ChatTemplate.load(model.path, params.template, whole_markers=params.whole_markers, day=params.template_date)


def _reader(params: Steerlm2AnswersStage, inputs: Inputs) -> AnswerReader:
    rates = inputs.attribute_model
    return AnswerReader(
        params,
        _template(params, inputs.model),
        ChatTemplate.load(
            alignment_backend().reward_tokenizer(rates.path),
            rates.template,
            whole_markers=rates.whole_markers,
            day=rates.template_date,
        ),
    )


def _sample(batches: Sequence[Sequence[Prompt]], reader: AnswerReader, model: Model, ctx: StageContext) -> BatchFile:
    done = BatchFile(ctx.work_dir / f"sampled{SUFFIX}")
    if done.num_done < len(batches):
        loaded = _load(model, reader, ctx)
        for number in _missing(batches, done, "answers of the SteerLM model", ctx):
            done.append(sample_batch(batches[number], number, reader, loaded))
    return done


def _reference(
    batches: Sequence[Sequence[Prompt]], sampled: BatchFile, reader: AnswerReader, model: Model, ctx: StageContext
) -> BatchFile:
    done = BatchFile(ctx.work_dir / f"reference{SUFFIX}")
    if done.num_done < len(batches):
        loaded, records = _load(model, reader, ctx), islice(sampled, done.num_done, None)
        for number in _missing(batches, done, "log-probabilities of the reference", ctx):
            done.append(reference_batch(batches[number], next(records), reader, loaded))
    return done


def _load(model: Model, reader: AnswerReader, ctx: StageContext) -> Any:
    from nemo_minitron.evaluation.agreement import load_compared

    gc.collect()  # frees the model before this one, whose parts refer to each other
    return load_compared(model.path, reader.params.precision, torch_device(ctx), memory=ctx.logits_memory)


def _missing(batches: Sequence[Sequence[Prompt]], done: BatchFile, what: str, ctx: StageContext) -> Iterator[int]:
    """Yield the numbers of the unfinished batches, and show how many prompts are finished."""
    first, total = done.num_done, sum(map(len, batches))
    with ctx.progress.bar(what, total, "prompts", done=sum(map(len, batches[:first]))) as bar:
        for number in range(first, len(batches)):
            ctx.check_stop()
            yield number
            bar.advance(len(batches[number]))


def _rate(
    sampled: BatchFile, params: Steerlm2AnswersStage, attribute_model: RewardModel, ctx: StageContext
) -> BatchFile:
    """Let the attribute model rate all answers, [prompts][answers][attributes] for each batch."""
    done, backend = BatchFile(ctx.work_dir / f"rated{SUFFIX}"), alignment_backend()
    for group in _groups(islice(sampled, done.num_done, None)):
        texts = [text for records in group for record in records for text in record["rated"]]
        ctx.progress.say(f"rating {len(texts):,} answers")
        size = params.batch_size
        found = iter(backend.predict_rewards(attribute_model.path, texts, size, task_context(ctx)) if texts else [])
        for records in group:
            done.append([[next(found) for _ in record["rated"]] for record in records])
    return done


def _groups(batches: Iterable[list[Record]]) -> Iterator[list[list[Record]]]:
    """Yield groups of consecutive batches of answers."""
    group: list[list[Record]] = []
    size = 0
    for records in batches:
        group.append(records)
        size += sum(len(record["rated"]) for record in records)
        if size >= RATED_AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group


def _assembled(
    part: str, batches: Sequence[Sequence[Prompt]], *files: BatchFile
) -> Iterator[tuple[Prompt, Any, Any, Any]]:
    """Yield (prompt, its answers, log P(y|x) of each, predicted attributes of each) of one part."""
    for batch, *results in zip(batches, *files, strict=True):
        if batch[0].part == part:
            yield from zip(batch, *results, strict=True)


def _no_answers(part: str, facts: dict[str, Any], params: Steerlm2AnswersStage, ctx: StageContext) -> DataError:
    return DataError(
        f"None of the {facts['prompts']} prompts of the {part} part got {params.answers_per_prompt} usable answers in "
        f"{params.max_attempts} attempts; {facts['ended']:.0%} of the sampled answers ended within max_new_tokens = "
        f"{params.max_new_tokens}.",
        where=f"stages.{ctx.name}.max_new_tokens",
        next_step="Raise max_new_tokens or max_attempts, lower the temperature, or train the SteerLM model longer.",
    )
