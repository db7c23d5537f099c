"""Complete configs for NeMo-Aligner: files of configs/align, with values from a stage and overrides from a recipe.

NeMo-Aligner silently ignores a misspelled key. Here every key must be in the complete config.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import yaml

from nemo_minitron.backends.alignment.nemo_aligner.shipped import require_shipped
from nemo_minitron.errors import ConfigError
from nemo_minitron.system.places import CONFIGS, shipped_dir

Method = Literal[
    "sft",
    "dpo",
    "reward_model",
    "topk_logits",
    "knowledge_distillation",
    "steerlm2",
    "reinforce",
    "ppo",
    "critic",
    "ppo_actor",
    "ppo_critic",
    "reinforce_actor",
    "reward_server",
]
"""Name of a file in configs/align."""
TRAINER_KEYS: dict[Method, str] = {
    "sft": "sft",
    "dpo": "dpo",
    "reward_model": "rm",
    "knowledge_distillation": "knowledge_distillation",
    "steerlm2": "sft",
    "reinforce": "reinforce",
    "ppo": "ppo",
    "critic": "ppo",
}
"""Section below `trainer` that a method's trainer reads, for the methods that entry/ runs."""
FILLED_BY: dict[Method, str] = dict.fromkeys(
    ("ppo_actor", "ppo_critic", "reinforce_actor", "reward_server"), "minitron rlhf"
)
"""What sets the missing values, for methods where this is not a stage."""
TO_FILL = "???"
DEAD_KEYS = {
    "model.dpo.preference_avg_log_probs": "model.dpo.preference_average_log_probs",
    "model.dpo.average_log_probs": "model.dpo.preference_average_log_probs",
    "model.dpo.sft_avg_log_probs": "model.dpo.sft_average_log_probs",
    "model.dpo.beta": "model.dpo.ref_policy_kl_penalty",
    "model.optim.sched.max_steps": "the stage's num_steps",
    "model.regression.loss_func": "model.loss_func",
    "model.regression.loss_mask_val": "model.loss_mask_val",
    "model.ppo.combine_rm_and_critic_server": "remote_critic_rm.combine_rm_and_critic_server",
    "trainer.ppo.trt_model_dir": "model.ppo.trt_model_dir",
    "trainer.reinforce.inference_micro_batch_size": "inference.inference_micro_batch_size",
    "inference.micro_batch_size": "inference.inference_micro_batch_size",
}
"""Keys that NeMo-Aligner 0.7 does not read although its documentation, its own configs or public recipes have them ->
the key to use."""
_LENGTH = "num_steps or num_epochs of the stage decides how long it trains"
_LORA = "LoRA is not supported, the stages train all weights"
_NAMES = "the stage's own servers have this name"
_TRT = "the stages generate without TensorRT-LLM"
_READ_BY_NOTHING: dict[str, str] = {
    "trainer.max_time": "no training loop of NeMo-Aligner reads it; limit the time of the job instead",
    "exp_manager.exp_dir": "the folder is set, and NeMo ignores this key then",
    "model.resume_from_checkpoint": "a stage resumes from its own checkpoints",
    "model.data.splits_string": "each part has a file of its own, and NeMo-Aligner ignores this key then",
}
"""Keys without an effect, here and in a container -> the reason."""
_READ_BY_NO_STAGE: dict[str, str] = {
    "model.peft.peft_scheme": _LORA,
    "model.peft.restore_from_path": _LORA,
    "model.answer_only_loss": "only the tokens of answers are trained",
    "model.data.sample": "each row is read once in an epoch",
    "model.data.train_ds.shuffle": "training rows come in random order",
    "model.data.validation_ds.shuffle": "held-out rows come in the order of their file",
    **{f"trainer.{key}.limit_train_batches": _LENGTH for key in ("sft", "dpo", "rm", "knowledge_distillation")},
    "remote_rm.reward_model.name": _NAMES,
    "remote_critic_rm.reward_model.name": _NAMES,
    **{f"remote_critic_rm.critic.name.{call}": _NAMES for call in ("train", "infer", "save")},
    "remote_critic_rm.combine_rm_and_critic_server": "the rewards have a server of their own",
    **{
        f"{part}.{key}.trt_llm.{name}": _TRT
        for part in ("trainer", "model")
        for key in ("reinforce", "ppo")
        for name in ("seed", "unload_engine_train")
    },
    "model.ppo.trt_model_dir": _TRT,
}
"""Keys that the scripts of entry/ cannot heed, although NeMo-Aligner's own scripts read some of them -> the reason."""
RANGES: dict[str, tuple[float, float]] = {
    "hidden_dropout": (0.0, 1.0),
    "attention_dropout": (0.0, 1.0),
    "ffn_dropout": (0.0, 1.0),
    "weight_decay": (0.0, 1.0),
    "gradient_clip_val": (0.0, float("inf")),
    "preference_loss_weight": (0.0, float("inf")),
    "sft_loss_weight": (0.0, float("inf")),
    "constant_steps": (0, float("inf")),
    "save_top_k": (0, float("inf")),
    "num_nodes": (1, float("inf")),
    "discount_factor": (0.0, 1.0),
    "gae_lambda": (0.0, 1.0),
    "top_p": (0.0, 1.0),
    "top_k": (0, float("inf")),
    "repetition_penalty": (0.0, float("inf")),
    "ratio_eps": (0.0, 1.0),
    "loss_clip_val": (0.0, float("inf")),
    "entropy_bonus": (0.0, float("inf")),
    "critic_warmup_steps": (0, float("inf")),
    "max_queue_delay_microseconds": (0, float("inf")),
    "port": (1, 65535),
}
"""Last part of a key -> its smallest and largest value."""
NULLABLE = ("gradient_clip_val",)
"""Those of RANGES that may be null."""
LIMITS = ("limit_val_batches",)
"""Last part of keys with a number of batches, or a fraction of them; NeMo-Aligner fails if no batch is left."""
ON_CPU: dict[str, Any] = {
    "trainer.accelerator": "cpu",
    "trainer.precision": 32,
    "model.megatron_amp_O2": False,
    "model.transformer_engine": False,
    "model.use_cpu_initialization": True,
    "model.gradient_as_bucket_view": True,
    "model.optim.name": "adamw",
}
"""Keys and values that trainings without CUDA and Apex need."""
OF_FUSED_ADAM = ("bucket_cap_mb", "overlap_grad_sync", "overlap_param_sync", "contiguous_grad_buffer")
"""Keys of `model.optim` that only distributed_fused_adam accepts."""


def base_config(method: Method) -> dict[str, Any]:
    """Return the config of a method from configs/align, without the values that a stage sets."""
    config: dict[str, Any] = yaml.safe_load(config_file(method).read_text(encoding="utf-8"))
    return config


def config_file(method: Method) -> Path:
    """Return the config file of a method in this package; overrides of a recipe are checked against it."""
    return shipped_dir(CONFIGS) / "align" / f"{method}.yaml"


def override_problems(method: Method, overrides: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the NeMo-Aligner keys of a recipe, one line each."""
    base = flat(base_config(method))
    for key, value in flat(overrides).items():
        if key in DEAD_KEYS:
            yield f"{key}: NeMo-Aligner does not read this key. Use {DEAD_KEYS[key]}."
        elif key not in base:
            near = difflib.get_close_matches(key, base, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]}?" if near else ""
            yield f"{key}: unknown to NeMo-Aligner's {method}.{hint} All keys: {config_file(method)}."
        elif base[key] == TO_FILL:
            yield f"{key}: set by {FILLED_BY.get(method, 'the stage')} from its own keys; leave it out."
        elif key in (fixed := fixed_keys(method)):
            # 1 and 1.0 differ: a number of batches, and the fraction of them.
            if (type(value), value) != (type(base[key]), base[key]):
                yield f"{key} = {json.dumps(value)}: {fixed[key]}. Allowed: {json.dumps(base[key])}."
        else:
            yield from _value_problems(key, value, base[key])


def fixed_keys(method: Method) -> dict[str, str]:
    """Return the keys of a method that may only have the value of configs/align, with the reason."""
    found = _READ_BY_NOTHING if method in FILLED_BY else {**_READ_BY_NOTHING, **_READ_BY_NO_STAGE}
    return {key: found[key] for key in flat(base_config(method)) if key in found}


def _value_problems(key: str, value: Any, usual: Any) -> Iterator[str]:
    name = key.rpartition(".")[2]
    if value is None:
        if name in RANGES and name not in NULLABLE:
            yield f"{key} = null: NeMo-Aligner needs a number, such as {usual!r}."
        return
    number = isinstance(usual, int | float) and not isinstance(usual, bool)
    fits = isinstance(value, int | float) and not isinstance(value, bool) if number else isinstance(value, type(usual))
    if usual is not None and not fits:
        yield f"{key} = {value!r}: of another type than {usual!r}."
        return
    low, high = RANGES.get(name, (None, None))
    if low is not None and high is not None and not low <= value <= high:
        yield f"{key} = {value}: outside of [{low}, {high}]."
    if name in LIMITS and not value > 0:
        yield f"{key} = {value}: leaves no batch. Allowed: a number of batches from 1, or a fraction above 0.0."


def complete_config(
    method: Method, fill: Mapping[str, Any], overrides: Mapping[str, Any], *, on_cpu: bool, where: str
) -> dict[str, Any]:
    """Return the config for NeMo-Aligner.

    Args:
        fill: dotted key -> value, from the stage.
        overrides: nested, from the recipe.
        where: key of the stage, for error messages.

    Raises:
        ConfigError: a key that NeMo-Aligner does not know, or a value out of range.
        EnvironmentProblem: the container's NeMo-Aligner lacks keys of the config.
    """
    for problem in override_problems(method, overrides):
        raise ConfigError(problem, where=f"{where}.aligner")
    config = base_config(method)
    known = flat(config)
    require_shipped(method, known)
    values = {**fill, **flat(overrides)}
    if on_cpu:
        values |= {key: value for key, value in ON_CPU.items() if key in known}
    unknown = [key for key in values if key not in known]
    if unknown:
        raise AssertionError(f"not in {method}.yaml: {unknown}")
    for key, value in values.items():
        _set(config, key, value)
    optim = config["model"].get("optim", {})
    if optim.get("name") != "distributed_fused_adam":
        for key in OF_FUSED_ADAM:
            optim.pop(key, None)
    empty = [key for key, value in flat(config).items() if value == TO_FILL]
    if empty:
        raise AssertionError(f"no value for {empty} of {method}.yaml")
    return config


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value; lists and empty mappings are values."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = deepcopy(value)
    return out


def _set(config: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        config = config[part]
    config[last] = value
