"""How an aligned model does on held-out pairs and conversations."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts.types import Inputs
from nemo_minitron.config.schema import ChatRendering, EvaluateChatStage
from nemo_minitron.data.chat.lengths import LengthStats
from nemo_minitron.data.chat.render import pair_row, read_normalised, sft_rows
from nemo_minitron.data.chat.rows import Row, question
from nemo_minitron.data.chat.tokenizing import ChatTemplate
from nemo_minitron.evaluation.chat_metrics import is_exact_match, preference_metrics, rank_correlation
from nemo_minitron.hf.source import resolve_path
from nemo_minitron.stages.spec import Result, StageContext

LEVELS = (0, 1, 2, 3, 4)


def evaluate_chat(params: EvaluateChatStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Preferences on pairs; loss of answers, exact match, and obedience to attributes on conversations; rules followed.

    Writes metrics.json and answers.jsonl.

    Raises:
        CheckpointError: a model cannot be read.
        NumericsError: transformers and Megatron do not compute the same logits of a model.
        DataError: its tokenizer has no chat template.
    """
    from nemo_minitron.evaluation.agreement import load_compared

    template = ChatTemplate.load(inputs["model"].path, params.template, whole_markers=params.whole_markers)
    rows = list(islice(read_normalised(inputs["chats"].path / "valid.jsonl"), params.max_rows))
    device = _device(ctx)
    model = load_compared(inputs["model"].path, params.precision, device, memory=ctx.logits_memory)
    metrics: dict[str, Any] = {"label": params.label, "rows": len(rows)}
    answers: list[dict[str, Any]] = []
    if inputs["chats"].result["rows"] == "pairs":
        reference = inputs.get("reference")
        other = load_compared(reference.path, params.precision, device, memory=ctx.logits_memory) if reference else None
        metrics["preferences"] = _preferences(params, rows, template, model, other, ctx)
    else:
        metrics["conversations"] = _conversations(params, rows, template, model, ctx)
        metrics |= _generated(params, rows, template, model, answers, ctx)
    if params.instructions is not None:
        metrics["instructions"] = _instructions(params, params.instructions, template, model, answers, ctx)
    metrics["samples"] = _samples(params, template, model, ctx)
    (ctx.out_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    (ctx.out_dir / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers), encoding="utf-8")
    return {key: value for key, value in metrics.items() if key != "samples"}


def _device(ctx: StageContext) -> str:
    import torch

    wanted = ctx.execution.device
    return wanted if wanted != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _options(params: EvaluateChatStage) -> ChatRendering:
    return ChatRendering(turns="last", max_seq_len_tokens=params.max_seq_len_tokens, condition_on_attributes=False)


def _preferences(
    params: EvaluateChatStage, rows: list[Row], template: ChatTemplate, model: Any, reference: Any, ctx: StageContext
) -> dict[str, Any]:
    from nemo_minitron.evaluation.answers import answer_log_probs

    stats = LengthStats()
    pairs = [pair for row in rows if (pair := pair_row(row, template, _options(params), stats)) is not None]
    sequences = [
        (template.ids(pair["prompt"]), template.ids(pair["prompt"] + pair[key])[len(template.ids(pair["prompt"])) :])
        for key in ("chosen_response", "rejected_response")
        for pair in pairs
    ]
    found = answer_log_probs(model, sequences, ctx.progress, "preferences")
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
        "too_long": stats.num_dropped,
    }
    if reference is not None:
        before = answer_log_probs(reference, sequences, ctx.progress, "reference")
        rewards = [value - other for value, other in zip(found, before, strict=True)]
        out["against_reference"] = preference_metrics(rewards[:half], rewards[half:])
    return out


def _conversations(
    params: EvaluateChatStage, rows: list[Row], template: ChatTemplate, model: Any, ctx: StageContext
) -> dict[str, Any]:
    """Loss of the held-out answers, over answer tokens alone."""
    from nemo_minitron.evaluation.answers import answer_log_probs

    stats = LengthStats()
    texts = [text for row in rows for text in sft_rows(row, template, _options(params), stats)]
    sequences = []
    for text in texts:
        prompt = template.ids(text["input"])
        sequences.append((prompt, template.ids(text["input"] + text["output"])[len(prompt) :]))
    found = answer_log_probs(model, sequences, ctx.progress, "held-out answers")
    tokens = sum(len(answer) for _, answer in sequences)
    loss = -sum(found) / tokens
    facts = {"answers": len(found), "answer_tokens": tokens, "too_long": stats.num_dropped}
    return {**facts, "loss_nats_per_token": loss, "perplexity": math.exp(loss)}


def _generated(
    params: EvaluateChatStage,
    rows: list[Row],
    template: ChatTemplate,
    model: Any,
    answers: list[dict[str, Any]],
    ctx: StageContext,
) -> dict[str, Any]:
    """What the model answers to held-out questions by itself; a question with many answers is asked once."""
    first_rows: dict[str, Row] = {}
    for row in rows:
        first_rows.setdefault(question(row), row)
    chosen = list(first_rows.values())[: params.num_generated]
    if not chosen:
        return {}
    levels = LEVELS if params.vary_attribute is not None else (None,)
    prompts = []
    for row in chosen:
        for level in levels:
            asked = _asked(params)
            if params.vary_attribute is not None and level is not None:
                asked[params.vary_attribute] = level
            prompts.append(template.ids(template.prompt(row["messages"][:-1], asked or None)))
    made = _continued(params, prompts, template, model, ctx)
    for number, (text, tokens) in enumerate(made):
        row, level = chosen[number // len(levels)], levels[number % len(levels)]
        asked_text = row["messages"][-2]["content"]
        answers.append(
            {"origin": row["origin"], "prompt": asked_text, "level": level, "answer": text, "tokens": tokens}
        )
    out: dict[str, Any] = {"mean_answer_tokens": sum(tokens for _, tokens in made) / len(made)}
    if params.vary_attribute is not None:
        sizes = [[tokens for _, tokens in made[i : i + len(levels)]] for i in range(0, len(made), len(levels))]
        by_level = {str(level): sum(row[level] for row in sizes) / len(sizes) for level in LEVELS}
        found = rank_correlation([LEVELS] * len(sizes), sizes)
        out["attribute"] = {"name": params.vary_attribute, **found, "mean_tokens_by_level": by_level}
    elif all("####" in row["messages"][-1]["content"] for row in chosen):
        right = [
            is_exact_match(text, row["messages"][-1]["content"]) for (text, _), row in zip(made, chosen, strict=True)
        ]
        share = sum(right) / len(right)
        error = math.sqrt(share * (1 - share) / len(right))
        out["exact_match"] = {"questions": len(right), "share": share, "se": error}
    return out


def _instructions(
    params: EvaluateChatStage,
    source: str,
    template: ChatTemplate,
    model: Any,
    answers: list[dict[str, Any]],
    ctx: StageContext,
) -> dict[str, float]:
    """How often the model's answers follow rules that a program can check."""
    from nemo_minitron.evaluation.instructions import follows, instruction_metrics, read_instructions

    rows = read_instructions(resolve_path(source, Path(ctx.execution.assets_dir)), params.max_instructions)
    made = _answers(params, [row.prompt for row in rows], template, model, ctx)
    found = [follows(row, text) for row, (text, _) in zip(rows, made, strict=True)]
    for row, (text, tokens), followed in zip(rows, made, found, strict=True):
        rules = dict(zip(row.rules, followed["strict"], strict=True))
        answers.append({"prompt": row.prompt, "answer": text, "tokens": tokens, "followed": rules})
    return instruction_metrics(found)


def _asked(params: EvaluateChatStage) -> dict[str, float]:
    return {str(name): value for name, value in params.other_attributes.items()}


def _samples(params: EvaluateChatStage, template: ChatTemplate, model: Any, ctx: StageContext) -> list[dict[str, str]]:
    made = _answers(params, params.prompts, template, model, ctx)
    return [{"prompt": text, "text": answer} for text, (answer, _) in zip(params.prompts, made, strict=True)]


def _answers(
    params: EvaluateChatStage, questions: Sequence[str], template: ChatTemplate, model: Any, ctx: StageContext
) -> list[tuple[str, int]]:
    """What the model says to each question alone."""
    prompts = [
        template.ids(template.prompt([{"role": "user", "content": text}], _asked(params) or None)) for text in questions
    ]
    return _continued(params, prompts, template, model, ctx)


def _continued(
    params: EvaluateChatStage, prompts: list[list[int]], template: ChatTemplate, model: Any, ctx: StageContext
) -> list[tuple[str, int]]:
    from nemo_minitron.evaluation.answers import greedy_answers

    if not prompts:
        return []
    stop = template.spelled_stop()
    return greedy_answers(model, template.tokenizer, prompts, params.max_new_tokens, ctx.progress, stop)
