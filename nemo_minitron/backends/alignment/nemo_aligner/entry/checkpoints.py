"""Conversion between safetensors files (whole tensors, Megatron's names) and NeMo checkpoint folders."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from safetensors import safe_open
from safetensors.torch import save_file
from task import Task, is_main

WEIGHTS_DIR, CONFIG_FILE = "model_weights", "model_config.yaml"
NORMS_INSIDE = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_bias": "input_layernorm.bias",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.layer_norm_bias": "pre_mlp_layernorm.bias",
}
"""Name with Transformer Engine -> name without it. Transformer Engine puts a norm into the linear layer after it."""


def to_nemo(task: Task) -> dict[str, Any]:
    """Write a NeMo checkpoint folder from `weights` (a folder of safetensors files) and `model_config`."""
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel

    out = Path(task["out"])
    trainer, config = make_trainer(task["model_config"])
    model = MegatronGPTModel(config, trainer)
    start_processes(trainer)
    parameters = {file_name(name): parameter for name, parameter in model.model.named_parameters()}
    for file in sorted(Path(task["weights"]).glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a dict)
                copy_padded(parameters.pop(name), tensors.get_tensor(name))
    if parameters:
        raise RuntimeError(f"there are no weights for {sorted(parameters)}")
    save_nemo(model, out)
    return {"num_params": sum(parameter.numel() for parameter in model.model.parameters())}


def from_nemo(task: Task) -> dict[str, Any]:
    """Write the language model of a NeMo checkpoint folder to `out`, one file for each tensor."""
    model = load_language_model(Path(task["nemo"]), task["model_config"])
    out = Path(task["out"])
    out.mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, task["dtype"])
    for number, (name, parameter) in enumerate(model.model.named_parameters()):
        tensor = parameter.detach().to(device="cpu", dtype=dtype).contiguous()
        save_file({file_name(name): tensor}, str(out / f"{number:05d}.safetensors"))
    return {}


def logits(task: Task) -> dict[str, Any]:
    """Write to `out` the NeMo checkpoint's logits of `tokens` (a safetensors file, [B, S])."""
    model = load_language_model(Path(task["nemo"]), task["model_config"])
    model.eval()
    with safe_open(str(task["tokens"]), framework="pt") as tensors:
        tokens = tensors.get_tensor("tokens")
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    hidden_from = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)[None, None]
    device = next(model.parameters()).device
    with torch.no_grad():
        found = model.model(tokens.to(device), positions.to(device), hidden_from.to(device))
    save_file({"logits": found.float().cpu().contiguous()}, str(task["out"]))
    return {}


def make_trainer(model_config: dict[str, Any]) -> tuple[Any, DictConfig]:
    """Return (Lightning trainer for one process, config of the model)."""
    from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder

    accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    trainer = {"devices": 1, "num_nodes": 1, "accelerator": accelerator, "precision": model_config["precision"]}
    quiet = {"logger": False, "enable_checkpointing": False, "use_distributed_sampler": False, "max_steps": 1}
    quiet["enable_progress_bar"] = False
    config = OmegaConf.create(
        {
            "name": "border",
            "trainer": {**trainer, **quiet},
            "exp_manager": {"log_tflops_per_sec_per_gpu": False},
            "model": {
                "optim": {"name": "adamw", "lr": 1e-5},
                **model_config,
            },  # required to build the model, but not used
        }
    )
    return MegatronTrainerBuilder(config).create_trainer(), config.model


def load_language_model(folder: Path, model_config: dict[str, Any]) -> Any:
    """Load the GPT model of a checkpoint in one process, without parts that a method added, such as a reward head."""
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
    from nemo_aligner.utils.utils import load_from_nemo

    trainer, config = make_trainer(model_config)
    return load_from_nemo(MegatronGPTModel, config, trainer, strict=True, restore_path=str(folder))


def start_processes(trainer: Any) -> None:
    """Start torch.distributed and Megatron's groups as Lightning does."""
    if trainer.strategy.launcher is not None:
        trainer.strategy.launcher.launch(lambda: None, trainer=trainer)
    trainer.strategy.setup_environment()


def save_nemo(model: Any, out: Path) -> None:
    """Write a NeMo checkpoint as a folder (an unpacked .nemo file); all ranks must call this."""
    from nemo.utils.callbacks.dist_ckpt_io import DistributedCheckpointIO

    partial = out.with_name(out.name + ".partial")
    if is_main():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    torch.distributed.barrier()
    writer = DistributedCheckpointIO.from_config(model.cfg, async_save=False)
    writer.save_checkpoint(model.sharded_state_dict(), str(partial / WEIGHTS_DIR))
    if is_main():
        with open_dict(model.cfg):
            model.cfg.pop("optim", None)
        OmegaConf.save(model.cfg, partial / CONFIG_FILE, resolve=True)
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    torch.distributed.barrier()


def file_name(parameter: str) -> str:
    """Return the name of a parameter in the files: that of layers without Transformer Engine."""
    name = parameter.removeprefix("module.")
    for inside, outside in NORMS_INSIDE.items():
        name = name.replace(inside, outside)
    return name


@torch.no_grad()
def copy_padded(parameter: torch.Tensor, tensor: torch.Tensor) -> None:
    """Copy a tensor; set the rows of a padded vocabulary to zero."""
    parameter[: len(tensor)].copy_(tensor)
    parameter[len(tensor) :].zero_()
