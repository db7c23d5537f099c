"""Hugging Face config.json <-> ModelShape, for every supported family. No torch, no transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nemo_minitron.errors import CheckpointError, shortened
from nemo_minitron.families.rope import Rope, read_rope, rope_keys
from nemo_minitron.families.shape import ModelShape
from nemo_minitron.families.values import positive, size, switch
from nemo_minitron.system.shown import shown, shown_name

FAMILIES: dict[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "NemotronForCausalLM": "nemotron",
}
"""Architecture in config.json -> family. A new family is one line here and its switches below."""

_SPELLINGS = {"swish": "silu"}
"""Other names under which transformers knows an activation."""
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
    "qwen2": (),
    "qwen3": ("attention_bias",),
    "nemotron": ("attention_bias", "mlp_bias"),
}
"""Features that the family's code in transformers has and the axis table has not."""
_SLIDES_BY_LAYER = ("qwen2", "qwen3")
_FULL = "full_attention"
_WRAPPED = ("text_config", "llm_config", "language_config", "thinker_config")
"""Where multimodal models keep the config of their language model."""
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_shape(config: Mapping[str, Any], *, where: str = "config.json") -> ModelShape:
    """The shape that a config.json describes; keys that it lacks are read as transformers reads them.

    Raises:
        CheckpointError: an architecture or a feature that is not supported, a missing or impossible size, values of
            the wrong type, or keys that contradict each other.
    """
    family = _family(config, where)
    filled = {**_DEFAULTS[family], **config}
    sizes = {key: size(filled.get(key), key, where) for key in _SIZES}
    rope = _read_rope(config, family, where)
    _refuse_unsupported(filled, family, where)
    _refuse_sliding_layers(filled, family, sizes["num_hidden_layers"], where)
    _require_token_ids(filled, where)
    shape = _shape(filled, sizes, family, rope, where)
    if shape.num_attention_heads % shape.num_query_groups:
        raise CheckpointError(
            f"num_attention_heads = {shape.num_attention_heads} is not a multiple of "
            f"num_key_value_heads = {shape.num_query_groups}.",
            where=where,
        )
    return shape


def explicit_config(config: Mapping[str, Any], *, where: str = "config.json") -> dict[str, Any]:
    """A config.json that leaves nothing to a reader: transformers 4 and 5 read this shape from it.

    Raises:
        CheckpointError: see `read_shape`.
    """
    shape = read_shape(config, where=where)
    return write_config({**_DEFAULTS[shape.family], **config}, shape)


def _family(config: Mapping[str, Any], where: str) -> str:
    """By `architectures`, or by `model_type` where that is missing; transformers goes by `model_type` alone."""
    wrapper = next((key for key in _WRAPPED if config.get(key)), None)
    if wrapper:
        raise CheckpointError(
            f"This is a multimodal model: the config of its language model is inside {wrapper}.",
            where=where,
            allowed=", ".join(sorted(FAMILIES)),
            next_step="Save the language model by itself with transformers, and give that folder.",
        )
    names, kind = config.get("architectures"), config.get("model_type")
    if not names and kind in FAMILIES.values():
        return str(kind)
    listed = names if isinstance(names, list) else [names]
    if len(listed) != 1 or not isinstance(listed[0], str) or listed[0] not in FAMILIES:
        said = ", ".join(shown_name(str(one)) for one in listed[:5]) if names else "(none)"
        raise CheckpointError(
            f"Architecture {said}{'' if kind is None else f' (model_type {shown(kind)})'} is not supported.",
            where=where,
            allowed=f"one of {', '.join(sorted(FAMILIES))}",
        )
    family = FAMILIES[listed[0]]
    if kind is not None and kind != family:
        raise CheckpointError(
            f"architectures says {listed[0]}, model_type says {shown(kind)}.",
            where=where,
            allowed=f"model_type {family!r} with this architecture",
            next_step="transformers goes by model_type, others by architectures. Correct the wrong one.",
        )
    return family


def _read_rope(config: Mapping[str, Any], family: str, where: str) -> Rope:
    defaults = _DEFAULTS[family]
    rope = read_rope(
        {"max_position_embeddings": defaults["max_position_embeddings"], **config},
        default_fraction=defaults["partial_rotary_factor"],
        llama3=family != "nemotron",
        where=where,
    )
    if family != "nemotron" and rope.fraction != 1.0:
        raise CheckpointError(
            f"partial_rotary_factor = {rope.fraction} is not supported for {family}.", where=where, allowed="1.0"
        )
    return rope


def _shape(config: Mapping[str, Any], sizes: Mapping[str, int], family: str, rope: Rope, where: str) -> ModelShape:
    heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
    eps = "norm_eps" if family == "nemotron" else "rms_norm_eps"
    return ModelShape(
        family=family,
        num_layers=sizes["num_hidden_layers"],
        hidden_size=hidden,
        ffn_hidden_size=sizes["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=_size_or(heads, config, "num_key_value_heads", where),
        kv_channels=_size_or(hidden // heads, config, "head_dim", where),
        vocab_size=sizes["vocab_size"],
        max_position_embeddings=size(config["max_position_embeddings"], "max_position_embeddings", where),
        tied_embeddings=switch(config.get("tie_word_embeddings"), "tie_word_embeddings", where),
        norm="layernorm1p" if family == "nemotron" else "rmsnorm",
        norm_eps=positive(config[eps], eps, where),
        activation="squared_relu" if family == "nemotron" else "swiglu",
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        rope_theta=rope.theta,
        rotary_fraction=rope.fraction,
        rope_scaling=rope.scaling,
        # Llama and Nemotron have none whatever the key says, Qwen only in layers that are refused.
        sliding_window_tokens=_window(config, where) if family == "mistral" else None,
    )


def _size_or(default: int, config: Mapping[str, Any], key: str, where: str) -> int:
    """A size; null means the default."""
    value = config.get(key)
    return size(default if value is None else value, key, where)


def _window(config: Mapping[str, Any], where: str) -> int | None:
    value = config.get("sliding_window")
    return None if value is None else size(value, "sliding_window", where)


def _refuse_unsupported(config: Mapping[str, Any], family: str, where: str) -> None:
    expected = {"hidden_act": _DEFAULTS[family]["hidden_act"], **dict.fromkeys(_SWITCHED_OFF[family], False)}
    for key, value in expected.items():
        found = config.get(key) if key == "hidden_act" else switch(config.get(key), key, where)
        if (_SPELLINGS.get(str(found), found)) != value:
            raise CheckpointError(
                f"{key} = {shown(found)} is not supported for {family}.", where=where, allowed=json.dumps(value)
            )
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise CheckpointError(
            f"The weights are quantized (quantization_config: {method or 'of an unnamed method'}).",
            where=where,
            next_step="Use the model's unquantized version: float32, bfloat16 or float16.",
        )


def _refuse_sliding_layers(config: Mapping[str, Any], family: str, num_layers: int, where: str) -> None:
    """Layers whose attention has a window of their own; `layer_types` goes before the older keys."""
    kinds = config.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list):
            raise CheckpointError(
                f"layer_types = {shown(kinds)} is not a list.", where=where, allowed=f"null, or a list of {_FULL}"
            )
        others = sorted({str(kind) for kind in kinds} - {_FULL})
        if others:
            raise CheckpointError(f"layer_types holds {shortened(', '.join(others))}.", where=where, allowed=_FULL)
        return
    if family not in _SLIDES_BY_LAYER or not switch(config.get("use_sliding_window"), "use_sliding_window", where):
        return
    first = config.get("max_window_layers")
    if config.get("sliding_window") is not None and (not isinstance(first, int) or first < num_layers):
        raise CheckpointError(
            f"use_sliding_window = True is not supported for {family} with max_window_layers = {first}.",
            where=where,
            allowed=f"false, or max_window_layers from {num_layers}",
        )


def _require_token_ids(config: Mapping[str, Any], where: str) -> None:
    for key in _TOKEN_IDS:
        value = config.get(key)
        ids = value if isinstance(value, list) and key == "eos_token_id" else [value]
        if value is not None and not all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
            raise CheckpointError(
                f"{key} = {shown(value)} is not a token id.",
                where=where,
                allowed="a whole number, null" + (", a list of whole numbers" if key == "eos_token_id" else ""),
            )


_NOT_OF_THE_MODEL = frozenset(
    {
        "auto_map",
        "custom_pipelines",
        "attn_implementation",
        "experts_implementation",
        "use_kernels",
        "compression_config",
    }
)
"""Keys that name code to fetch or a kernel to use, or describe how weights were stored. Keys that begin with _ are
internal to transformers: by `_attn_implementation_internal` its versions before 5.3 run code of the hub."""


def written_family(shape: ModelShape) -> str:
    """The family under which transformers loads a model of this shape.

    Since 5.8 its config of Llama refuses a hidden size that is no multiple of the heads, whatever `head_dim` says, and
    width pruning makes such models. Mistral's without a sliding window is the same network, and takes them.
    """
    is_refused = shape.family == "llama" and shape.hidden_size % shape.num_attention_heads
    return "mistral" if is_refused else shape.family


def write_config(config: Mapping[str, Any], shape: ModelShape) -> dict[str, Any]:
    """A copy of `config` with the sizes of `shape`; other keys stay, but for those by which transformers fetches code.

    `head_dim` is always explicit: after width pruning hidden_size / heads is not the head size. Rotary embeddings are
    written as transformers 4 and as transformers 5 read them. The family may be another: see `written_family`.
    """
    out = {key: value for key, value in config.items() if not key.startswith("_") and key not in _NOT_OF_THE_MODEL}
    family = written_family(shape)
    if family != shape.family:
        # What the two families fill in differently.
        out |= {"sliding_window": None, "max_position_embeddings": shape.max_position_embeddings}
    out.update(
        architectures=[name for name, known in FAMILIES.items() if known == family],
        model_type=family,
        num_hidden_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_query_groups,
        head_dim=shape.kv_channels,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=shape.tied_embeddings,
        hidden_act=_DEFAULTS[shape.family]["hidden_act"],
        **rope_keys(Rope(shape.rope_theta, shape.rotary_fraction, shape.rope_scaling)),
    )
    # null and {} mean that nothing is quantized, but only some readers know it.
    out.pop("quantization_config", None)
    if out.get("layer_types"):
        out["layer_types"] = [_FULL] * shape.num_layers
    if shape.family in _SLIDES_BY_LAYER and "use_sliding_window" in out:
        out["use_sliding_window"] = False
    if isinstance(out.get("max_window_layers"), int):
        out["max_window_layers"] = min(out["max_window_layers"], shape.num_layers)
    return out
