"""Load of stages that run a model one layer at a time: repair by least squares, and ranking for it. No torch.

Sums over tokens and what is solved from them are fp64 (`pruning/compensation.py`, `pruning/reconstruction.py`). The
operations are those of the passes and sums; solving is not counted.

Symbols: O outputs, K inputs of the student, M residuals of a site. A site that reads the residual stream has its
residuals in front of the teacher's weight, so M is the teacher's hidden size; otherwise M = O.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from nemo_minitron.distillation.flops import forward_flops_per_token, head_flops_per_token
from nemo_minitron.families import ModelShape, num_params
from nemo_minitron.families.split import params_of_rank
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.pruning import Compensation, ReconstructionScoring, RepairSite
from nemo_minitron.workload.load import Load
from nemo_minitron.workload.memory import WEIGHT_BYTES
from nemo_minitron.workload.work import OneLayer, Work

FP64, FP32, STORED = 8, 4, 2
"""Bytes of a number in sums, in weights that are solved for, and in checkpoints (bf16)."""
TEXTS = 2
"""A repair has sums of the calibration text and of the held-out text."""


@dataclass(frozen=True)
class _Site:
    outputs: int
    residuals: int
    inputs: int
    reads_stream: bool
    teacher_inputs: int

    @property
    def sums(self) -> int:
        """Numbers in the sums of one text; without a matrix to apply, only the squares of residuals are kept."""
        squares = self.residuals**2 if self.reads_stream else self.residuals
        return self.inputs**2 + self.residuals * self.inputs + squares

    @property
    def weights(self) -> int:
        """Numbers in the teacher's rows that stay, and in the student's weight."""
        return self.outputs * (self.teacher_inputs + self.inputs)

    @property
    def update(self) -> int:
        """Numbers in the correction of the weight."""
        return self.outputs * self.inputs

    @property
    def solving(self) -> int:
        """Numbers in the temporary matrices of a solution, at its peak.

        Those are the objectives of both texts, before and after the change to the student's own weight; the update and
        its products; and the damped moments with their Cholesky factor.
        """
        mapped = 3 * self.outputs * self.residuals + 2 * self.update if self.reads_stream else 0
        return max(mapped, 7 * self.update) + 2 * self.inputs**2


def repair_load(
    teacher: ModelShape, student: ModelShape, keys: Compensation, repaired: Collection[RepairSite], layout: Parallel
) -> Load:
    """Return the load of a repair.

    Args:
        repaired: sites that it changes.
    """
    every = _sites(teacher, student)
    names = [name for name in every if name in repaired and name != "head"]
    chosen = [every[name] for name in names]
    head = [every["head"]] if "head" in repaired else []
    sequential = keys.mode == "sequential"
    # A one-shot repair sums over all sites of a layer in one pass. The head follows after the last layer.
    groups = [[site] for site in (*chosen, *head)] if sequential else [chosen, head]
    width = 2 * teacher.hidden_size + (student.hidden_size if sequential else 0)
    tokens = keys.num_samples * keys.seq_len_tokens + keys.heldout_tokens
    layer_weights = sum(site.update for name, site in every.items() if name != "head")
    written = student.num_layers * layer_weights + sum(site.update for site in head)
    # A layer's corrections stay until its file is written.
    updates = FP64 * sum(site.update for site in chosen)
    held = OneLayer(
        weights=WEIGHT_BYTES[keys.precision] * (_layer_params(teacher) + _layer_params(student)),
        sums=max((_group_bytes(group) for group in groups if group), default=0) + updates,
        streams=_stream_bytes(tokens, width, keys.precision, layout),
        disk=STORED * num_params(student),
    )
    passes = _layer_flops(teacher, keys.seq_len_tokens)
    if sequential:
        # Each site needs a pass, of which only the last one of the teacher runs all of the layer; then the student's
        # streams advance.
        passes += sum(_flops_up_to(name, teacher, keys.seq_len_tokens) for name in names[:-1])
        passes += sum(_flops_up_to(name, student, keys.seq_len_tokens) for name in names)
        passes += _layer_flops(student, keys.seq_len_tokens)
    sums = student.num_layers * sum(site.sums for site in chosen) + sum(site.sums for site in head)
    # The files of finished layers, from which it resumes.
    work = _work(teacher, keys, layout, held)
    return Load(work, tokens, passes + 2.0 * sums, work_bytes=STORED * written)


def ranking_load(shape: ModelShape, keys: ReconstructionScoring, layout: Parallel) -> Load:
    """Return the load of ranking by the error after a repair. Rank 0 ranks on the CPU."""
    sizes = {
        "hidden": [shape.hidden_size] * 2,
        "ffn": [shape.ffn_hidden_size],
        "heads": [shape.num_attention_heads * shape.kv_channels],
    }
    inputs = [size for axis in keys.width_axes for size in sizes[axis]]
    # Moments and Gram matrices of weights, of the two sites of each layer that read hidden channels.
    kept = FP64 * 2 * 2 * shape.num_layers * shape.hidden_size**2 if "hidden" in keys.width_axes else 0
    tokens = keys.num_samples * keys.seq_len_tokens
    matrices = sum(size**2 for size in inputs)
    largest = max((size for size in inputs), default=0)
    held = OneLayer(
        weights=WEIGHT_BYTES[keys.precision] * _layer_params(shape),
        sums=FP64 * matrices,
        streams=_stream_bytes(tokens, shape.hidden_size, keys.precision, layout),
        # The Gram matrices of a layer's weights; and the state, scaled inputs and products of a search for one axis.
        ranking=FP64 * (matrices + 8 * largest**2) + kept,
    )
    flops = _layer_flops(shape, keys.seq_len_tokens) + 2.0 * shape.num_layers * matrices
    return Load(_work(shape, keys, layout, held), tokens, flops, work_bytes=kept)


def written_bytes(_: object, load: Load) -> int | None:
    """Return the size of the output of such a stage; `disk_bytes` of its kind."""
    return None if load.work.one_layer is None else load.work.one_layer.disk


def _sites(teacher: ModelShape, student: ModelShape) -> dict[RepairSite, _Site]:
    wide, hidden, ffn = teacher.hidden_size, student.hidden_size, student.ffn_hidden_size
    heads, groups = (count * student.kv_channels for count in (student.num_attention_heads, student.num_query_groups))
    return {
        "attention_input": _Site(heads + 2 * groups, wide, hidden, True, wide),
        "attention_output": _Site(hidden, hidden, heads, False, teacher.num_attention_heads * teacher.kv_channels),
        "mlp_input": _Site(ffn * (2 if student.gated else 1), wide, hidden, True, wide),
        "mlp_output": _Site(hidden, hidden, ffn, False, teacher.ffn_hidden_size),
        "head": _Site(student.vocab_size, wide, hidden, True, wide),
    }


def _group_bytes(group: list[_Site]) -> int:
    """Return the bytes of sites whose sums are in memory together, and of the largest solution."""
    sums = TEXTS * sum(site.sums for site in group) + max(site.solving for site in group)
    return FP64 * sums + FP32 * sum(site.weights for site in group)


def _stream_bytes(tokens: int, width: int, precision: str, layout: Parallel) -> int:
    return WEIGHT_BYTES[precision] * width * -(-tokens // layout.world_size)


def _layer_params(shape: ModelShape) -> int:
    return params_of_rank(shape.resized(num_layers=1), tp=1, pp=1, stage=0, layers_only=True)


def _layer_flops(shape: ModelShape, seq_len_tokens: int) -> float:
    return forward_flops_per_token(shape, seq_len_tokens) - head_flops_per_token(shape)


def _flops_up_to(site: RepairSite, shape: ModelShape, seq_len_tokens: int) -> float:
    """Return the operations for a token, in all layers, up to what a site is fitted to (`compensation/runner.py`)."""
    if site == "attention_input":
        return 0.0
    whole = _layer_flops(shape, seq_len_tokens)
    if site == "mlp_output":
        return whole
    matrices = 3 if shape.gated else 2
    return whole - 2.0 * shape.num_layers * matrices * shape.hidden_size * shape.ffn_hidden_size


def _work(shape: ModelShape, keys: Compensation | ReconstructionScoring, layout: Parallel, held: OneLayer) -> Work:
    return Work(shape, layout, keys.precision, keys.seq_len_tokens, trains=False, one_layer=held)
