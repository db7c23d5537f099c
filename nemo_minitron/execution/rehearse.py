"""Finding before a long training what the evaluation after it could not read."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from nemo_minitron.artifacts.store import Store
from nemo_minitron.artifacts.types import Artifact
from nemo_minitron.config.schema import Alignment, AnnotateStage, EvaluateChatStage, Recipe, TemplateName
from nemo_minitron.errors import CheckpointError, DataError, MinitronError
from nemo_minitron.stages.spec import STAGES

TRAININGS = ("distill", "train", "correct")


def rehearse_evaluations(training: str, recipe: Recipe, store: Store, wanted: Collection[str]) -> None:
    """Render what every `evaluate_chat` stage after this training will ask, if its rows and tokenizer are there.

    Training changes neither, so that a row which the evaluation cannot read is known before the hours are spent.

    Args:
        training: a stage; those that do not train are not looked at.
        wanted: the stages of this run.

    Raises:
        DataError: an evaluation would stop; the words are its own.
    """
    kind = STAGES[recipe.stages[training].kind]
    if kind.kind not in TRAININGS and not kind.starts_ranks:
        return
    for name, stage in recipe.stages.items():
        if not isinstance(stage, EvaluateChatStage) or name not in wanted or store.manifest(name) is not None:
            continue
        if training in _ancestors(stage.inputs.model, recipe):
            _rehearse(name, stage, recipe, store)


def _rehearse(name: str, stage: EvaluateChatStage, recipe: Recipe, store: Store) -> None:
    from nemo_minitron.data.chat.tokenizing import ChatTemplate
    from nemo_minitron.stages.chat_questions import prepare

    chats, found = _rows(stage.inputs.chats, recipe, store), _tokenizer(stage, recipe, store)
    if chats is None or found is None:
        return
    folder, template = found
    try:
        bound = ChatTemplate.load(folder, template, whole_markers=stage.whole_markers, day=stage.template_date)
        prepare(stage, chats, bound, name=name, assets_dir=Path(recipe.execution.assets_dir))
    except CheckpointError:
        return  # the stages that need the tokenizer say better what is wrong with it
    except MinitronError as error:
        raise DataError(
            f"Stage {name} would stop after the training of {stage.inputs.model}. {error.what}",
            where=error.where,
            allowed=error.allowed,
            next_step=error.next_step,
        ) from error


def _rows(chats: str, recipe: Recipe, store: Store) -> Artifact | None:
    """The finished rows; for ratings that are still to come, the rows that they will be given to."""
    while store.manifest(chats) is None:
        stage = recipe.stages[chats]
        if not isinstance(stage, AnnotateStage):
            return None
        chats = stage.inputs.chats
    return store.artifact(chats, "unseen")


def _tokenizer(stage: EvaluateChatStage, recipe: Recipe, store: Store) -> tuple[Path, TemplateName] | None:
    """The folder that the evaluated model has its tokenizer from, and the template that it will carry."""
    template: TemplateName = stage.template
    for name in _ancestors(stage.inputs.model, recipe):
        if store.manifest(name) is not None:
            return store.published(name), template
        made = recipe.stages[name]
        if isinstance(made, Alignment) and template == "model":
            template = made.template
    return None


def _ancestors(model: str, recipe: Recipe) -> list[str]:
    """A model and those that it was made from, the newest first."""
    out: list[str] = []
    while model in recipe.stages and model not in out:
        out.append(model)
        inputs = getattr(recipe.stages[model], "inputs", None)
        model = getattr(inputs, "student", None) or getattr(inputs, "model", None) or ""
    return out
