"""Megatron's data-parallel wrapper, optimizer and learning-rate schedule around a model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from nemo_minitron.backends.megatron.distillation.hidden import sum_projection_gradient
from nemo_minitron.backends.megatron.model.build import DTYPES
from nemo_minitron.backends.megatron.model.head import collect_head_gradient_in_place
from nemo_minitron.backends.megatron.model.layers import fuse_weight_gradients
from nemo_minitron.backends.megatron.model.parts import Model
from nemo_minitron.backends.megatron.runtime.versions import known_fields
from nemo_minitron.schema.execution import Kernels, Parallel
from nemo_minitron.schema.training import Optimization


@dataclass(frozen=True)
class Trainable:
    """A model with its data-parallel wrapper, optimizer and learning-rate schedule."""

    ddp: DistributedDataParallel
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    teacher: Trainable | None = None
    """Teacher that is trained at the same time and saved in the same checkpoints."""

    has_frozen_layers: bool = False
    """Whether some layers, on any rank, may have no optimizer states."""

    @property
    def model(self) -> Model:
        return self.ddp.module

    @property
    def has_distributed_optimizer(self) -> bool:
        """Whether each data-parallel rank keeps a part of the optimizer's states."""
        return bool(self.ddp.ddp_config.use_distributed_optimizer)

    def gather_parameters(self) -> None:
        """Bring every rank's parameters up to date; call this before reading them outside a training step.

        With overlap_param_gather a rank has new values of only its own part until its next training step. Otherwise
        Megatron would gather them during the next forward pass, and wait forever for a rank that has fewer batches.
        """
        if self.ddp.ddp_config.overlap_param_gather:
            self.ddp.start_param_sync(force_sync=True)
        if self.teacher is not None:
            self.teacher.gather_parameters()

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])


def make_trainable(
    model: Model, params: Optimization, num_steps: int, parallel: Parallel, kernels: Kernels | None = None
) -> Trainable:
    """Wrap a model for training, with gradients and optimizer states in fp32 (fp64 stays fp64)."""
    kernels = kernels or Kernels()
    config = model.config
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.params_dtype != torch.float64,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    ddp = DistributedDataParallel(config, ddp_config, model)
    if kernels.head_gradient_in_place:
        # Each micro-batch counts equally. Megatron later averages over context-parallel ranks, whose losses are shares.
        micro_batches = params.global_batch_size // (parallel.dp * parallel.micro_batch_size)
        collect_head_gradient_in_place(model, parallel.cp / micro_batches)
    if kernels.fuse_weight_gradient:
        fuse_weight_gradients(model)
    config.finalize_model_grads_func = _finalize_gradients
    config.no_sync_func = ddp.no_sync
    optimizer = get_megatron_optimizer(_optimizer_config(params, parallel), [ddp])
    use_fused_adam(optimizer)
    config.grad_scale_func = optimizer.scale_loss
    return Trainable(ddp, optimizer, _schedule(optimizer, params, num_steps))


def use_fused_adam(optimizer: MegatronOptimizer) -> None:
    """Let torch's Adam update each parameter in one pass over memory.

    By default it makes a copy of all parameters on a GPU, and takes about four times as long on a CPU. Transformer
    Engine's and Apex's Adam are fused already. Call this again after loading a state, which includes the choice and
    the step counters of another device.
    """
    for single in getattr(optimizer, "chained_optimizers", [optimizer]):
        adam = getattr(single, "optimizer", None)
        if not isinstance(adam, torch.optim.AdamW | torch.optim.Adam):
            continue
        for group in adam.param_groups:
            if can_be_fused(group["params"]):
                group["fused"] = True
            elif group.get("fused"):
                group["fused"] = False
            for parameter in group["params"]:
                if "step" in adam.state.get(parameter, {}):
                    place_counter(adam, parameter, is_fused=bool(group.get("fused")))


def can_be_fused(parameters: list[torch.Tensor]) -> bool:
    """Return whether torch has a fused kernel for the devices of all parameters."""
    return bool(parameters) and all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)


def place_counter(adam: torch.optim.Optimizer, parameter: torch.Tensor, *, is_fused: bool) -> None:
    """Put a step counter where torch's Adam needs it: the fused kernel on the parameter's device, others on the CPU."""
    state = adam.state[parameter]
    state["step"] = torch.as_tensor(state["step"]).to("cpu" if not is_fused else parameter.device)


def _finalize_gradients(models: list[Any], *args: Any, **kwargs: Any) -> None:
    for model in models:
        sum_projection_gradient(model)
    finalize_model_grads(models, *args, **kwargs)


def _optimizer_config(params: Optimization, parallel: Parallel) -> OptimizerConfig:
    options = {
        "optimizer": "adam",
        "lr": params.lr,
        "min_lr": params.min_lr,
        "adam_beta1": params.adam_beta1,
        "adam_beta2": params.adam_beta2,
        "adam_eps": params.adam_eps,
        "weight_decay": params.weight_decay,
        # For 0 some versions of Megatron-Core do not compute the norm, so that NaN in it would go unnoticed.
        "clip_grad": params.clip_grad or math.inf,
        "bf16": params.precision == "bf16",
        "params_dtype": DTYPES[params.precision],
        "use_distributed_optimizer": parallel.distributed_optimizer,
        "overlap_param_gather": parallel.overlap_param_gather,
    }
    return OptimizerConfig(**known_fields(OptimizerConfig, options))


def _schedule(optimizer: Any, params: Optimization, num_steps: int) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=params.lr,
        min_lr=params.min_lr,
        lr_warmup_steps=params.warmup_steps,
        lr_decay_steps=num_steps,
        lr_decay_style="WSD" if params.lr_schedule == "wsd" else params.lr_schedule,
        wsd_decay_steps=params.wsd_decay_steps,
        lr_wsd_decay_style="cosine" if params.lr_schedule == "wsd" else None,
        start_wd=params.weight_decay,
        end_wd=params.weight_decay,
        wd_incr_steps=num_steps,
        wd_incr_style="constant",
    )
