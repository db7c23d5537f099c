"""Targets that a teacher provides for a student."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from nemo_minitron.backends.megatron.distillation.anchors import Outputs
from nemo_minitron.backends.megatron.distillation.hidden import States
from nemo_minitron.distillation.sparse import SparseTeacher


@dataclass(frozen=True)
class TeacherTargets:
    """The teacher's outputs for one micro-batch that this pipeline stage needs."""

    head_input: Tensor | None = None
    """Input of the teacher's output layer [B, S, D]."""
    states: States = field(default_factory=dict)
    """Hidden states that the loss compares."""
    anchors: Outputs = field(default_factory=dict)
    """Outputs inside the layers that the loss compares."""
    anchor_weight: float = 0.0
    cached: SparseTeacher | None = None
    """The teacher's sparse distributions, from a cache."""
