"""Repair of a pruned model, shared by the stages that do it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from nemo_minitron.errors import ArtifactError
from nemo_minitron.schema.pruning import Compensation
from nemo_minitron.stages.artifacts import TokenizedText
from nemo_minitron.stages.common.layer_files import LayerFiles
from nemo_minitron.stages.common.repair_rules import MERGED_HEADS_ADVICE, fits_merged_heads
from nemo_minitron.stages.context import StageContext

if TYPE_CHECKING:
    from nemo_minitron.backends.megatron.compensation.repair import Models
    from nemo_minitron.backends.megatron.compensation.streams import Stream
    from nemo_minitron.pruning.compensation import Repair

FACTS_FILE = "compensation.json"


@dataclass(frozen=True)
class RepairTexts:
    """Text that a repair is fitted to, and text on which it is judged."""

    calibration: TokenizedText
    heldout: TokenizedText


def repair_model(
    params: Compensation, teacher: Path, student: Path, plan: Path, texts: RepairTexts, ctx: StageContext, out_dir: Path
) -> dict[str, Any]:
    """Write the repaired student as a Hugging Face checkpoint, and compensation.json with the gain of each layer.

    Every rank calls this; rank 0 writes. After a kill, layers that have been repaired are not solved again.

    Args:
        teacher: folder of the model before pruning.
        student: folder of the pruned model.
        plan: folder of the plan by which it was pruned.
        out_dir: existing folder.

    Returns:
        Facts for the manifest.

    Raises:
        ArtifactError: the plan does not belong to these models, or merges heads, and the repair does not allow that.
        Interrupted: a stop was requested.
        NumericsError: activations are not finite.
    """
    from nemo_minitron.backends.megatron.compensation.repair import LayerRepair, Models, repaired_layers
    from nemo_minitron.hf.checkpoint import Checkpoint
    from nemo_minitron.pruning.plan_file import read_plan

    before, cut = Checkpoint.open(teacher), Checkpoint.open(student)
    models = Models(before, cut, read_plan(plan, before.shape))
    _require_same_cut(models, student)
    _require_own_heads(params, models, plan)
    _warn_of_lost_layers(params, models, ctx)
    saved = LayerFiles(ctx.work_dir / "repaired_layers")
    streams = _streams(params, texts, models, ctx)
    repair = LayerRepair(models, params, ctx.open_session)
    layers, total = repaired_layers(repair, streams, saved), cut.shape.num_layers + repair.repairs_head
    for number, weights, found in ctx.progress.track(layers, "compensate", total, "parts"):
        if found is not None and ctx.is_main:
            saved.save(number, weights, json.dumps({site: _facts(repair) for site, repair in found.items()}))
        ctx.check_stop_of_all_ranks()
    facts = [json.loads(saved.facts(number)) for number in saved] if ctx.is_main else []
    with ctx.open_session.main_works():
        if ctx.is_main:
            _write(models, saved, out_dir)
            (out_dir / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n")
    return {
        "num_tokens": params.num_samples * params.seq_len_tokens,
        "mode": params.mode,
        "heldout_sources": texts.heldout.sources,
        "recovered": _recovered(facts),
    }


def _require_same_cut(models: Models, student: Path) -> None:
    # Only the sizes: a Llama student whose heads do not fill its hidden size is written as a Mistral model.
    left, found = models.plan.target_shape(models.source).sizes(), models.target.sizes()
    if left != found:
        raise ArtifactError(
            f"The plan leaves {left}, but the student is {found}.",
            where=str(student),
            next_step="Use the model that was pruned by this plan.",
        )


def _require_own_heads(params: Compensation, models: Models, plan: Path) -> None:
    """Refuse to fit o_proj to the teacher's heads where the student's are merged ones."""
    if any(models.plan.merged.values()) and not fits_merged_heads(params):
        raise ArtifactError(
            "The plan merges heads, so the inputs of o_proj are not the teacher's.",
            where=str(plan),
            next_step=MERGED_HEADS_ADVICE,
        )


def _warn_of_lost_layers(params: Compensation, models: Models, ctx: StageContext) -> None:
    first = models.plan.layers[0]
    named = "Layer 0 is" if first == 1 else f"Layers 0 to {first - 1} are"
    if first and ctx.is_main and (params.mode, params.target) != ("sequential", "stream"):
        ctx.progress.warn(
            f"{named} dropped, and no kept layer before them can take over their work. "
            "Only mode: sequential with target: stream compensates for them."
        )


def _streams(params: Compensation, texts: RepairTexts, models: Models, ctx: StageContext) -> list[Stream]:
    from nemo_minitron.backends.megatron.compensation.streams import calibration_batches, embedded, heldout_batches
    from nemo_minitron.backends.megatron.model.build import DTYPES

    session, length = ctx.open_session, params.seq_len_tokens
    calibration = calibration_batches(
        texts.calibration.path,
        session,
        num_samples=params.num_samples,
        seq_len_tokens=length,
        seed=params.seed,
        cache_dir=ctx.work_dir / "calibration_index",
    )
    judged = heldout_batches(texts.heldout.path, session, num_tokens=params.heldout_tokens, seq_len_tokens=length)
    student = models.student.embeddings() if params.mode == "sequential" else None
    return embedded([*calibration, *judged], models.teacher.embeddings(), student, DTYPES[params.precision])


def _facts(repair: Repair) -> dict[str, Any]:
    return {
        "sliced_error": repair.sliced_error,
        "error": repair.error,
        "recovered": repair.recovered,
        "damping": repair.damping if repair.update is not None else None,
    }


def _recovered(facts: list[dict[str, Any]]) -> dict[str, float]:
    """Return the mean share of the held-out error that the repair removes, by site."""
    sites = dict.fromkeys(site for layer in facts for site in layer)
    return {site: fmean(layer[site]["recovered"] for layer in facts if site in layer) for site in sites}


def _write(models: Models, saved: LayerFiles, out_dir: Path) -> None:
    """Write the student's checkpoint with the repaired weights in place of the sliced ones, in the same data types."""
    from nemo_minitron.families import parameters, tensor_shape
    from nemo_minitron.hf.checkpoint import copy_side_files
    from nemo_minitron.hf.checkpoint_writer import CheckpointWriter, Planned

    student = models.student
    repaired = saved.names()
    planned = [
        Planned(parameter.hf, tensor_shape(student.shape, parameter.row), student.tensors[parameter.hf].dtype)
        for parameter in parameters(student.shape)
    ]
    writer = CheckpointWriter(out_dir, student.config, planned)
    for item in planned:
        layer = repaired.get(item.name)
        writer.add(item.name, student.read(item.name) if layer is None else saved.read(layer, item.name))
    writer.close()
    copy_side_files(student.path, out_dir)
