"""The steps from the teacher to an exported model in words, for its model card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_minitron.families.axes import FFN
from nemo_minitron.families.shape import SIZE_AXES
from nemo_minitron.report.lineage import MODEL_ROLES, Lineage, Record
from nemo_minitron.report.text import code, millions, plain
from nemo_minitron.stages.registry import STAGES

PRUNED, DISTILLED = "Pruned", "Distilled"
_SIZES = {axis.target_key: "MLP size" if axis is FFN else axis.title for axis in SIZE_AXES}


@dataclass(frozen=True)
class Step:
    """One step from the teacher to the model."""

    title: str
    text: str
    """Markdown that follows the title."""
    summary: str
    """The step in the summary of the card, such as `pruned`."""
    trains: bool = False


def steps_of(lineage: Lineage, teacher: Mapping[str, Any], facts: Mapping[str, Any]) -> list[Step]:
    """Return the steps from the teacher to the exported model.

    Args:
        teacher: result of the teacher's stage.
        facts: facts of the exported model.
    """
    out: list[Step] = []
    shape = teacher.get("shape")
    for record in lineage.line:
        is_start = not any(role in record.inputs for role in MODEL_ROLES)
        if is_start:
            out.append(Step("Start", f" {code(record.stage)} ({code(record.kind)}), not the teacher.", "made"))
        elif (cut := _cut(shape, record.result)) is not None:
            out.append(cut)
        shape = record.result.get("shape", shape)
        out += [] if is_start else _own_steps(record, lineage)
    cut = _cut(shape, facts)
    return out if cut is None else [*out, cut]


def _cut(before: Mapping[str, Any] | None, result: Mapping[str, Any]) -> Step | None:
    """Return the step to the sizes of a result; None if it has the sizes from before."""
    if before is None or "shape" not in result:
        return None
    cuts = [f"{name} {old} → {new}" for name, old, new in size_rows(before, result["shape"]) if old != new]
    left = f", {millions(result['num_params'])} parameters left" if "num_params" in result else ""
    return Step(PRUNED, f": {', '.join(cuts)}{left}.", "pruned") if cuts else None


def size_rows(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (name, size before, size after) of each axis."""
    return [(name, str(before.get(key, "")), str(after[key])) for key, name in _SIZES.items() if key in after]


def _own_steps(record: Record, lineage: Lineage) -> Iterator[Step]:
    """Yield what a stage does besides pruning."""
    kind = STAGES.get(record.kind)
    if kind is None:
        yield Step("Changed", f" by {code(record.kind)}.", f"changed by {code(record.kind)}")
    elif kind.report == "distillation":
        text = f": {_training(record.result)}{_teacher(record, lineage)}"
        yield Step(DISTILLED, text, "distilled from its teacher", trains=True)
    elif kind.report == "compensation":
        yield Step("Repaired", f" by least squares on {record.result['num_tokens']:,} tokens.", "repaired")
    elif kind.trains:
        text = f" by {code(record.kind)}: {_training(record.result)}{_teacher(record, lineage)}"
        yield Step("Trained", text, f"trained by {code(record.kind)}", trains=True)


def _teacher(record: Record, lineage: Lineage) -> str:
    """Describe the trainings of the teacher before a distillation from it."""
    trained = [one for one in lineage.teacher_line(record) if one.kind in STAGES and STAGES[one.kind].trains]
    parts = [f" Its teacher had been trained by {code(one.kind)}: {_training(one.result)}" for one in trained]
    return "".join(parts)


def _training(result: Mapping[str, Any]) -> str:
    """Describe a training by its loss, its amount of text and its result on held-out text, as far as they are known."""
    steps = f" in {result['num_steps']:,} steps" if "num_steps" in result else ""
    if "tokens" in result:
        loss = plain(str(result.get("loss", "next-token cross entropy")))
        return f"{loss}; {result['tokens']:,} tokens{steps}.{_heldout_losses(result)}"
    rows = result.get("lengths", {}).get("train", {}).get("rows")
    text = f"{rows:,} rows{steps}." if rows else f"{steps.removeprefix(' in ') or 'its result is not known'}."
    if "start" in result:
        before, after = (result[place]["reward"] for place in ("start", "end"))
        return f"{text} Mean reward of answers to held-out prompts {before:.3f} → {after:.3f}."
    before, after = (result.get(key) for key in ("first_valid_loss", "valid_loss"))
    return text if before is None or after is None else f"{text} Held-out loss {before:.3f} → {after:.3f}."


def _heldout_losses(result: Mapping[str, Any]) -> str:
    before, after, teacher = (
        result.get(key) for key in ("initial_valid_loss", "final_valid_loss", "final_valid_teacher_loss")
    )
    if before is None or after is None:
        return ""
    of_teacher = "" if teacher is None else f"; the teacher's is {teacher:.3f}"
    return f" Held-out loss {before:.3f} → {after:.3f} nats per token{of_teacher}."
