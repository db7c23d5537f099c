"""Preflight check of a chat evaluation: render its questions before the model is trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nemo_minitron.artifacts.store import Store
from nemo_minitron.artifacts.types import Artifact
from nemo_minitron.data.chat.tokenizing import ChatTemplate
from nemo_minitron.errors import CheckpointError, DataError, MinitronError
from nemo_minitron.evaluation.chat_questions import prepare
from nemo_minitron.schema.base import StageParams
from nemo_minitron.schema.chats import TemplateName
from nemo_minitron.stages.evaluate_chat.params import EvaluateChatStage
from nemo_minitron.stages.registry import STAGES

Stages = Mapping[str, StageParams]


def preflight(
    name: str, params: EvaluateChatStage, training: str, stages: Stages, store: Store, assets_dir: Path
) -> None:
    """Render the evaluation's questions if its rows and its tokenizer exist already.

    A training changes neither of them, so rows that the evaluation cannot use are found before the training starts.

    Args:
        training: the stage that is about to train; nothing is checked if the evaluated model does not depend on it.

    Raises:
        DataError: the evaluation would fail; with the message of the evaluation.
    """
    if training not in _ancestors(params.inputs.model, stages):
        return
    chats, found = _rows(params.inputs.chats, stages, store), tokenizer_of(params, stages, store)
    if chats is None or found is None:
        return
    folder, template = found
    try:
        bound = ChatTemplate.load(folder, template, whole_markers=params.whole_markers, day=params.template_date)
        prepare(params, chats, bound, name=name, assets_dir=assets_dir)
    except CheckpointError:
        return  # the stage that reads the tokenizer first reports this error with more context
    except MinitronError as error:
        raise DataError(
            f"Stage {name} would fail after the training of {params.inputs.model}. {error.what}",
            where=error.where,
            allowed=error.allowed,
            next_step=error.next_step,
        ) from error


def _rows(chats: str, stages: Stages, store: Store) -> Artifact | None:
    """Return the rows of the evaluation; if they have not been rated yet, the rows without ratings."""
    while store.manifest(chats) is None:
        source = STAGES[stages[chats].kind].rated_rows(stages[chats])
        if source is None:
            return None
        chats = source
    return store.artifact(chats, "unverified")


def tokenizer_of(params: EvaluateChatStage, stages: Stages, store: Store) -> tuple[Path, TemplateName] | None:
    """Return the folder with the tokenizer of the evaluated model, and the chat template that the model will have."""
    template: TemplateName = params.template
    for name in _ancestors(params.inputs.model, stages):
        if store.manifest(name) is not None:
            return store.published(name), template
        if template == "model":  # trainings on chats save the template that they use with the model
            template = getattr(stages[name], "template", "model")
    return None


def _ancestors(model: str, stages: Stages) -> list[str]:
    """List a model's stage and the stages of the models that it was made from, newest first."""
    out: list[str] = []
    while model in stages and model not in out:
        out.append(model)
        inputs = getattr(stages[model], "inputs", None)
        model = getattr(inputs, "student", None) or getattr(inputs, "model", None) or ""
    return out
