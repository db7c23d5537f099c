"""The kind of stage that caches the distributions of a teacher on disk."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.training_rules import sample_count_problems
from nemo_minitron.stages.cache_teacher.params import CacheTeacherStage
from nemo_minitron.stages.kind import Output, RecipeView, StageKind, trained_tokens, validation_text
from nemo_minitron.workload.heldout import heldout_batch_size
from nemo_minitron.workload.load import Load, forward_load

SAMPLED_BYTES_PER_TOKEN = 160
"""Bytes on disk per token of a cache of sampled logits, as measured with 50 draws."""


def _problems(name: str, params: CacheTeacherStage, view: RecipeView) -> Iterator[str]:
    yield from sample_count_problems(f"stages.{name}.num_samples", params.num_samples)


def _load(name: str, params: CacheTeacherStage, layout: Parallel, view: RecipeView) -> Load | None:
    shape, tokens = view.shape(params.inputs.teacher), params.num_samples * params.seq_len_tokens
    if shape is None:
        return None
    keys = (params.seq_len_tokens, params.precision, layout)
    return forward_load(shape, tokens, *keys, batch_size=heldout_batch_size(params.seq_len_tokens))


def _disk_bytes(params: CacheTeacherStage, load: Load) -> int:
    if params.sparse.kind != "top_k":
        return load.tokens * SAMPLED_BYTES_PER_TOKEN
    # 32 bits for each of the k entries; 1 byte for their number and 2 for the negative entropy (cache.py).
    return load.tokens * (4 * params.sparse.k + 3)


CACHE_TEACHER = StageKind(
    name="cache_teacher",
    params=CacheTeacherStage,
    run="nemo_minitron.stages.cache_teacher.run:cache_teacher",
    version=2,
    outputs=(Output.TEACHER_CACHE,),
    inputs={"teacher": (Output.MODEL,), "data": (Output.TOKENIZED_TEXT,), "check": (Output.TEACHER_CHECK,)},
    distributed=True,
    whole_sequences=True,
    problems=_problems,
    heldout_uses=validation_text,
    load=_load,
    disk_bytes=_disk_bytes,
    result_tokens=trained_tokens,
)
