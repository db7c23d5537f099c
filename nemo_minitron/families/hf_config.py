"""Hugging Face config.json <-> ModelShape, for every supported family. No torch, no transformers."""

from __future__ import annotations

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


def read_shape(config: Mapping[str, Any], *, where: str = "config.json") -> ModelShape:
    """The shape that a config.json describes.

    Raises:
        CheckpointError: an architecture or a feature that is not supported, or a missing key.
    """
    family = _family(config, where)
    try:
        return _read(config, family, where)
    except KeyError as missing:
        raise CheckpointError(
            f"config.json has no key {missing}", where=where, next_step="Is this a complete Hugging Face model?"
        ) from None


def _family(config: Mapping[str, Any], where: str) -> str:
    names = config.get("architectures") or ["(none)"]
    if names[0] not in FAMILIES:
        raise CheckpointError(
            f"Architecture {names[0]} is not supported.", where=where, allowed=", ".join(sorted(FAMILIES))
        )
    return FAMILIES[names[0]]


def _read(config: Mapping[str, Any], family: str, where: str) -> ModelShape:
    heads = config["num_attention_heads"]
    rope = _rope(config)
    _refuse_unsupported(config, family, where)
    return ModelShape(
        family=family,
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads") or heads,
        kv_channels=config.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_position_embeddings"],
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        norm="layernorm1p" if family == "nemotron" else "rmsnorm",
        norm_eps=config["norm_eps" if family == "nemotron" else "rms_norm_eps"],
        activation="squared_relu" if family == "nemotron" else "swiglu",
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        rotary_fraction=float(rope.get("partial_rotary_factor", _rotary_fraction(config, family))),
        rope_scaling=_rope_scaling(rope, where),
        sliding_window_tokens=_sliding_window(config),
    )


def _rotary_fraction(config: Mapping[str, Any], family: str) -> float:
    # transformers' own default for Nemotron is 0.5; no other family here has partial rotary.
    return float(config.get("partial_rotary_factor", 0.5)) if family == "nemotron" else 1.0


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    # transformers 4 writes rope_scaling, transformers 5 rope_parameters.
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _rope_scaling(rope: Mapping[str, Any], where: str) -> Llama3RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise CheckpointError(f"rope_type {kind!r} is not supported.", where=where, allowed="default, llama3")
    for key, value in _LLAMA3_CONSTANTS.items():
        if rope.get(key, value) != value:
            raise CheckpointError(f"rope_scaling.{key} = {rope[key]} is not supported.", where=where, allowed=f"{value}")
    return Llama3RopeScaling(factor=float(rope["factor"]))


def _sliding_window(config: Mapping[str, Any]) -> int | None:
    # Qwen ships the key switched off.
    if config.get("use_sliding_window") is False:
        return None
    return config.get("sliding_window")


def _refuse_unsupported(config: Mapping[str, Any], family: str, where: str) -> None:
    activation = config.get("hidden_act", "relu2" if family == "nemotron" else "silu")
    expected = "relu2" if family == "nemotron" else "silu"
    if activation != expected:
        raise CheckpointError(f"hidden_act {activation!r} is not supported for {family}.", where=where, allowed=expected)
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if config.get(key):
            raise CheckpointError(f"{key} = true is not supported.", where=where, allowed="false")


def write_config(config: Mapping[str, Any], shape: ModelShape) -> dict[str, Any]:
    """A copy of `config` with the sizes of `shape`; everything that is not a size stays.

    `head_dim` is always explicit: after width pruning hidden_size / heads is not the head size.
    """
    out = dict(config)
    out.update(
        num_hidden_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_query_groups,
        head_dim=shape.kv_channels,
        vocab_size=shape.vocab_size,
    )
    if out.get("layer_types"):
        out["layer_types"] = list(out["layer_types"])[: shape.num_layers]
    if out.get("max_window_layers") is not None:
        out["max_window_layers"] = min(out["max_window_layers"], shape.num_layers)
    return out
