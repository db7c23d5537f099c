"""`make bench`: what our own parts cost, against the plain way, in one process and interleaved. Prints ratios."""

from __future__ import annotations

import json
import platform
import tempfile
from pathlib import Path

import torch
from measuring import interleaved

from nemo_minitron import api
from nemo_minitron.backends.megatron.data.datasets import step_batches
from nemo_minitron.backends.megatron.distillation import distill
from nemo_minitron.backends.megatron.model.forward import model_logits
from nemo_minitron.backends.megatron.model.weights import load_model
from nemo_minitron.backends.megatron.runtime.session import open_session
from nemo_minitron.backends.megatron.training import loop as training
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.stages.distill.params import DistillStage

RECIPE = Path(__file__).resolve().parents[1] / "recipes/smollm2_135m/width.yaml"


def bench_step(root: Path) -> dict[str, float]:
    """A distillation step against the sum of its parts."""
    run = root / "smollm2_135m/width"
    params = DistillStage(
        kind="distill", num_steps=8, global_batch_size=4, seq_len_tokens=256, lr=1e-5, valid_num_tokens=256
    )
    with open_session(Parallel(micro_batch_size=4), device="cpu") as session, tempfile.TemporaryDirectory() as work:
        job = distill.prepare(params, run / "prune", run / "teacher", run / "data", Path(work), session)
        teacher_model, _ = load_model(run / "teacher", session, precision="bf16", seq_len_tokens=256)
        batch = step_batches(job.samples, session, step=0, global_batch_size=4, micro_batch_size=4)[0]

        def teacher() -> None:
            with torch.no_grad():
                model_logits(teacher_model, batch)

        def student() -> None:
            model_logits(job.trainable.ddp, batch).mean().backward()

        found = interleaved({"step": lambda: training.train_step(job, 0), "teacher": teacher, "student": student})
    tokens = params.global_batch_size * params.seq_len_tokens
    parts = found["teacher"] + found["student"]
    return {**found, "step_over_parts": found["step"] / parts, "tokens_per_s": tokens / found["step"]}


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        api.run(api.load_recipe(RECIPE, [f"execution.run_root={root}"]), until="prune")
        results = {
            "machine": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "distill_step_s": bench_step(Path(root)),
        }
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
