"""The kind of stage that ranks indices by the error that is left after a repair."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_minitron.families import ModelShape
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.stages.common.repair_rules import calibration_problems
from nemo_minitron.stages.kind import MODELS, Output, RecipeView, Result, StageKind, calibration_text
from nemo_minitron.stages.score_reconstruction.params import ScoreReconstructionStage
from nemo_minitron.workload.layer_by_layer import ranking_load, written_bytes
from nemo_minitron.workload.load import Load


def _problems(name: str, params: ScoreReconstructionStage, view: RecipeView) -> Iterator[str]:
    key, shape = f"stages.{name}", view.shape(params.inputs.model)
    if shape is None:
        return
    yield from calibration_problems(key, params.num_samples * params.seq_len_tokens, _widest(params, shape))
    for size, wanted in params.swap_to:
        if wanted is not None and wanted > shape.sizes()[size]:
            yield f"{key}.swap_to.{size} = {wanted}: above {shape.sizes()[size]}, the size of {params.inputs.model}."
    if shape.heads_per_group > 1 and (heads := params.swap_to.num_attention_heads) is not None:
        groups = params.swap_to.num_query_groups or shape.num_query_groups
        if heads % groups:
            yield f"{key}.swap_to.num_attention_heads = {heads}: not a multiple of the {groups} query groups."


def _widest(params: ScoreReconstructionStage, shape: ModelShape) -> int:
    """Return the most inputs that are ranked in one layer."""
    inputs = {
        "hidden": shape.hidden_size,
        "ffn": shape.ffn_hidden_size,
        "heads": shape.num_attention_heads * shape.kv_channels,
    }
    return max((inputs[axis] for axis in params.width_axes), default=0)


def _load(name: str, params: ScoreReconstructionStage, layout: Parallel, view: RecipeView) -> Load | None:
    shape = view.shape(params.inputs.model)
    return None if shape is None else ranking_load(shape, params, layout)


def _result_tokens(result: Result) -> int:
    return int(result["num_samples"]) * int(result["seq_len_tokens"])


SCORE_RECONSTRUCTION = StageKind(
    name="score_reconstruction",
    params=ScoreReconstructionStage,
    run="nemo_minitron.stages.score_reconstruction.run:score_reconstruction",
    version=3,
    outputs=(Output.SCORES,),
    inputs={"model": MODELS, "data": (Output.TOKENIZED_TEXT,)},
    distributed=True,
    whole_layers=True,
    whole_sequences=True,
    problems=_problems,
    text_use=calibration_text,
    load=_load,
    disk_bytes=written_bytes,
    result_tokens=_result_tokens,
)
