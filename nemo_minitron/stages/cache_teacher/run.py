"""Cache the teacher's distributions on disk, so that distillation does not have to load the teacher."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from nemo_minitron.errors import ArtifactError
from nemo_minitron.stages.artifacts import Model, TeacherCheck, TokenizedText
from nemo_minitron.stages.cache_teacher.params import CacheTeacherStage
from nemo_minitron.stages.common.one_tokenizer import require_one_tokenizer
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.kind import Result


@dataclass(frozen=True)
class Inputs:
    """Inputs of the stage, by role."""

    teacher: Model
    data: TokenizedText
    check: TeacherCheck | None = None


def cache_teacher(params: CacheTeacherStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Write the teacher's sparse distributions for `num_samples` training samples and for the held-out text.

    After a kill, the stage resumes with the missing shards. It writes shard_NNNNNN.safetensors and cache.json.

    Raises:
        Interrupted: a stop was requested.
        DataError: teacher and data do not share a tokenizer.
        PlanError: the vocabulary is too large for the file format.
        ArtifactError: a shard of another node is missing.
    """
    from nemo_minitron.backends.megatron.distillation.teacher_cache import write_cache
    from nemo_minitron.distillation.cache import shard_name, write_facts

    teacher, data = inputs.teacher, inputs.data
    require_one_tokenizer({"teacher": teacher}, data, ctx)
    facts = write_cache(
        params, teacher.path, data.path, ctx.work_dir, ctx.open_session, ctx.progress, check_stop=ctx.check_stop
    )
    if not ctx.is_main:
        return {}
    num_bytes = 0
    for number in range(facts.num_shards):
        shard = ctx.work_dir / shard_name(number)
        if not shard.is_file():
            raise ArtifactError(
                f"{shard.name} of {facts.num_shards} shards is missing, although a rank has written it.",
                where=str(shard),
                next_step="Run the same command again: it writes missing shards. All nodes must share this folder.",
            )
        num_bytes += shard.stat().st_size
        _link_or_move(shard, ctx.out_dir / shard.name)
    write_facts(ctx.out_dir, facts)
    tokens, heldout = facts.num_samples * facts.seq_len_tokens, facts.num_heldout * facts.seq_len_tokens
    return {
        "num_samples": facts.num_samples,
        "tokens": tokens,
        "bytes_per_token": num_bytes / (tokens + heldout),
        "valid_teacher_loss": facts.valid_teacher_loss,
    }


def _link_or_move(source: Path, target: Path) -> None:
    """Link the file, so that the work folder keeps it if the process dies before publishing; else move it."""
    try:
        os.link(source, target)
    except OSError:
        source.rename(target)
