"""Evaluate an aligned model on held-out pairs or conversations."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron.data.chat.heldout import HeldOut
from nemo_minitron.data.chat.rows import Row
from nemo_minitron.data.chat.tokenizing import ChatTemplate
from nemo_minitron.evaluation.chat_metrics import answer_loss, preference_metrics, rank_correlation
from nemo_minitron.evaluation.chat_questions import LEVELS, Questions, Tokens, prepare
from nemo_minitron.evaluation.final_number import final_number, is_exact_match
from nemo_minitron.evaluation.metrics import perplexity
from nemo_minitron.stages.artifacts import ChatRows, Model
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.evaluate_chat.params import EvaluateChatStage
from nemo_minitron.stages.kind import Result


@dataclass(frozen=True)
class Inputs:
    """Inputs of the stage, by role."""

    model: Model
    chats: ChatRows
    reference: Model | None = None


def evaluate_chat(params: EvaluateChatStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Measure the model on all ranks, which share out the rows, and write metrics.json and answers.jsonl.

    On pairs: preference accuracy. On conversations: loss of the answers, exact match, and how the answers follow the
    requested attribute. If the recipe names instructions: how often the answers follow their rules.

    Raises:
        CheckpointError: a model cannot be read.
        DataError: its tokenizer has no chat template, too many rows do not fit it, or no valid row is left.
        NumericsError: transformers and Megatron do not compute the same logits of a model.
    """
    template = ChatTemplate.load(
        inputs.model.path, params.template, whole_markers=params.whole_markers, day=params.template_date
    )
    questions = prepare(params, inputs.chats, template, name=ctx.name, assets_dir=Path(ctx.execution.assets_dir))
    for text in questions.left_out():
        ctx.progress.say(text)
    model = _loaded(inputs.model, params, ctx)
    metrics: dict[str, Any] = {"label": params.label, **questions.heldout.facts()}
    answers: list[dict[str, Any]] = []
    if inputs.chats.rows == "pairs":
        other = None if inputs.reference is None else _loaded(inputs.reference, params, ctx)
        metrics["preferences"] = _preferences(questions.heldout, template, model, other, ctx)
    else:
        metrics["conversations"] = _conversations(questions.heldout, template, model, ctx)
        metrics |= _generated(params, questions.generated, template, model, answers, ctx)
    if params.instructions is not None:
        metrics["instructions"] = _instructions(params, questions, template, model, answers, ctx)
    texts = _continued(params, [prompt for _, prompt in questions.samples], template, model, ctx)
    metrics["samples"] = [
        {"prompt": prompt, "text": text} for (prompt, _), (text, _) in zip(questions.samples, texts, strict=True)
    ]
    if not ctx.is_main:
        return {}
    (ctx.out_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    (ctx.out_dir / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers), encoding="utf-8")
    return {key: value for key, value in metrics.items() if key != "samples"}


def _loaded(model: Model, params: EvaluateChatStage, ctx: StageContext) -> Any:
    """Load a model into transformers on this rank's device; rank 0 compares its logits with Megatron's before."""
    from nemo_minitron.evaluation.agreement import load_compared, require_agreement

    session = ctx.open_session
    with session.main_works():
        if session.is_main:
            require_agreement(model.path, ctx.logits_memory, session)
    return load_compared(model.path, params.precision, str(session.device), memory=ctx.logits_memory, session=session)


def _preferences(
    heldout: HeldOut, template: ChatTemplate, model: Any, reference: Any, ctx: StageContext
) -> dict[str, Any]:
    from nemo_minitron.evaluation.answers import answer_log_probs

    pairs = heldout.rendered
    sequences = [
        _sequence(template, pair["prompt"], pair[key])
        for key in ("chosen_response", "rejected_response")
        for pair in pairs
    ]
    found = answer_log_probs(model, sequences, ctx.progress, "preferences", ctx.open_session)
    sizes = [len(answer) for _, answer in sequences]
    half = len(pairs)
    out: dict[str, Any] = {
        "log_probs": preference_metrics(found[:half], found[half:]),
        "log_probs_per_token": preference_metrics(
            *(
                [value / size for value, size in zip(found[part], sizes[part], strict=True)]
                for part in (slice(0, half), slice(half, None))
            )
        ),
        "mean_tokens": {"chosen": sum(sizes[:half]) / half, "rejected": sum(sizes[half:]) / half},
        "too_long": heldout.too_long,
    }
    if reference is not None:
        before = answer_log_probs(reference, sequences, ctx.progress, "reference", ctx.open_session)
        rewards = [value - other for value, other in zip(found, before, strict=True)]
        out["against_reference"] = preference_metrics(rewards[:half], rewards[half:])
    return out


def _sequence(template: ChatTemplate, prompt: str, answer: str) -> tuple[Tokens, Tokens]:
    ids = template.ids(prompt)
    return ids, template.ids(prompt + answer)[len(ids) :]


def _conversations(heldout: HeldOut, template: ChatTemplate, model: Any, ctx: StageContext) -> dict[str, Any]:
    """Measure the loss of the held-out answers over their own tokens, without those of the prompts."""
    from nemo_minitron.evaluation.answers import answer_log_probs

    sequences = [_sequence(template, text["input"], text["output"]) for text in heldout.rendered]
    found = answer_log_probs(model, sequences, ctx.progress, "held-out answers", ctx.open_session)
    sizes = [len(answer) for _, answer in sequences]
    measured = answer_loss(found, sizes)
    loss = measured["loss_nats_per_token"]
    assert loss is not None
    facts = {"answers": len(found), "answer_tokens": sum(sizes), "too_long": heldout.too_long}
    return {**facts, **measured, "perplexity": perplexity(loss)}


def _generated(
    params: EvaluateChatStage,
    questions: list[tuple[Row, int | None, Tokens]],
    template: ChatTemplate,
    model: Any,
    answers: list[dict[str, Any]],
    ctx: StageContext,
) -> dict[str, Any]:
    """Generate answers to held-out questions, and measure their length, exact match or response to an attribute."""
    if not questions:
        return {}
    made = _continued(params, [prompt for _, _, prompt in questions], template, model, ctx)
    for (row, level, _), (text, tokens) in zip(questions, made, strict=True):
        question = row["messages"][-2]["content"]
        answers.append({"origin": row["origin"], "prompt": question, "level": level, "answer": text, "tokens": tokens})
    out: dict[str, Any] = {"mean_answer_tokens": sum(tokens for _, tokens in made) / len(made)}
    wanted = [row["messages"][-1]["content"] for row, _, _ in questions]
    if params.vary_attribute is not None:
        per_row = len(LEVELS)
        sizes = [[tokens for _, tokens in made[i : i + per_row]] for i in range(0, len(made), per_row)]
        by_level = {str(level): sum(row[level] for row in sizes) / len(sizes) for level in LEVELS}
        found = rank_correlation([LEVELS] * len(sizes), sizes)
        out["attribute"] = {"name": params.vary_attribute, **found, "mean_tokens_by_level": by_level}
    elif all("####" in text and final_number(text) is not None for text in wanted):
        right = [is_exact_match(text, answer) for (text, _), answer in zip(made, wanted, strict=True)]
        share = sum(right) / len(right)
        error = math.sqrt(share * (1 - share) / len(right))
        out["exact_match"] = {"questions": len(right), "share": share, "se": error}
    return out


def _instructions(
    params: EvaluateChatStage,
    questions: Questions,
    template: ChatTemplate,
    model: Any,
    answers: list[dict[str, Any]],
    ctx: StageContext,
) -> dict[str, Any]:
    """Measure how often the model's answers follow rules that a program can verify."""
    from nemo_minitron.evaluation.instructions import follows, instruction_metrics

    made = _continued(params, [prompt for _, prompt in questions.instructions], template, model, ctx)
    rows = [row for row, _ in questions.instructions]
    found = [follows(row, text) for row, (text, _) in zip(rows, made, strict=True)]
    for row, (text, tokens), followed in zip(rows, made, found, strict=True):
        rules = dict(zip(row.rules, followed["strict"], strict=True))
        answers.append({"prompt": row.prompt, "answer": text, "tokens": tokens, "followed": rules})
    return {**instruction_metrics(found), **questions.bad_instructions.facts()}


def _continued(
    params: EvaluateChatStage, prompts: list[Tokens], template: ChatTemplate, model: Any, ctx: StageContext
) -> list[tuple[str, int]]:
    from nemo_minitron.evaluation.answers import greedy_answers

    if not prompts:
        return []
    stop = template.spelled_stop()
    return greedy_answers(
        model, template.tokenizer, prompts, params.max_new_tokens, ctx.progress, stop, ctx.open_session
    )
