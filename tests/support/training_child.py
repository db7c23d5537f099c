"""A training loop in a separate process, which tests signal and kill. Importable, so that it can be spawned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_minitron.schema.execution import Execution, Parallel
from nemo_minitron.stages.distill.params import DistillStage
from nemo_minitron.system.progress import Progress

SILENT = Progress(silent=True)


def distill_to_the_end(
    params: DistillStage, folders: dict[str, Path], work: Path, execution: dict[str, Any] | None = None
) -> list[dict[str, float]]:
    """Distill in one process and publish; returns the rows of the curves."""
    from nemo_minitron.backends.megatron.distillation import distill
    from nemo_minitron.backends.megatron.runtime.session import open_session
    from nemo_minitron.backends.megatron.training import loop as training

    options = training.LoopOptions(Execution(**(execution or {})), "tests/child")
    micro = min(4, params.global_batch_size)
    with open_session(Parallel(micro_batch_size=micro), device="cpu", threads=1) as session:
        job = distill.prepare(params, folders["student"], folders["teacher"], folders["data"], work, session)
        curves = training.run(job, work, SILENT, options)
        (work / "published").mkdir()
        training.publish(job, folders["student"], work, work / "published")
    return curves.rows
