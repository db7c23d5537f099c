"""Comparison of our config keys with the configs that the NeMo-Aligner of a container ships."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from nemo_minitron.errors import EnvironmentProblem

HOME_VARIABLE, HOME = "NEMO_ALIGNER_HOME", "/opt/NeMo-Aligner"
"""Variable and default for the folder of NeMo-Aligner's repository; its wheel has neither scripts nor configs."""
GPT = "examples/nlp/gpt/conf"
SHIPPED = {
    "sft": f"{GPT}/gpt_sft.yaml",
    "dpo": f"{GPT}/gpt_dpo.yaml",
    "reward_model": f"{GPT}/training_rm.yaml",
    "topk_logits": "examples/nlp/synthetic_data_gen/conf/compute_topk_logits.yaml",
    "knowledge_distillation": f"{GPT}/gpt_knowledge_distillation.yaml",
    "steerlm2": f"{GPT}/gpt_sft.yaml",
    "reinforce": f"{GPT}/gpt_reinforce_actor.yaml",
    "ppo": f"{GPT}/gpt_ppo_actor.yaml",
    "critic": f"{GPT}/gpt_ppo_critic.yaml",
    "ppo_actor": f"{GPT}/gpt_ppo_actor.yaml",
    "ppo_critic": f"{GPT}/gpt_ppo_critic.yaml",
    "reinforce_actor": f"{GPT}/gpt_reinforce_actor.yaml",
    "reward_server": f"{GPT}/inference_rm.yaml",
}
"""Method -> its config file in NeMo-Aligner 0.7.0."""
ADDED = frozenset(
    {
        "name",
        "trainer.enable_progress_bar",
        "trainer.rm.limit_train_batches",
        "exp_manager.log_tflops_per_sec_per_gpu",
        "exp_manager.checkpoint_callback_params.always_save_nemo",
        "exp_manager.checkpoint_callback_params.save_best_model",
        *(
            f"model.{key}"
            for key in (
                "activations_checkpoint_granularity",
                "activations_checkpoint_method",
                "activations_checkpoint_num_layers",
                "data.append_eod",
                "data.apply_ftfy",
                "data.eod_mask_loss",
                "data.reset_attention_mask",
                "data.reset_position_ids",
                "data.validation_drop_last",
                "dist_ckpt_load_strictness",
                "encoder_seq_length",
                "gradient_as_bucket_view",
                "loss_func",
                "loss_mask_val",
                "mcore_gpt",
                "megatron_amp_O2",
                "pipeline_model_parallel_size",
                "ppo.trt_model_dir",
                "seed",
                "sequence_parallel",
                "share_embeddings_and_output_weights",
                "tensor_model_parallel_size",
                "tokenizer.type",
                "transformer_engine",
                "use_cpu_initialization",
            )
        ),
        *(
            f"model.data.{part}.{key}"
            for part in ("train_ds", "validation_ds")
            for key in ("packed_sequence", "packed_sequence_return_cu_seqlen", "pad_to_max_length")
        ),
        "model.data.train_ds.output_original_text",
    }
)
"""Keys that NeMo-Aligner's code reads although some of its config files lack them; users add them with `++`."""


def aligner_home() -> Path:
    """Return the folder of NeMo-Aligner's repository in a container; it may not exist."""
    return Path(os.environ.get(HOME_VARIABLE) or HOME)


def require_shipped(method: str, keys: Iterable[str]) -> None:
    """In a container, check the keys of a config against the file that its NeMo-Aligner ships; elsewhere do nothing.

    Raises:
        EnvironmentProblem: NeMo-Aligner lacks some of the keys.
    """
    file = aligner_home() / SHIPPED[method]
    if not file.is_file():
        return
    unknown = unknown_keys(keys, shipped_keys(yaml.safe_load(file.read_text(encoding="utf-8"))))
    if unknown:
        raise EnvironmentProblem(
            f"The container's NeMo-Aligner does not have these keys: {', '.join(unknown)}.",
            where=str(file),
            allowed="NeMo-Aligner 0.7.0",
            next_step=f"Use a container with that version, or set {HOME_VARIABLE} to the folder of its code.",
        )


def unknown_keys(keys: Iterable[str], shipped: Iterable[str]) -> list[str]:
    """Return the dotted keys that are neither shipped nor in ADDED; a key may also name a whole shipped section."""
    known = {*shipped, *ADDED}
    sections = {key[:end] for key in known for end, sign in enumerate(key) if sign == "."}
    return sorted(key for key in keys if key not in known and key not in sections)


def shipped_keys(config: Mapping[str, Any]) -> set[str]:
    """Return the dotted keys of a shipped config; a section that refers to another one (`${a.b}`) has its keys."""
    return set(_keys(config, config, ""))


def _keys(section: Mapping[str, Any], whole: Mapping[str, Any], prefix: str) -> Iterable[str]:
    for key, value in section.items():
        inside = _referred(value, whole) if isinstance(value, str) else value
        if isinstance(inside, Mapping) and inside:
            yield from _keys(inside, whole, f"{prefix}{key}.")
        elif key != "defaults":
            yield f"{prefix}{key}"


def _referred(value: str, whole: Mapping[str, Any]) -> Any:
    """Return the value that an absolute reference names; None if `value` is not one."""
    if not (value.startswith("${") and value.endswith("}")) or ":" in value or value.startswith("${."):
        return None
    found: Any = whole
    for part in value[2:-1].split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found
