"""What a student is told by its teacher."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from nemo_minitron.backends.megatron.distillation.hidden import States
from nemo_minitron.distillation.sparse import SparseTeacher


@dataclass(frozen=True)
class Lesson:
    """What the teacher says of one micro-batch, as far as this pipeline stage needs it."""

    head_input: Tensor | None = None
    """The input of its output layer [B, S, D]."""
    states: States = field(default_factory=dict)
    written: SparseTeacher | None = None
    """Its distributions, from the cache."""
