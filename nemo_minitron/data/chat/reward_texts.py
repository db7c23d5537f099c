"""Whether a reward model reads answers as it was trained to: same tokenizer, template, date and rated position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.data.chat.tokenizing import ChatTemplate
from nemo_minitron.hf.tokenizer_identity import tokenizer_fingerprint
from nemo_minitron.schema.base import TEMPLATE_DATE


def misreadings(
    model: Path, template: ChatTemplate, tokenizer: Path, stage: str, result: Mapping[str, Any]
) -> Iterator[str]:
    """Yield why a reward model would misread the answers of a model, one line each.

    Args:
        model: Hugging Face folder of the model that answers.
        template: chat template of its prompts.
        tokenizer: tokenizer folder of the reward model.
        stage, result: the stage that trained the reward model, and what it recorded.
    """
    if tokenizer_fingerprint(model) != tokenizer_fingerprint(tokenizer):
        yield "the reward model has another tokenizer than the model, and would misread its tokens."
        return
    trained = ChatTemplate.load(tokenizer, result["template"], whole_markers=result["whole_markers"])
    if trained.jinja != template.jinja:
        yield (
            f"template: the reward model (stage {stage}, template {result['template']}) was trained with another chat "
            "template than the model uses."
        )
    elif "strftime_now" in template.jinja and (day := result.get("template_date", str(TEMPLATE_DATE))) != str(
        template.day
    ):
        yield f"template_date: the reward model was trained on texts of {day}, and the prompts have {template.day}."
    elif result["reward"] == "regression" and trained.rated_end:
        yield (
            f"template: the reward model was trained to rate at {trained.rated_end!r}, and would be evaluated at the "
            f"end of the answer. Train stage {stage} with another template than {result['template']}."
        )
