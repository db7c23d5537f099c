"""NeMo 2.1, Megatron-Core 0.10 and NeMo-Aligner 0.7 on a machine without CUDA, Apex and Transformer Engine.

These packages use CUDA devices, CUDA generators and Apex kernels without checking for them. Each function below
replaces one such use. Call `enable()` before importing any of the packages; on a machine with CUDA it does nothing.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


def enable() -> bool:
    """Apply all patches and return True; on a machine with a GPU, do nothing and return False."""
    if torch.cuda.is_available():
        return False
    os.environ["NVIDIA_PYTORCH_VERSION"] = "none"  # NeMo reads this to tune itself for NGC containers
    for patch in (
        _send_cuda_tensors_to_cpu,
        _make_cuda_calls_harmless,
        _autocast_on_cpu,
        _megatron_random_numbers,
        _gather_scalars_with_gloo,
        _nemo_without_apex,
        _clip_gradients_without_apex,
        _layers_without_transformer_engine,
        _checkpoints_with_newer_torch,
        _checkpoints_of_torch_adam,
    ):
        patch()
    return True


class _CudaToCpu(TorchFunctionMode):
    """Replace CUDA devices by the CPU in the arguments of every torch function."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False  # only memory that a GPU reads can be pinned
        if func is torch.Tensor.to:
            # A positional int may be another argument, so a number counts as a device in `device=` only.
            args = (args[0], *(CPU if not isinstance(a, int) and _is_cuda(a) else a for a in args[1:]))
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


def _send_cuda_tensors_to_cpu() -> None:
    _CudaToCpu().__enter__()  # for this thread, until the process ends
    torch.nn.Module.cuda = lambda self, device=None: self
    begin = threading.Thread._bootstrap_inner  # type: ignore[attr-defined]

    def in_mode(self: threading.Thread) -> None:
        """Run the thread in its own function mode, because modes are per thread."""
        with _CudaToCpu():
            begin(self)

    threading.Thread._bootstrap_inner = in_mode  # type: ignore[attr-defined]


class _Stream:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...


def _make_cuda_calls_harmless() -> None:
    cuda: Any = torch.cuda
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda *args, **kwargs: 0)
    cuda.current_device = lambda: CPU
    cuda.is_initialized = lambda: True
    cuda.mem_get_info = lambda *args, **kwargs: (1, 1)
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    cuda.Stream, cuda.current_stream = _Stream, lambda *args, **kwargs: _Stream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args, **kwargs: None
    for name in ("FloatTensor", "HalfTensor", "BFloat16Tensor", "LongTensor", "IntTensor", "BoolTensor"):
        setattr(cuda, name, getattr(torch, name))


def _autocast_on_cpu() -> None:
    """Redirect autocast and custom autograd functions, for which NeMo and Megatron name "cuda"."""
    begin = torch.autocast.__init__
    forward, backward = torch.amp.custom_fwd, torch.amp.custom_bwd
    amp: Any = torch.amp

    def on_cpu(self: Any, device_type: str = "cuda", *args: Any, **kwargs: Any) -> None:
        begin(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    torch.autocast.__init__ = on_cpu
    amp.custom_fwd = lambda f=None, *, device_type="cuda", **kwargs: forward(f, device_type="cpu", **kwargs)
    amp.custom_bwd = lambda f=None, *, device_type="cuda": backward(f, device_type="cpu")


def _megatron_random_numbers() -> None:
    """Use CPU generators: Megatron keeps states of CUDA generators, and NeMo seeds them only with a CUDA device."""
    import megatron.core.tensor_parallel.random as megatron_random
    import nemo.collections.nlp.modules.common.megatron.megatron_init as megatron_init

    megatron_random._set_cuda_rng_state = lambda state, device=-1: torch.set_rng_state(state)
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
    seed = megatron_init._set_random_seed

    def seed_all(value: int) -> None:
        seed(value)
        megatron_random.model_parallel_cuda_manual_seed(value)
        torch.manual_seed(value)

    megatron_init._set_random_seed = seed_all


def _gather_scalars_with_gloo() -> None:
    """Gather tensors of shape [] as [1]: unlike NCCL, gloo does not gather tensors without dimensions."""
    gather = torch.distributed.all_gather_into_tensor

    def gather_any(out: torch.Tensor, part: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return gather(out, part.reshape(1) if part.dim() == 0 else part, *args, **kwargs)

    torch.distributed.all_gather_into_tensor = gather_any


def _nemo_without_apex() -> None:
    """Define what NeMo gets from Apex: without it, classes are missing and imports of Megatron are skipped."""
    import nemo.collections.nlp.models.language_modeling.megatron_base_model as base_model
    import nemo.collections.nlp.models.nlp_model as nlp_model
    import nemo.collections.nlp.modules.common.megatron.build_model as build_model
    import nemo.collections.nlp.modules.common.megatron.utils as megatron_utils
    import nemo.collections.nlp.parts.nlp_overrides as overrides
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.layers import set_defaults_if_not_set_tensor_model_parallel_attributes
    from nemo.core.classes.modelPT import ModelPT

    overrides.HAVE_APEX = True
    for name in ("MegatronDistributedFusedAdam", "McoreDistributedOptimizer"):
        if not hasattr(overrides, name):
            setattr(overrides, name, type(name, (), {}))  # used with isinstance only
    overrides.NLPDDPStrategy._fix_tensors_device = lambda self, checkpoint: checkpoint
    build_model.parallel_state, build_model.HAVE_MEGATRON_CORE = parallel_state, True
    build_model.set_defaults_if_not_set_tensor_model_parallel_attributes = (
        set_defaults_if_not_set_tensor_model_parallel_attributes
    )
    megatron_utils.listify_model = lambda model: model if isinstance(model, list) else [model]
    megatron_utils.FusedLayerNorm = megatron_utils.FastLayerNorm = torch.nn.LayerNorm
    megatron_utils.MixedFusedRMSNorm = torch.nn.RMSNorm
    base_model.MegatronBaseModel._enable_nvidia_optimizations = lambda self: None
    nlp_model.get_megatron_pretrained_bert_models = list  # the original imports a BERT that needs Transformer Engine
    ModelPT.cuda = lambda self, device=None: self


def _clip_gradients_without_apex() -> None:
    """Compute the norm of all gradients with torch instead of Apex's multi-tensor kernel."""
    import nemo.collections.nlp.modules.common.megatron.clip_grads as clip_grads

    class Kernels:
        multi_tensor_l2norm = "l2norm"

    def l2norm(kernel: str, overflow: Any, lists: list[list[torch.Tensor]], per_tensor: bool) -> Any:
        return torch.stack([tensor.float().norm() for tensor in lists[0]]).norm(), None

    clip_grads.amp_C, clip_grads.multi_tensor_applier = Kernels, l2norm


def _layers_without_transformer_engine() -> None:
    """Return the local layer specification: NeMo builds all, also those of Transformer Engine, to select one."""
    import nemo.collections.nlp.models.language_modeling.megatron_gpt_model as gpt_model
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    def local(spec_name: str = "", config: Any = None, *args: Any, **kwargs: Any) -> Any:
        return get_gpt_layer_local_spec(config.num_moe_experts, config.moe_grouped_gemm)

    gpt_model.get_specs = local


def _checkpoints_with_newer_torch() -> None:
    """Pass two more arguments to a private writer of torch: it has them since 2.7, and Megatron-Core 0.10 calls it."""
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem
    import torch.distributed.checkpoint.filesystem as newer

    if len(inspect.signature(newer._write_item).parameters) != 6:
        return
    transforms: Any = newer._StorageWriterTransforms()
    as_tensors = newer.SerializationFormat.TORCH_SAVE
    filesystem._write_item = lambda stream, data, item, key: newer._write_item(
        transforms, stream, data, item, key, as_tensors
    )


def _checkpoints_of_torch_adam() -> None:
    """Move the step counters of torch's Adam, which are per parameter, to the parameter groups in checkpoints.

    NeMo expects every state to have the shape of its parameter. Apex's Adam keeps the counter in the group.
    """
    import nemo.collections.nlp.parts.nlp_overrides as overrides

    to_sharding = overrides.optim_state_to_sharding_state

    def without_counters(state: dict[str, Any], model_state: Any, exclude_keys: Any = ()) -> None:
        counters = [float(values["step"]) for values in state["state"].values() if "step" in values]
        # New dicts, because these are shared with the optimizer, which continues to train.
        state["state"] = {
            index: {key: value for key, value in values.items() if key != "step"}
            for index, values in state["state"].items()
        }
        to_sharding(state, model_state, exclude_keys)
        if counters:
            for group in state["param_groups"]:
                group["step"] = max(counters)

    def with_counters(load: Callable[..., None]) -> Callable[..., None]:
        def load_state_dict(self: Any, state: dict[str, Any]) -> None:
            for group in state["param_groups"]:
                step = group.pop("step", None)
                for index in group["params"]:
                    if step is not None and index in state["state"]:
                        state["state"][index].setdefault("step", torch.tensor(float(step)))
            load(self, state)

        return load_state_dict

    overrides.optim_state_to_sharding_state = without_counters
    torch.optim.Adam.load_state_dict = with_counters(torch.optim.Adam.load_state_dict)
