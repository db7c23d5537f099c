"""The kind of stage that caches the distributions of a teacher on disk."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.training_rules import sample_count_problems
from nemo_minitron.stages.cache_teacher.params import CacheTeacherStage
from nemo_minitron.stages.kind import HeldoutUse, Output, RecipeView, StageKind
from nemo_minitron.workload.load import Load, forward_load

SPARSE_BYTES_PER_TOKEN = {"sampled": 160, "top_k": 400}
"""Bytes on disk per token: `sampled` as measured with 50 draws; `top_k` for 128 compressed 16-bit values and their
indices."""


def _problems(name: str, params: CacheTeacherStage, view: RecipeView) -> Iterator[str]:
    yield from sample_count_problems(f"stages.{name}.num_samples", params.num_samples)


def _heldout_uses(params: CacheTeacherStage) -> Iterator[HeldoutUse]:
    yield HeldoutUse(params.inputs.data, params.valid_num_tokens, "valid_num_tokens")


def _load(name: str, params: CacheTeacherStage, layout: Parallel, view: RecipeView) -> Load | None:
    shape, tokens = view.shape(params.inputs.teacher), params.num_samples * params.seq_len_tokens
    return None if shape is None else forward_load(shape, tokens, params.seq_len_tokens, params.precision, layout)


def _disk_bytes(params: CacheTeacherStage, load: Load) -> int:
    return load.tokens * SPARSE_BYTES_PER_TOKEN.get(params.sparse.kind, SPARSE_BYTES_PER_TOKEN["top_k"])


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
    heldout_uses=_heldout_uses,
    load=_load,
    disk_bytes=_disk_bytes,
)
