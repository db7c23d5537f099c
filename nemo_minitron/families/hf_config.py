"""Hugging Face config.json <-> ModelShape, for every supported family. No torch, no transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nemo_minitron.errors import CheckpointError
from nemo_minitron.families.shape import Llama3RopeScaling, ModelShape

FAMILIES: dict[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "NemotronForCausalLM": "nemotron",
}
"""Architecture in config.json -> family. A new family is one line here and its switches below."""

_LLAMA3_CONSTANTS = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_SWIGLU: dict[str, Any] = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "partial_rotary_factor": 1.0}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {**_SWIGLU, "max_position_embeddings": 2048},
    "mistral": {
        **_SWIGLU,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {**_SWIGLU, "max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {**_SWIGLU, "max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    "nemotron": {
        "hidden_act": "relu2",
        "norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 4096,
    },
}
"""What transformers' config classes fill in for a key that config.json lacks. The sizes must be there."""
_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
_SWITCHED_OFF: dict[str, tuple[str, ...]] = {
    "llama": ("attention_bias", "mlp_bias"),
    "mistral": (),
    "qwen2": ("use_sliding_window",),
    "qwen3": ("attention_bias", "use_sliding_window"),
    "nemotron": ("attention_bias", "mlp_bias"),
}
"""Features that the family's code in transformers has and the axis table has not."""


def read_shape(config: Mapping[str, Any], *, where: str = "config.json") -> ModelShape:
    """The shape that a config.json describes; keys that it lacks are read as transformers reads them.

    Raises:
        CheckpointError: an architecture or a feature that is not supported, a missing or impossible size.
    """
    family = _family(config, where)
    filled = {**_DEFAULTS[family], **config}
    sizes = {key: _size(filled.get(key), key, where) for key in _SIZES}
    _refuse_unsupported(filled, family, where)
    shape = _shape(filled, sizes, family, where)
    if shape.num_attention_heads % shape.num_query_groups:
        raise CheckpointError(
            f"num_attention_heads = {shape.num_attention_heads} is not a multiple of "
            f"num_key_value_heads = {shape.num_query_groups}.",
            where=where,
        )
    return shape


def explicit_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json in which keys that transformers fills in itself stand with their values."""
    shape = read_shape(config)
    return write_config({**_DEFAULTS[shape.family], **config}, shape)


def _family(config: Mapping[str, Any], where: str) -> str:
    names = config.get("architectures") or ["(none)"]
    if names[0] not in FAMILIES:
        raise CheckpointError(
            f"Architecture {names[0]} is not supported.", where=where, allowed=", ".join(sorted(FAMILIES))
        )
    return FAMILIES[names[0]]


def _size(value: Any, key: str, where: str) -> int:
    if value is None:
        raise CheckpointError(
            f"config.json has no key '{key}'.", where=where, next_step="Is this a complete Hugging Face model?"
        )
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{key} = {value!r} is not a size.", where=where, allowed="a whole number from 1")
    return value


def _shape(config: Mapping[str, Any], sizes: Mapping[str, int], family: str, where: str) -> ModelShape:
    heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
    rope = _rope(config)
    return ModelShape(
        family=family,
        num_layers=sizes["num_hidden_layers"],
        hidden_size=hidden,
        ffn_hidden_size=sizes["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=_size(config.get("num_key_value_heads") or heads, "num_key_value_heads", where),
        kv_channels=_size(config.get("head_dim") or hidden // heads, "head_dim", where),
        vocab_size=sizes["vocab_size"],
        max_position_embeddings=_size(config["max_position_embeddings"], "max_position_embeddings", where),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        norm="layernorm1p" if family == "nemotron" else "rmsnorm",
        norm_eps=float(config["norm_eps" if family == "nemotron" else "rms_norm_eps"]),
        activation="squared_relu" if family == "nemotron" else "swiglu",
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        rotary_fraction=float(rope.get("partial_rotary_factor") or config["partial_rotary_factor"]),
        rope_scaling=_rope_scaling(rope, family, where),
        # Llama and Nemotron have none whatever the key says, Qwen only with use_sliding_window, which is refused.
        sliding_window_tokens=config.get("sliding_window") if family == "mistral" else None,
    )


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    # transformers 4 writes rope_theta and rope_scaling, transformers 5 rope_parameters.
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _rope_scaling(rope: Mapping[str, Any], family: str, where: str) -> Llama3RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3" or family == "nemotron":
        allowed = "default" if family == "nemotron" else "default, llama3"
        raise CheckpointError(f"rope_type {kind!r} is not supported for {family}.", where=where, allowed=allowed)
    for key, value in _LLAMA3_CONSTANTS.items():
        if rope.get(key, value) != value:
            raise CheckpointError(
                f"rope_scaling.{key} = {rope[key]} is not supported.", where=where, allowed=f"{value}"
            )
    if not isinstance(rope.get("factor"), int | float):
        raise CheckpointError("rope_scaling has no factor.", where=where, allowed="a number from 1")
    return Llama3RopeScaling(factor=float(rope["factor"]))


def _refuse_unsupported(config: Mapping[str, Any], family: str, where: str) -> None:
    expected = {"hidden_act": _DEFAULTS[family]["hidden_act"], **dict.fromkeys(_SWITCHED_OFF[family], False)}
    if family != "nemotron":
        expected["partial_rotary_factor"] = 1.0
    for key, value in expected.items():
        found = config.get(key)
        if (found or False) != value:
            raise CheckpointError(
                f"{key} = {found!r} is not supported for {family}.", where=where, allowed=json.dumps(value)
            )
    if config.get("quantization_config"):
        raise CheckpointError(
            "The weights are quantized (quantization_config).",
            where=where,
            next_step="Use the model's unquantized version: float32, bfloat16 or float16.",
        )
    kinds = set(config.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        raise CheckpointError(
            f"layer_types holds {', '.join(sorted(map(str, kinds)))}.", where=where, allowed="full_attention"
        )


def write_config(config: Mapping[str, Any], shape: ModelShape) -> dict[str, Any]:
    """A copy of `config` with the sizes of `shape`; everything that is not a size stays.

    `head_dim` is always explicit: after width pruning hidden_size / heads is not the head size. A config of
    transformers 5 also gets the names of transformers 4 (rope_theta, rope_scaling), so that both read it alike.
    """
    out = {key: value for key, value in config.items() if key not in ("_name_or_path", "auto_map")}
    out.update(
        num_hidden_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_query_groups,
        head_dim=shape.kv_channels,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=shape.tied_embeddings,
        rope_theta=shape.rope_theta,
    )
    if shape.rope_scaling is not None:
        out["rope_scaling"] = {"rope_type": "llama3", "factor": shape.rope_scaling.factor, **_LLAMA3_CONSTANTS}
    if out.get("layer_types"):
        out["layer_types"] = list(out["layer_types"])[: shape.num_layers]
    if out.get("max_window_layers") is not None:
        out["max_window_layers"] = min(out["max_window_layers"], shape.num_layers)
    return out
