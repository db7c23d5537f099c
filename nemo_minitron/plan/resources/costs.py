"""What each stage of a plan takes: memory of a process, tokens, operations, hours, money, disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from nemo_minitron.config.schema import (
    AttributeModelStage,
    CacheTeacherStage,
    CandidateStage,
    CheckTeacherStage,
    DistillOfflineStage,
    DistillStage,
    DpoStage,
    EvaluateStage,
    Optimization,
    Parallel,
    Recipe,
    ScoreStage,
    SftStage,
    SteerlmSftStage,
    Training,
    TrainStage,
)
from nemo_minitron.data.blocks import COMPRESSIONS
from nemo_minitron.distillation.flops import forward_flops_per_token, training_flops_per_token
from nemo_minitron.families import ModelShape, num_params
from nemo_minitron.plan.planner import RunPlan, StageCall
from nemo_minitron.plan.resources.hardware import hardware_of, peak_tflops
from nemo_minitron.plan.resources.memory import GIB, WEIGHT_BYTES, Memory, Work, memory_of, optimizer_bytes
from nemo_minitron.plan.shapes import model_shape

SPARSE_BYTES_PER_TOKEN = {"sampled": 160, "top_k": 400}
"""Of a cached teacher, on disk: measured with 50 draws (docs/DISTILLATION.md); 128 values of 16 bits and their indices,
compressed."""
TOKENIZED_BYTES, UNPACKED_BYTES = 2, 4
"""Of shards and result together for a byte of text, at four characters and up to four bytes a token; of text for a byte
of a compressed file."""
FORWARD_MFU_SHARE = 0.8
"""A pass without its backward pass reaches less of the peak: its batches are smaller."""


@dataclass(frozen=True)
class Estimate:
    """Of one stage."""

    memory: Memory
    tokens: int
    flops: float
    seconds: float
    gpu_hours: float
    cost: float | None
    disk_bytes: int
    limit_gib: float | None
    """Of a process; None: not known."""

    @property
    def tokens_per_s(self) -> float | None:
        return self.tokens / self.seconds if self.seconds else None

    @property
    def fits(self) -> bool:
        return self.limit_gib is None or self.memory.peak / GIB <= self.limit_gib

    def facts(self) -> dict[str, Any]:
        return {
            "memory": self.memory.facts(),
            "limit_gib": self.limit_gib,
            "fits": self.fits,
            "tokens": self.tokens,
            "flops": self.flops,
            "tokens_per_s": self.tokens_per_s,
            "hours": self.seconds / 3600,
            "gpu_hours": self.gpu_hours,
            "cost": self.cost,
            "disk_gib": self.disk_bytes / GIB,
        }


@dataclass(frozen=True)
class Load:
    """What a stage asks of its processes."""

    work: Work
    tokens: int
    flops_per_token: float


def estimates(plan: RunPlan) -> dict[str, Estimate]:
    """stage -> estimate, for the stages that compute with models of known sizes."""
    found: dict[str, Estimate] = {}
    for call in plan.calls:
        load = load_of(call, plan.recipe)
        if load is not None:
            found[call.name] = _estimate(load, call.parallel, plan.recipe, _disk(call, load, plan.recipe))
    return found


def tokenized_bytes(plan: RunPlan) -> int:
    """Disk that tokenization takes while it joins its shards, where the text is there."""
    stages = [call for call in plan.calls if call.kind == "tokenize"]
    return sum(
        TOKENIZED_BYTES * facts["bytes"] * (UNPACKED_BYTES if source.endswith(COMPRESSIONS) else 1)
        for call in stages
        for source, facts in call.payload["sources"].items()
    )


def totals(found: Mapping[str, Estimate], more_disk_bytes: int = 0) -> dict[str, Any]:
    """Of the whole run, one stage after the other; the disk also holds the imported teacher."""
    costs = [estimate.cost for estimate in found.values() if estimate.cost is not None]
    return {
        "hours": sum(estimate.seconds for estimate in found.values()) / 3600,
        "gpu_hours": sum(estimate.gpu_hours for estimate in found.values()),
        "cost": sum(costs) if costs else None,
        "disk_gib": (more_disk_bytes + sum(estimate.disk_bytes for estimate in found.values())) / GIB,
    }


def limit_gib(recipe: Recipe) -> float | None:
    """What a process may use: the GPU less a reserve."""
    memory = hardware_of(recipe).memory_gib
    return None if memory is None else memory - recipe.execution.planning.reserve_gib


def _estimate(load: Load, layout: Parallel, recipe: Recipe, disk_bytes: int) -> Estimate:
    hardware, planning = hardware_of(recipe), recipe.execution.planning
    mfu = (planning.mfu or hardware.usual_mfu) * (1.0 if load.work.trains else FORWARD_MFU_SHARE)
    flops = load.tokens * load.flops_per_token
    seconds = flops / (layout.world_size * peak_tflops(recipe) * 1e12 * mfu)
    gpu_hours = 0.0 if hardware.name == "CPU" else seconds / 3600 * layout.world_size
    price = planning.price_per_gpu_hour
    return Estimate(
        memory=memory_of(load.work),
        tokens=load.tokens,
        flops=flops,
        seconds=seconds,
        gpu_hours=gpu_hours,
        cost=None if price is None else price * gpu_hours,
        disk_bytes=disk_bytes,
        limit_gib=limit_gib(recipe),
    )


def load_of(call: StageCall, recipe: Recipe, layout: Parallel | None = None) -> Load | None:
    """The work of a stage in a layout (its own unless given); None where sizes are unknown or it computes nothing."""
    stage, layout = recipe.stages[call.name], layout or call.parallel
    if isinstance(stage, DistillStage | CandidateStage):
        return _distillation(stage, layout, recipe)
    if isinstance(stage, TrainStage):
        shape = model_shape(recipe, stage.inputs.model)
        return None if shape is None else _training(shape, None, stage, stage.num_steps, layout)
    if isinstance(stage, SftStage | SteerlmSftStage | DpoStage | AttributeModelStage | DistillOfflineStage):
        return _alignment(stage, layout, recipe)
    return _asking(stage, layout, recipe)


def _distillation(stage: DistillStage | CandidateStage, layout: Parallel, recipe: Recipe) -> Load | None:
    cached = learns = False
    if isinstance(stage, DistillStage):
        student, keys = model_shape(recipe, stage.inputs.student), cast(Training, stage)
        cached, learns = stage.inputs.cache is not None, stage.teacher_correction is not None
    else:
        name = next((name for name, other in recipe.stages.items() if other is stage), "")
        student, keys = model_shape(recipe, name), stage.retraining
    teacher = model_shape(recipe, stage.inputs.teacher)
    if student is None or (teacher is None and not cached):
        return None
    needed = teacher if keys.loss.needs_teacher and not cached else None
    hidden = keys.loss.hidden
    pairs = 0 if hidden is None else student.num_layers
    return _training(student, needed, keys, stage.num_steps, layout, learns=learns, hidden_pairs=pairs)


def _training(
    shape: ModelShape,
    teacher: ModelShape | None,
    keys: Optimization,
    num_steps: int,
    layout: Parallel,
    *,
    learns: bool = False,
    hidden_pairs: int = 0,
) -> Load:
    micro_batches = max(1, keys.global_batch_size // (layout.dp * layout.micro_batch_size))
    work = Work(
        shape,
        layout,
        keys.precision,
        keys.seq_len_tokens,
        num_micro_batches=micro_batches,
        teacher=teacher,
        teacher_learns=learns,
        hidden_pairs=hidden_pairs,
    )
    each = training_flops_per_token(shape, teacher, keys.seq_len_tokens, teacher_learns=learns)
    if layout.recompute == "full":
        each += forward_flops_per_token(shape, keys.seq_len_tokens)
    return Load(work, num_steps * keys.global_batch_size * keys.seq_len_tokens, each)


def _alignment(
    stage: SftStage | SteerlmSftStage | DpoStage | AttributeModelStage | DistillOfflineStage,
    layout: Parallel,
    recipe: Recipe,
) -> Load | None:
    """By NeMo-Aligner, in bf16; DPO's reference keeps its weights beside, and is asked about both answers.

    Rows are counted at their greatest length, so tokens and hours are upper bounds; the pass of an offline
    distillation's teacher before the training is left out.
    """
    shape = model_shape(recipe, stage.inputs.model)
    if shape is None or stage.num_steps is None:
        return None
    pairs = isinstance(stage, DpoStage)
    answers = 2 if pairs else 1
    layout = layout.model_copy(update={"micro_batch_size": layout.micro_batch_size * answers})
    work = Work(shape, layout, "bf16", stage.max_seq_len_tokens, teacher=shape if pairs else None)
    tokens = stage.num_steps * stage.global_batch_size * answers * stage.max_seq_len_tokens
    return Load(work, tokens, training_flops_per_token(shape, shape if pairs else None, stage.max_seq_len_tokens))


def _asking(stage: Any, layout: Parallel, recipe: Recipe) -> Load | None:
    """A pass over text without learning."""
    if isinstance(stage, ScoreStage):
        model, tokens = stage.inputs.model, stage.num_samples * stage.seq_len_tokens
    elif isinstance(stage, CacheTeacherStage):
        model, tokens = stage.inputs.teacher, stage.num_samples * stage.seq_len_tokens
    elif isinstance(stage, EvaluateStage):
        model, tokens = stage.inputs.model, stage.num_tokens
    elif isinstance(stage, CheckTeacherStage):
        model, tokens = stage.inputs.teacher, stage.num_tokens
    else:
        return None
    shape = model_shape(recipe, model)
    if shape is None:
        return None
    precision = getattr(stage, "precision", "bf16")
    work = Work(shape, layout, precision, stage.seq_len_tokens, trains=False)
    return Load(work, tokens, forward_flops_per_token(shape, stage.seq_len_tokens))


def _disk(call: StageCall, load: Load, recipe: Recipe) -> int:
    """What a stage leaves, and its training checkpoints while it runs."""
    stage = recipe.stages[call.name]
    count = num_params(load.work.shape)
    if isinstance(stage, CacheTeacherStage):
        return load.tokens * SPARSE_BYTES_PER_TOKEN.get(stage.sparse.kind, SPARSE_BYTES_PER_TOKEN["top_k"])
    if not load.work.trains:
        return 0
    precision = load.work.precision
    weights = WEIGHT_BYTES[precision] * count
    checkpoint = weights + optimizer_bytes(count, precision, Parallel())
    kept = stage.keep_checkpoints + 1 if isinstance(stage, Optimization) else 2
    return weights + kept * checkpoint
