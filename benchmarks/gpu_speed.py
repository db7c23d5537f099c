"""Items of gpu_check.py that measure speed: 8B to 4.5B with each faster path, a profile, checkpoints, NCCL, the CLI."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gpu_items import BF16, ENGINE, Context, Skipped, with_layers
from gpu_step import make_job, make_params, make_setup, measure, random_model, shapes_of
from measuring import memory_gib

from nemo_minitron.backends.megatron.data.datasets import HeldOutBatches, step_batches
from nemo_minitron.backends.megatron.distillation import fp8_teacher
from nemo_minitron.backends.megatron.distillation.distill import objective_of
from nemo_minitron.backends.megatron.distillation.setup import DistillSetup
from nemo_minitron.backends.megatron.model.head import collect_head_gradient_in_place, model_hidden
from nemo_minitron.backends.megatron.model.layers import fuse_weight_gradients
from nemo_minitron.backends.megatron.model.parts import head_weight as head_parameter
from nemo_minitron.backends.megatron.runtime.session import Session, open_session
from nemo_minitron.backends.megatron.training.checkpoint import Checkpoints, TrainingProgress
from nemo_minitron.backends.megatron.training.loop import Job, forward_backward
from nemo_minitron.distillation.flops import forward_flops_per_token
from nemo_minitron.distillation.losses import forward_kl
from nemo_minitron.distillation.sparse import sparse_kl, top_k_teacher
from nemo_minitron.schema.execution import Kernels, Parallel
from nemo_minitron.schema.losses import LogitsLoss, TopK
from nemo_minitron.schema.training import Fp8Teacher

DATA_SHEET_FLOPS_PER_S = 989.4e12
PLAIN = Kernels(
    chunk_tokens=523,
    head_gradient_in_place=False,
    fused_kl="off",
    fuse_rope=False,
    fuse_weight_gradient=False,
)
"""Kernels before the faster paths existed, with chunks of 256 MiB in fp32."""
VARIANTS: dict[str, dict[str, object]] = {
    "chunk 512": {"chunk_tokens": 512},
    "chunk 2048": {"chunk_tokens": 2048},
    "chunk 4096": {"chunk_tokens": 4096},
    "head in place": {"chunk_tokens": 4096, "head_gradient_in_place": True},
    "KL by torch.compile": {"chunk_tokens": 4096, "fused_kl": "torch"},
    "KL by Triton": {"chunk_tokens": 4096, "fused_kl": "triton"},
    "RoPE": {"fuse_rope": True},
    "weight gradients": {"fuse_weight_gradient": True},
}


@dataclass
class Bench:
    """Both models in a session that stays open, and the job on them."""

    setup: DistillSetup
    job: Job

    def use(self, kernels: Kernels) -> None:
        """Switch the paths of the same models."""
        session = replace(self.setup.session, kernels=kernels)
        self.setup = replace(self.setup, session=session)
        self.job = replace(self.job, session=session, objective=objective_of(self.setup))
        for model in (self.setup.student, self.setup.teacher):
            assert model is not None
            model.config.apply_rope_fusion = kernels.fuse_rope and bool(_engine_linears(model))
        student = self.setup.student
        for module in _engine_linears(student):
            module.fuse_wgrad_accumulation = False  # type: ignore[assignment]
        if kernels.fuse_weight_gradient:
            fuse_weight_gradients(student)
        parameter = head_parameter(student)
        scale = self.job.session.parallel.cp / self.job.params.global_batch_size
        if kernels.head_gradient_in_place:
            collect_head_gradient_in_place(student, scale)
        elif hasattr(parameter, "minitron_loss_scale"):
            del parameter.minitron_loss_scale

    def numbers(self) -> dict[str, float]:
        """Loss and norm of the gradient of the first global batch."""
        found = forward_backward(self.job, 0)
        buffers = self.job.trainable.ddp.buffers
        norm = torch.stack([buffer.grad_data.norm() for buffer in buffers]).norm()
        losses = torch.stack([parts["train_loss"] for parts in found])
        return {"loss": float(losses.mean()), "gradient_norm": float(norm)}

    def speed(self, *, with_optimizer: bool, rounds: int = 3) -> dict[str, float]:
        found = measure(self.job, with_optimizer=with_optimizer, rounds=rounds)
        mfu = found["tokens_per_s"] * self.job.flops_per_token / DATA_SHEET_FLOPS_PER_S
        return {**found, "mfu_of_data_sheet": mfu}


def _engine_linears(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if hasattr(module, "fuse_wgrad_accumulation")]


def _bench(context: Context) -> Bench:
    if "bench" not in context.kept:
        raise Skipped("the item baseline has not run")
    return context.kept["bench"]


def baseline(context: Context) -> dict[str, Any]:
    """8B to 4.5B as before the faster paths; the models stay for the items that follow."""
    recipe, size, length = ("llama31_8b/width_4b", 8, 8192) if context.on_gpu else ("smollm2_135m/width", 2, 64)
    shapes = shapes_of(recipe)
    if not context.on_gpu:
        # Untied embeddings, as in the large models.
        small = {"num_layers": 2, "vocab_size": 1024}
        shapes = tuple(replace(shape.resized(**small), tied_embeddings=False) for shape in shapes)  # type: ignore[assignment]
    stack = context.kept["stack"] = ExitStack()
    session = stack.enter_context(open_session(Parallel(), device=context.device, kernels=PLAIN))
    setup = make_setup(shapes, make_params(size, length), session)
    bench = context.kept["bench"] = Bench(setup, make_job(shapes, make_params(size, length), setup))
    bench.use(PLAIN)
    numbers = context.kept["numbers"] = bench.numbers()
    context.kept["recipe"] = recipe
    return {**numbers, **bench.speed(with_optimizer=False)}


def variants(context: Context) -> dict[str, Any]:
    """Each faster path on its own, all together, and then a teacher in FP8; with the loss of the same batch."""
    bench = _bench(context)
    out: dict[str, Any] = {}
    has_engine = ENGINE in context.layers
    for name, keys in VARIANTS.items():
        if not context.on_gpu and name == "KL by Triton":
            continue
        if not has_engine and name in ("RoPE", "weight gradients"):
            out[name] = {"skipped": "Transformer Engine is not used"}
            continue
        out[name] = _variant(context, bench, PLAIN.model_copy(update=keys))
    out["all"] = _variant(context, bench, Kernels())
    out["all, 16 micro-batches with optimizer"] = _larger(bench, 16 if context.on_gpu else 4)
    if has_engine:
        out["all, FP8 teacher"] = _fp8(context, bench)
    return out


def _variant(context: Context, bench: Bench, kernels: Kernels) -> dict[str, Any]:
    bench.use(kernels)
    numbers, before = bench.numbers(), context.kept["numbers"]
    changes = {f"{key}_change": value / before[key] - 1 for key, value in numbers.items()}
    return {**changes, **bench.speed(with_optimizer=False)}


def _larger(bench: Bench, size: int) -> dict[str, float]:
    job, params = bench.job, bench.job.params.model_copy(update={"global_batch_size": size})
    try:
        bench.job = replace(job, params=params)
        bench.use(bench.setup.session.kernels)
        return bench.speed(with_optimizer=True, rounds=2)
    finally:
        bench.job = job
        bench.use(bench.setup.session.kernels)


def _fp8(context: Context, bench: Bench) -> dict[str, Any]:
    setup, teacher = bench.setup, bench.setup.teacher
    assert teacher is not None
    batch = step_batches(bench.job.samples, setup.session, step=0, global_batch_size=1, micro_batch_size=1)[0]
    params = Fp8Teacher(max_kl=1e9)
    fp8_teacher.run_in_fp8(teacher, params, setup.session)
    try:
        kl = fp8_teacher.require_close_teacher(
            teacher,
            setup.vocab_size,
            HeldOutBatches([batch], int(batch["loss_mask"].sum())),
            params,
            setup.session,
            context.folder("fp8"),
        )
        return {"kl_to_bf16_teacher": kl, **_variant(context, bench, Kernels())}
    finally:
        teacher.config.fp8 = None


def profile(context: Context) -> dict[str, Any]:
    """Kernels of one micro-batch by time, and the share of time in which the GPU has none."""
    bench = _bench(context)
    bench.use(Kernels())
    forward_backward(bench.job, 0)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if context.on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    batch = step_batches(bench.job.samples, bench.setup.session, step=0, global_batch_size=1, micro_batch_size=1)[0]
    with torch.no_grad(), torch.profiler.profile(activities=activities) as of_teacher:
        model_hidden(bench.setup.teacher, batch)  # type: ignore[arg-type]
    started = time.perf_counter()
    with torch.profiler.profile(activities=activities) as found:
        forward_backward(bench.job, 0)
        if context.on_gpu:
            torch.cuda.synchronize()
    wall_s = time.perf_counter() - started
    key = "self_cuda_time_total" if context.on_gpu else "self_cpu_time_total"
    table = found.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=60)
    events = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    busy_s = sum(event.time_range.elapsed_us() for event in events) / 1e6
    flops = forward_flops_per_token(bench.setup.teacher_shape, batch["tokens"].shape[1])  # type: ignore[arg-type]
    return {
        "wall_s": wall_s,
        "gpu_busy_s": busy_s,
        "kernels": len(events),
        "teacher_kernels": len(of_teacher.events()),
        "teacher_tflop": flops * batch["tokens"].numel() / 1e12,
        "table": table,
    }


def masks_and_sparse(context: Context) -> dict[str, Any]:
    """Steps with separate documents, by each kind of layers, and the time of a sparse loss beside a dense one."""
    close_bench(context)
    out: dict[str, Any] = {}
    tokens, vocab = (1024, 128_256) if context.on_gpu else (16, 1024)
    device = torch.device(context.device)
    student, teacher = (torch.randn(tokens, vocab, device=device) for _ in range(2))
    kept = top_k_teacher(teacher.clone(), TopK(kind="top_k", k=64), 1.0)
    for name, loss in {
        "sparse_s": lambda: sparse_kl(student.clone(), kept, 1.0),
        "dense_s": lambda: forward_kl(student.clone(), teacher.clone(), LogitsLoss()),
    }.items():
        for _ in range(3):
            started = time.perf_counter()
            loss()
            if context.on_gpu:
                torch.cuda.synchronize()
            out[name] = time.perf_counter() - started
    from tests.support.megatron_ranks import distill_losses

    params = BF16.model_copy(update={"reset_attention_mask": True, "num_steps": 4})
    for kind in context.layers:
        with with_layers(kind):
            work = context.work(f"documents-{kind}")
            out[f"losses with separate documents, {kind}"] = distill_losses(params, Parallel(), *work, context.device)[
                0
            ]
    return out


@contextmanager
def _resident_peak() -> Iterator[list[float]]:
    """Collect the resident memory of this process in GiB, several times a second."""
    found, done = [memory_gib("VmRSS")], threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            found.append(memory_gib("VmRSS"))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def checkpoint(context: Context) -> dict[str, Any]:
    """Save and resume a training of 1B parameters: how long a step stalls, how much host memory is taken."""
    close_bench(context)
    shapes = shapes_of("llama31_8b/width_4b" if context.on_gpu else "smollm2_135m/width")
    shape = shapes[0].resized(num_layers=8 if context.on_gpu else 1)
    out: dict[str, Any] = {}
    with open_session(Parallel(), device=context.device) as session:
        params = make_params(1, 2048 if context.on_gpu else 32)
        job = make_job((shape, shape), params, make_setup((shape, shape), params, session))
        out["num_params"] = sum(parameter.numel() for parameter in job.trainable.model.parameters())
        folder = context.folder("checkpoint")
        keeper = Checkpoints(folder / "checkpoints", session, keep=2, in_background=True)
        forward_backward(job, 0)
        job.trainable.optimizer.step()
        with _resident_peak() as resident:
            for step in (1, 2):
                started = time.perf_counter()
                keeper.save(job.trainable, TrainingProgress(step, ()))
                out[f"save_{step}_stalls_s"] = time.perf_counter() - started
                started = time.perf_counter()
                forward_backward(job, 0)
                _synchronize(session)
                out[f"step_after_save_{step}_s"] = time.perf_counter() - started
                keeper.finish()
        out |= {"host_gib_before": resident[0], "host_gib_peak": max(resident), "host_gib_after": memory_gib("VmRSS")}
        started = time.perf_counter()
        again = Checkpoints(folder / "checkpoints", session, keep=2, in_background=True)
        out["resumed_step"] = again.resume(job.trainable).step
        out["resume_s"] = time.perf_counter() - started
    return out


def _synchronize(session: Session) -> None:
    if session.on_gpu:
        torch.cuda.synchronize()


def close_bench(context: Context) -> None:
    """Free the large models and close their session."""
    context.kept.pop("bench", None)
    stack = context.kept.pop("stack", None)
    if stack is not None:
        stack.close()


def nccl(context: Context) -> dict[str, Any]:
    """All groups of one rank, a barrier, and their end; then a layer of the teacher as a CUDA graph."""
    close_bench(context)
    out: dict[str, Any] = {}
    started = time.perf_counter()
    with open_session(Parallel(sequence_parallel=True), device=context.device) as session:
        out["open_s"] = time.perf_counter() - started
        session.barrier()
        out["sum"] = float(session.sum(torch.ones(1, device=session.device)))
        out |= _graph(session)
        started = time.perf_counter()
    out["close_s"] = time.perf_counter() - started
    return out


def _graph(session: Session) -> dict[str, float]:
    """Return the time of a small model's forward pass, launched by Python and, on a GPU, as a graph."""
    shapes = shapes_of("llama31_8b/width_4b" if session.on_gpu else "smollm2_135m/width")
    tokens = 1024 if session.on_gpu else 32
    shape = shapes[1].resized(num_layers=2)
    model = random_model(shape, session, make_params(1, tokens))
    hidden = torch.randn(tokens, 1, shape.hidden_size, device=session.device, dtype=torch.bfloat16)
    rotary = model.rotary_pos_emb(tokens)  # type: ignore[operator]

    @torch.no_grad()
    def run() -> None:
        model.decoder(hidden_states=hidden, attention_mask=None, rotary_pos_emb=rotary)  # type: ignore[operator]

    calls: dict[str, Callable[[], Any]] = {"launched_s": run}
    for _ in range(3):
        run()
    if session.on_gpu:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        calls["graph_s"] = graph.replay
    found = {}
    for name, call in calls.items():
        _synchronize(session)
        started = time.perf_counter()
        for _ in range(20):
            call()
        _synchronize(session)
        found[name] = (time.perf_counter() - started) / 20
    return found


def toy_run(context: Context) -> dict[str, Any]:
    """The toy recipe from start to report, by the command line."""
    precision = "bf16" if context.on_gpu else "fp32"
    stages = ("check_teacher", "score", "distill", "evaluate_teacher", "evaluate_pruned", "evaluate_random")
    overrides = [f"stages.{stage}.precision={precision}" for stage in (*stages, "evaluate_distilled", "speed")]
    overrides += [f"execution.device={context.device}", f"execution.run_root={context.folder('toy')}"]
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "nemo_minitron", "run", str(root / "recipes/toy/width.yaml"), *overrides]
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=60 if context.on_gpu else 400, check=False
    )
    tail = (done.stdout + done.stderr)[-2000:]
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {tail}")
    return {"exit_code": done.returncode, "tail": tail}


ITEMS: list[tuple[str, float, Callable[[Any], dict[str, Any]]]] = [
    ("baseline", 35, baseline),
    ("variants", 150, variants),
    ("profile", 15, profile),
    ("masks_and_sparse", 15, masks_and_sparse),
    ("checkpoint", 35, checkpoint),
    ("nccl", 30, nccl),
    ("toy_run", 60, toy_run),
]
