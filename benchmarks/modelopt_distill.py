"""A distillation step through NVIDIA ModelOpt's Megatron plugin against ours: time in turns, memory in own processes.

Needs nvidia-modelopt beside this package (`pip install nvidia-modelopt==0.43.0` in an environment of its own). Both
sides take the same models, batch and optimizer; ModelOpt's teacher, student and loss are converted and run by its code.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from distill import SHAPE, STEP, STUDENT, TEACHER, random_model
from measuring import interleaved, memory_gib

from nemo_minitron.backends.megatron.data.datasets import step_batches
from nemo_minitron.backends.megatron.distillation import distill
from nemo_minitron.backends.megatron.model.weights import load_model
from nemo_minitron.backends.megatron.runtime.session import Session, open_session
from nemo_minitron.backends.megatron.training import loop as training
from nemo_minitron.backends.megatron.training.optim import Trainable, make_trainable
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.stages.distill.params import DistillStage
from tests.support.tiny_data import tiny_data_dir

MICRO_BATCH_SIZE = 8
PARAMS = DistillStage.model_validate({"kind": "distill", "lr": 1e-5, **STEP})


def ours(folder: Path, session: Session) -> tuple[Callable[[], float], Any]:
    """One step of the package's loop."""
    work = folder / "work"
    job = distill.prepare(PARAMS, folder / "student", folder / "teacher", folder / "data", work, session)
    return lambda: training.train_step(job, 0)[0]["train_loss"], job


def modelopt(folder: Path, session: Session) -> tuple[Callable[[], float], Any]:
    """One step with ModelOpt's distillation model and loss, our optimizer."""
    import modelopt.torch.distill as mtd
    from modelopt.torch.distill.plugins import megatron as plugin

    options: dict[str, Any] = {"precision": "bf16", "seq_len_tokens": PARAMS.seq_len_tokens}
    student, _ = load_model(folder / "student", session, **options)
    teacher, _ = load_model(folder / "teacher", session, **options)
    config = plugin.setup_distillation_config(None, student.config, teacher.config)
    keys = {"teacher_model": teacher, "criterion": config.criterion, "loss_balancer": config.loss_balancer}
    model = mtd.convert(student, mode=[("kd_loss", keys)])
    plugin.adjust_distillation_model_for_mcore(model, config)
    trainable = make_trainable(model, PARAMS, 1, session.parallel)
    job = distill.prepare(PARAMS, folder / "student", folder / "teacher", folder / "data", folder / "batch", session)
    batch = step_batches(
        job.samples, session, step=0, global_batch_size=MICRO_BATCH_SIZE, micro_batch_size=MICRO_BATCH_SIZE
    )[0]
    del job
    return lambda: _modelopt_step(trainable, batch), trainable


def _modelopt_step(trainable: Trainable, batch: dict[str, torch.Tensor]) -> float:
    trainable.ddp.zero_grad_buffer()
    trainable.optimizer.zero_grad()
    positions = torch.arange(batch["tokens"].shape[1]).expand_as(batch["tokens"])
    per_token = trainable.ddp(batch["tokens"], positions, None, labels=batch["labels"])
    found = trainable.ddp.module.compute_kd_loss(student_loss=per_token.mean(), loss_reduction_fn=_mean)
    loss = found["kd_loss"]
    loss.backward()
    trainable.schedule.step(1)
    trainable.optimizer.step()
    return float(loss.detach())


def _mean(loss: Any) -> torch.Tensor:
    """ModelOpt hands over (loss [B, S], flags for the ranks)."""
    return (loss[0] if isinstance(loss, tuple) else loss).mean()


SIDES = {"ours": ours, "modelopt": modelopt}


def peak_gib(name: str, folder: Path) -> float:
    """Above what the process has before the models are loaded."""
    with open_session(Parallel(micro_batch_size=MICRO_BATCH_SIZE), device="cpu") as session:
        before = memory_gib("VmRSS")
        step, _ = SIDES[name](folder, session)
        step()
        step()
        return memory_gib("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peak", nargs=2, metavar=("SIDE", "FOLDER"))
    arguments = parser.parse_args()
    if arguments.peak:
        print(peak_gib(arguments.peak[0], Path(arguments.peak[1])))
        return
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        random_model(TEACHER, folder / "teacher")
        random_model(STUDENT, folder / "student")
        tiny_data_dir(folder / "data", vocab_size=SHAPE["vocab_size"], num_documents=200)
        peaks = {}
        for name in SIDES:
            command = [sys.executable, __file__, "--peak", name, root]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            peaks[name] = float(out.split()[-1])
        with open_session(Parallel(micro_batch_size=MICRO_BATCH_SIZE), device="cpu") as session:
            steps = {name: side(folder, session)[0] for name, side in SIDES.items()}
            losses = {name: step() for name, step in steps.items()}
            times = interleaved({**steps})
    ratios = {"time": times["ours"] / times["modelopt"], "memory": peaks["ours"] / peaks["modelopt"]}
    print(
        json.dumps({"first_loss": losses, "step_s": times, "peak_gib": peaks, "ours_over_modelopt": ratios}, indent=2)
    )


if __name__ == "__main__":
    main()
