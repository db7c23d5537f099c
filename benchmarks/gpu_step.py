"""Speed of a Llama-3.1-8B -> 4B-width distillation step with random weights: tokens/s, and MFU against the rate at
which this machine multiplies matrices. One process for each GPU:

    torchrun --nproc-per-node=8 benchmarks/gpu_step.py --tp 8 --sequence-parallel
    python benchmarks/gpu_step.py --recipe toy/width --seq-len-tokens 128      # the same path on a CPU

With --no-transformer-engine its layers are torch's. Nothing is read or written but the recipe. One H100 (80 GB) holds
the two models in bf16, not the optimizer's states of the 4B student: use two or more, or --steps-without-optimizer.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch

from nemo_minitron.api import load_recipe
from nemo_minitron.backends.megatron.data.datasets import HeldOutBatches
from nemo_minitron.backends.megatron.distillation.distill import objective_of
from nemo_minitron.backends.megatron.distillation.setup import DistillSetup
from nemo_minitron.backends.megatron.model import layers
from nemo_minitron.backends.megatron.model.build import build_model
from nemo_minitron.backends.megatron.runtime.peak import matmul_flops_per_s
from nemo_minitron.backends.megatron.runtime.session import Session, open_session
from nemo_minitron.backends.megatron.training.loop import Job, forward_backward
from nemo_minitron.backends.megatron.training.optim import make_trainable
from nemo_minitron.distillation.flops import training_flops_per_token
from nemo_minitron.families import ModelShape
from nemo_minitron.plan.shapes import model_shape
from nemo_minitron.processes.gpu_environment import gpu_environment
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.stages.distill.params import DistillStage
from nemo_minitron.workload.memory import GIB, memory_of
from nemo_minitron.workload.work import Work

ROUNDS = 5
ROOT = Path(__file__).resolve().parents[1]


class RandomSamples:
    """Token ids in the place of a data set."""

    def __init__(self, vocab_size: int, seq_len_tokens: int) -> None:
        self.vocab_size, self.length = vocab_size, seq_len_tokens

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(0, self.vocab_size, (self.length + 1,), generator=generator)
        return {"tokens": ids[:-1], "labels": ids[1:], "loss_mask": torch.ones(self.length)}


def random_model(shape: ModelShape, session: Session, params: DistillStage) -> torch.nn.Module:
    """This rank's part, with small random weights."""
    model = build_model(shape, session, precision=params.precision, seq_len_tokens=params.seq_len_tokens)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
        else:
            torch.nn.init.ones_(parameter)
    return model


def shapes_of(recipe_name: str) -> tuple[ModelShape, ModelShape]:
    """Of a recipe's student and teacher."""
    recipe = load_recipe(ROOT / f"recipes/{recipe_name}.yaml", [])
    student, teacher = (model_shape(recipe, stage) for stage in ("distill", "teacher"))
    assert student is not None
    assert teacher is not None
    return student, teacher


def make_params(global_batch_size: int, seq_len_tokens: int) -> DistillStage:
    """Keys of a distillation of one step."""
    keys = {"lr": 1e-5, "num_steps": 1, "valid_num_tokens": 1}
    sizes = {"global_batch_size": global_batch_size, "seq_len_tokens": seq_len_tokens}
    return DistillStage.model_validate({"kind": "distill", **keys, **sizes})


def make_setup(shapes: tuple[ModelShape, ModelShape], params: DistillStage, session: Session) -> DistillSetup:
    """Student and teacher with random weights, and no held-out text."""
    student, teacher = (random_model(shape, session, params) for shape in shapes)
    teacher.requires_grad_(False).eval()
    nothing = HeldOutBatches([], 0)
    return DistillSetup(
        params.loss, student, teacher, shapes[0].vocab_size, nothing, session, 0, teacher_shape=shapes[1]
    )


def make_job(shapes: tuple[ModelShape, ModelShape], params: DistillStage, setup: DistillSetup) -> Job:
    """Both models, ready to train."""
    session = setup.session
    return Job(
        params=params,
        num_steps=1,
        trainable=make_trainable(setup.student, params, 1, session.parallel, session.kernels),
        shape=shapes[0],
        samples=RandomSamples(setup.vocab_size, params.seq_len_tokens),
        session=session,
        objective=objective_of(setup),
        flops_per_token=training_flops_per_token(shapes[0], shapes[1], params.seq_len_tokens),
    )


def measure(job: Job, *, with_optimizer: bool, rounds: int = ROUNDS) -> dict[str, float]:
    """Median of a few steps, after one that warms up, and their peak of memory."""
    times_s, on_gpu = [], job.session.on_gpu
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(rounds + 1):
        started_s = time.perf_counter()
        forward_backward(job, 0)
        if with_optimizer:
            job.trainable.optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()
        times_s.append(time.perf_counter() - started_s)
    peak_gib = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    tokens_per_s = job.tokens_per_step / median(times_s[1:])
    rate = matmul_flops_per_s(job.trainable.model.config.params_dtype, job.session.device) * job.session.world_size
    return {
        "step_s": median(times_s[1:]),
        "tokens_per_s": tokens_per_s,
        "matmul_tflops_per_s": rate / 1e12,
        "mfu_of_measured_matmul": tokens_per_s * job.flops_per_token / rate,
        "measured_peak_gib": peak_gib,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="llama31_8b/width_4b")
    parser.add_argument("--seq-len-tokens", type=int, default=8192)
    parser.add_argument("--global-batch-size", type=int, default=16, help="with few micro-batches the optimizer weighs")
    for size in ("tp", "pp", "dp"):
        parser.add_argument(f"--{size}", type=int, default=1)
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--recompute", choices=["none", "selective", "full"], default="none")
    parser.add_argument("--no-transformer-engine", action="store_true")
    parser.add_argument("--steps-without-optimizer", action="store_true")
    arguments = parser.parse_args()
    params = make_params(arguments.global_batch_size, arguments.seq_len_tokens)
    layout = {key: getattr(arguments, key) for key in ("tp", "pp", "dp", "sequence_parallel", "recompute")}
    if torch.cuda.is_available():
        os.environ.update(
            gpu_environment(os.environ, splits_layers=arguments.tp > 1, num_processes=Parallel(**layout).world_size)
        )
    without = patch.object(layers, "has_transformer_engine", lambda: False)
    if arguments.no_transformer_engine:
        without.start()
    with open_session(Parallel(**layout)) as session:
        shapes = shapes_of(arguments.recipe)
        job = make_job(shapes, params, make_setup(shapes, params, session))
        found = measure(job, with_optimizer=not arguments.steps_without_optimizer)
        micro_batches = arguments.global_batch_size // arguments.dp
        work = Work(
            shapes[0],
            session.parallel,
            params.precision,
            params.seq_len_tokens,
            micro_batches,
            teacher=shapes[1],
            lone_forward_kl=True,
            on_gpu=session.on_gpu,
            kernels=session.kernels,
        )
        if session.is_main:
            facts = {"recipe": arguments.recipe, **layout, "transformer_engine": layers.has_transformer_engine()}
            print(json.dumps({**facts, **found, "planned_peak_gib": memory_of(work).peak / GIB}, indent=2))


if __name__ == "__main__":
    main()
