"""Open and close the distributed session. The only module that owns Megatron's global state."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import distributed_c10d

from nemo_minitron.backends.megatron.runtime.cpu import cuda_means_cpu
from nemo_minitron.backends.megatron.runtime.rendezvous import ForeignProcessError, join, restricted_to_own_user
from nemo_minitron.errors import EnvironmentProblem, PlanError
from nemo_minitron.schema.execution import Kernels, Parallel
from nemo_minitron.system.heap import keep_freed_memory

TIMEOUT = timedelta(minutes=30)
"""Time in which every rank must join a collective operation, until a training has made its first step."""
STEP_TIMEOUT = timedelta(minutes=10)
"""The same between the first and the last step of a training, so that a hang does not cost hours of all GPUs."""
LONG_TIMEOUT = timedelta(days=1)
"""Time for work that only one rank does."""
DETERMINISTIC = {
    # Transformer Engine and cuDNN choose backward passes of attention without atomic additions.
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    # NCCL then adds in the same order every time.
    "NCCL_ALGO": "Ring",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
"""Environment variables of execution.deterministic. Libraries read them when they are first used."""


@dataclass(frozen=True)
class Session:
    """This process's ranks and device; valid while the session is open."""

    parallel: Parallel
    device: torch.device
    rank: int
    world_size: int
    tp_rank: int
    pp_rank: int
    cp_rank: int
    dp_rank: int
    kernels: Kernels = field(default_factory=Kernels)

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes files."""
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.parallel.pp - 1

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def barrier(self) -> None:
        dist.barrier()

    @contextmanager
    def main_works(self) -> Iterator[None]:
        """Let rank 0 do long work inside the context; the others wait at its end, for up to a day.

        They wait in a group on the CPU, because NCCL's watchdog would end processes that wait longer than its timeout.
        """
        with self._patient_group() as group:
            yield
            if group is not None:
                dist.barrier(group=group)

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks in their order, on every rank; ranks may be up to a day apart.

        Values travel as JSON, so tuples arrive as lists. torch's own function for objects would unpickle what arrives.
        """
        if self.world_size == 1:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        with self._patient_group() as group:
            dist.all_gather(sizes, torch.tensor([len(own)]), group=group)
            longest = max(int(size) for size in sizes)
            padded = torch.cat([own, own.new_zeros(longest - len(own))])
            texts = [torch.empty_like(padded) for _ in sizes]
            dist.all_gather(texts, padded, group=group)
        return [json.loads(bytes(text[: int(size)].tolist())) for text, size in zip(texts, sizes, strict=True)]

    @contextmanager
    def _patient_group(self) -> Iterator[dist.ProcessGroup | None]:
        if self.world_size == 1:
            yield None
            return
        group = dist.new_group(backend="gloo", timeout=LONG_TIMEOUT)
        yield group
        dist.destroy_process_group(group)

    def set_timeout(self, timeout: timedelta) -> None:
        """Limit the time that a collective operation of any group waits for the other ranks."""
        for group in list(distributed_c10d._world.pg_map):
            distributed_c10d._set_pg_timeout(timeout, group)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-reduce over every rank, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor


@contextmanager
def open_session(
    parallel: Parallel,
    *,
    device: str = "auto",
    seed: int = 1234,
    threads: int | None = None,
    kernels: Kernels | None = None,
    deterministic: bool = False,
) -> Iterator[Session]:
    """Initialize torch.distributed (for a single process, too) and Megatron's parallel state.

    Args:
        deterministic: use only algorithms that give the same bits each time, where there are any.

    Raises:
        EnvironmentProblem: CUDA was requested but is not available, or another user's process has connected.
        PlanError: the number of processes is not tp * pp * cp * dp.
    """
    chosen = _choose_device(device)
    if chosen.type == "cpu":
        keep_freed_memory()
        if threads:
            torch.set_num_threads(threads)
    with ExitStack() as stack:
        if deterministic:
            stack.enter_context(_deterministic())
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
            torch.cuda.reset_peak_memory_stats(chosen)
            stack.enter_context(_full_fp32_products())
        else:
            stack.enter_context(cuda_means_cpu())
        stack.enter_context(_restricted_to_own_user())
        _join_world(chosen, parallel)
        stack.callback(dist.destroy_process_group)
        parallel_state.initialize_model_parallel(parallel.tp, parallel.pp, context_parallel_size=parallel.cp)
        stack.callback(parallel_state.destroy_model_parallel)
        _seed(seed, chosen)
        yield Session(
            parallel=parallel,
            device=chosen,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
            cp_rank=parallel_state.get_context_parallel_rank(),
            dp_rank=parallel_state.get_data_parallel_rank(),
            kernels=kernels or Kernels(),
        )


def _choose_device(device: str) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentProblem(
            "execution.device = cuda, but torch finds no GPU.", allowed="auto, cpu", next_step="Check `nvidia-smi`."
        )
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _join_world(device: torch.device, parallel: Parallel) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != parallel.world_size:
        raise PlanError(
            f"{world_size} processes were started for a layout of {parallel.world_size} "
            f"(tp {parallel.tp} x pp {parallel.pp} x cp {parallel.cp} x dp {parallel.dp}).",
            next_step="Start tp * pp * cp * dp processes.",
        )
    join(backend, TIMEOUT)


@contextmanager
def _full_fp32_products() -> Iterator[None]:
    """Multiply fp32 matrices in fp32. NVIDIA's images set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, so that torch would use
    TF32, with 10 bits of mantissa."""
    matrices, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matrices)
        torch.backends.cudnn.allow_tf32 = convolutions


@contextmanager
def _deterministic() -> Iterator[None]:
    """Use deterministic algorithms inside the context. An operation that has none logs a warning."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    added = {name: value for name, value in DETERMINISTIC.items() if name not in os.environ}
    os.environ.update(added)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def _restricted_to_own_user() -> Iterator[None]:
    try:
        with restricted_to_own_user():
            yield
    except ForeignProcessError as error:
        raise EnvironmentProblem(
            str(error),
            next_step="Run on a machine that you do not share, or report that user; the same command continues.",
        ) from error


def _seed(seed: int, device: torch.device) -> None:
    torch.manual_seed(seed)
    if device.type == "cuda":
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(seed)
