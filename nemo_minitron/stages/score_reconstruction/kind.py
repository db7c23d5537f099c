"""The kind of stage that ranks indices by the error that is left after a repair."""

from __future__ import annotations

from nemo_minitron.schema.execution import Parallel
from nemo_minitron.stages.kind import MODELS, Output, RecipeView, Result, StageKind
from nemo_minitron.stages.score_reconstruction.params import ScoreReconstructionStage
from nemo_minitron.workload.load import Load, forward_load


def _load(name: str, params: ScoreReconstructionStage, layout: Parallel, view: RecipeView) -> Load | None:
    shape, tokens = view.shape(params.inputs.model), params.num_samples * params.seq_len_tokens
    return None if shape is None else forward_load(shape, tokens, params.seq_len_tokens, params.precision, layout)


def _result_tokens(result: Result) -> int:
    return int(result["num_samples"]) * int(result["seq_len_tokens"])


SCORE_RECONSTRUCTION = StageKind(
    name="score_reconstruction",
    params=ScoreReconstructionStage,
    run="nemo_minitron.stages.score_reconstruction.run:score_reconstruction",
    outputs=(Output.SCORES,),
    inputs={"model": MODELS, "data": (Output.TOKENIZED_TEXT,)},
    distributed=True,
    whole_layers=True,
    whole_sequences=True,
    report="scores",
    load=_load,
    result_tokens=_result_tokens,
)
