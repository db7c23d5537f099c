"""Folders of one tiny model whose config.json is spelled in many ways."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.tiny_models import FAMILY_CASES, tiny_model

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def save_spelled(folder: Path, model: Any, drop: Iterable[str] = (), keys: Mapping[str, Any] | None = None) -> Path:
    """Save the weights, and config.json without the keys of `drop` and with `keys`."""
    model.save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config = {key: value for key, value in config.items() if key not in drop}
    file.write_text(json.dumps({**config, **(keys or {})}))
    return folder


def rope_spellings(case: str) -> dict[str, dict[str, Any]]:
    """Return the spellings of the rope of a family case: name -> keys in place of `ROPE_KEYS`."""
    keys = FAMILY_CASES[case]
    theta = {"rope_theta": keys.get("rope_theta", 10000.0)}
    fraction = {"partial_rotary_factor": 0.5} if case == "nemotron" else {}
    kind = {"rope_type": "llama3", **LLAMA3} if "rope_scaling" in keys else {"rope_type": "default"}
    flat = {**kind, **theta, **fraction}
    out: dict[str, dict[str, Any]] = {
        "flat rope_parameters": {"rope_parameters": flat},
        "rope_parameters by layer type": {"rope_parameters": {"full_attention": flat}},
        "rope_parameters and null beside it": {"rope_parameters": flat, "rope_scaling": None},
        "rope_parameters without a type": {"rope_parameters": {**theta, **fraction}},
        "rope_theta": {**theta, **fraction},
        "rope_theta and rope_scaling null": {**theta, **fraction, "rope_scaling": None},
        "rope_scaling default": {**theta, **fraction, "rope_scaling": kind},
        "rope_scaling by `type`": {**theta, **fraction, "rope_scaling": {**kind, "type": kind["rope_type"]}},
        "rope_scaling by `type` alone": {
            **theta,
            **fraction,
            "rope_scaling": {"type": kind["rope_type"], **(LLAMA3 if "rope_scaling" in keys else {})},
        },
    }
    if "rope_scaling" in keys:
        silent = ("rope_parameters without a type", "rope_theta", "rope_theta and rope_scaling null")
        out = {name: spelling for name, spelling in out.items() if name not in silent}
    return out


ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")


@dataclass(frozen=True)
class Spelled:
    """A model made from plain arguments, and the keys of its folder."""

    case: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    keys: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> Any:
        """Return the model in transformers, and save it to `folder` in this spelling."""
        model = tiny_model(self.case, **self.arguments)
        save_spelled(folder, model, self.drop, self.keys)
        return model


def spelled_models() -> dict[str, Spelled]:
    """Return every family in every spelling."""
    out: dict[str, Spelled] = {}
    for case, config in FAMILY_CASES.items():
        for name, keys in rope_spellings(case).items():
            out[f"{case}: {name}"] = Spelled(case, {}, ROPE_KEYS, keys)
        if not config["model_type"].startswith("qwen"):
            out[f"{case}: head_dim that is not hidden / heads"] = Spelled(case, {"head_dim": 24})
        if "head_dim" not in config:
            out[f"{case}: no head_dim"] = Spelled(case, {}, ("head_dim",))
            out[f"{case}: head_dim null"] = Spelled(case, {}, (), {"head_dim": None})
        eps = "norm_eps" if case == "nemotron" else "rms_norm_eps"
        out[f"{case}: another norm eps"] = Spelled(case, {eps: 1e-2})
        out[f"{case}: keys without a meaning for it"] = Spelled(case, {}, (), MEANINGLESS)
    for window in (4096, 80):
        out[f"mistral: sliding_window {window}"] = Spelled("mistral", {"sliding_window": window})
    off = {"sliding_window": 8, "use_sliding_window": False, "max_window_layers": 0, "layer_types": None}
    for case in ("qwen2", "qwen3", "llama_mha"):
        out[f"{case}: sliding_window that is off"] = Spelled(case, {}, (), off)
    return out


MEANINGLESS: dict[str, Any] = {
    "attention_multiplier": 3.0,
    "logits_scaling": 7.0,
    "residual_multiplier": 0.5,
    "embedding_multiplier": 12.0,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 5.0,
    "return_dict": False,
    "output_hidden_states": True,
    "use_cache": False,
    "pretraining_tp": 4,
    "attention_dropout": 0.5,
    "_attn_implementation": "eager",
    "pad_token_id": -1,
    "torch_dtype": "bfloat16",
    "repetition_penalty": 5.0,
    "max_position_embeddings": 16,
}
"""Keys of other families, of training and of generation. Llama's code in transformers computes the same with them."""
