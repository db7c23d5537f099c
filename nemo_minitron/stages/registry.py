"""All kinds of stage: those of this package, and those that other installed packages add by an entry point."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points

from nemo_minitron.errors import EnvironmentProblem
from nemo_minitron.stages.kind import Output, StageKind, load_function

ENTRY_POINTS = "nemo_minitron.stages"
"""Entry-point group of other packages; each entry point names a StageKind."""
KINDS = (
    "import_model.kind:IMPORT",
    "adopt.kind:ADOPT",
    "init.kind:INIT",
    "tokenize.kind:TOKENIZE",
    "check_teacher.kind:CHECK_TEACHER",
    "train.kind:TRAIN",
    "train.kind:CORRECT",
    "score.kind:SCORE",
    "score_reconstruction.kind:SCORE_RECONSTRUCTION",
    "search.kind:CANDIDATE",
    "search.kind:SEARCH",
    "select.kind:SELECT",
    "prune.kind:PRUNE",
    "compensate.kind:COMPENSATE",
    "cache_teacher.kind:CACHE_TEACHER",
    "distill_layers.kind:DISTILL_LAYERS",
    "distill.kind:DISTILL",
    "chat_data.kind:CHAT_DATA",
    "distill_offline.kind:DISTILL_OFFLINE",
    "align.kind:SFT",
    "align.kind:TRAIN_ATTRIBUTE_MODEL",
    "annotate.kind:ANNOTATE",
    "align.kind:STEERLM_SFT",
    "steerlm2_answers.kind:STEERLM2_ANSWERS",
    "align.kind:STEERLM2",
    "align.kind:DPO",
    "rollouts.kind:REINFORCE",
    "rollouts.kind:PPO",
    "evaluate.kind:EVALUATE",
    "evaluate_chat.kind:EVALUATE_CHAT",
    "speed.kind:SPEED",
    "export.kind:EXPORT",
    "report.kind:REPORT",
)
"""The kinds of this package, in the order in which a run uses them."""


def _registered() -> dict[str, StageKind]:
    found = {kind.name: kind for kind in (load_function(f"nemo_minitron.stages.{entry}") for entry in KINDS)}
    for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name):
        kind = _loaded(entry)
        if kind.name in found:
            raise _wrong(entry, f"adds the kind of stage `{kind.name}`, which already exists", found)
        found[kind.name] = kind
    return found


def _loaded(entry: EntryPoint) -> StageKind:
    try:
        kind = entry.load()
    except Exception as error:
        raise _wrong(entry, f"cannot be imported: {type(error).__name__}: {error}", ()) from error
    if not isinstance(kind, StageKind):
        raise _wrong(entry, f"provides a {type(kind).__name__}, not a StageKind", ())
    return kind


def _wrong(entry: EntryPoint, what: str, known: Iterable[str]) -> EnvironmentProblem:
    package = entry.dist.name if entry.dist is not None else "An installed package"
    return EnvironmentProblem(
        f"{package} {what}.",
        where=f"entry point {entry.name} = {entry.value} of the group {ENTRY_POINTS}",
        allowed=f"a name other than {', '.join(known)}" if known else None,
        next_step="Fix or uninstall that package.",
    )


STAGES: dict[str, StageKind] = _registered()
"""Kind name -> kind."""


def kinds_with(output: Output) -> tuple[str, ...]:
    """Names of the kinds that publish this output."""
    return tuple(kind.name for kind in STAGES.values() if output in kind.outputs)
