"""Run Megatron-Core on the CPU, with or without a GPU in the machine.

Megatron-Core hard-codes the CUDA device in places that no public option reaches. While `cuda_means_cpu()` is active
(in CPU sessions only), those places use the CPU instead. Leaving the context restores everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


def _cpu_device() -> Any:
    return CPU


def cuda_is_cpu() -> bool:
    """Return whether `cuda_means_cpu()` is active, that is, a CPU session is open."""
    return torch.cuda.current_device is _cpu_device


@contextmanager
def cuda_means_cpu() -> Iterator[None]:
    """Redirect Megatron's CUDA devices to the CPU inside the context."""
    from megatron.core.tensor_parallel import random as megatron_random

    with ExitStack() as stack:
        _use_torch_optimizer(stack)
        # Used as `device=` for communication buffers.
        stack.enter_context(patch.object(torch.cuda, "current_device", _cpu_device))
        # Called around pipeline sends and receives.
        stack.enter_context(patch.object(torch.cuda, "synchronize", lambda *_, **__: None))
        stack.enter_context(patch.object(torch.cuda, "current_stream", lambda *_, **__: _NoStream()))
        # Torch's optimizers check whether a graph is being captured, through the accelerator's stream or (2.6) CUDA's.
        stack.enter_context(patch.object(torch.accelerator, "current_accelerator", lambda *_, **__: None))
        stack.enter_context(patch.object(torch.cuda, "is_current_stream_capturing", lambda: False))
        # Dropout regions fork the CUDA generator; on the CPU there is only one generator.
        stack.enter_context(patch.object(megatron_random, "_CUDA_RNG_STATE_TRACKER", CpuRngTracker()))
        stack.enter_context(patch.object(megatron_random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", True))
        # Recomputation saves and restores the CUDA generator's state as well as the CPU's.
        # Versions before 0.11 call torch.cuda.get_rng_state.
        stack.enter_context(patch.object(torch.cuda, "get_rng_state", lambda *_, **__: None))
        stack.enter_context(patch.object(megatron_random, "_get_cuda_rng_state", lambda *_, **__: None, create=True))
        stack.enter_context(patch.object(megatron_random, "_set_cuda_rng_state", lambda *_, **__: None))
        stack.enter_context(_CudaArgumentsToCpu())
        yield


def _use_torch_optimizer(stack: ExitStack) -> None:
    """Replace the optimizer kernels of Transformer Engine and Apex, which accept only CUDA tensors, by torch's."""
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.optimizer import optimizer as mixed_precision

    stack.enter_context(patch.multiple(optimizer, Adam=torch.optim.AdamW, USING_PYTORCH_OPTIMIZER=True, create=True))
    # With a fused Adam the distributed optimizer neither saves nor restores the step counters of torch's Adam.
    for name in ("HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER", "USING_APEX_OPTIMIZER"):
        if hasattr(distrib_optimizer, name):
            stack.enter_context(patch.object(distrib_optimizer, name, False))
    torch_kernels = {
        "multi_tensor_applier": utils.local_multi_tensor_applier,
        "l2_norm_impl": utils.local_multi_tensor_l2_norm,
        "multi_tensor_scale_impl": _scale,
    }
    for module in (clip_grads, mixed_precision):
        for name, kernel in torch_kernels.items():
            if hasattr(module, name):
                stack.enter_context(patch.object(module, name, kernel))


def _scale(_: int, __: Any, lists: list[list[torch.Tensor]], factor: float) -> None:
    """Do what Megatron's local_multi_tensor_scale does, in one pass over memory and without a copy of each tensor."""
    for source, target in zip(*lists, strict=True):
        torch.mul(source, factor, out=target)


class _NoStream:
    """Replacement for a CUDA stream; CPU work is synchronous."""

    def wait_stream(self, _: Any) -> None: ...

    def synchronize(self) -> None: ...


class _CudaArgumentsToCpu(TorchFunctionMode):
    """Rewrites `device="cuda"`, `.cuda()` and `.to("cuda")`, which optimizer and gradient-norm code hard-codes."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        # Pinned memory requires CUDA.
        kwargs.pop("pin_memory", None)
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron's optimizer groups parameters by type names such as torch.cuda.FloatTensor.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class CpuRngTracker:
    """Megatron's named random states, backed by the CPU generator."""

    def __init__(self) -> None:
        self.states_: dict[str, torch.Tensor] = {}

    def is_initialized(self) -> bool:
        return True

    def reset(self) -> None:
        self.states_ = {}

    def get_states(self) -> dict[str, torch.Tensor]:
        return dict(self.states_)

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        self.states_ = dict(states)

    def add(self, name: str, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.states_[name] = torch.get_rng_state()

    @contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        if name not in self.states_:
            self.add(name, torch.initial_seed() % 2**31)
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.states_[name])
            yield
            self.states_[name] = torch.get_rng_state()
