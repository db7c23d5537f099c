"""Conversion between config.json of Hugging Face and ModelShape, for each family. No torch, no transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nemo_minitron.errors import CheckpointError, shortened
from nemo_minitron.families.family import Family
from nemo_minitron.families.registry import FAMILIES, family_of
from nemo_minitron.families.rope import Rope, read_rope, rope_keys
from nemo_minitron.families.shape import ModelShape
from nemo_minitron.families.values import positive, size, switch
from nemo_minitron.system.shown import shown, shown_name

_SPELLINGS = {"swish": "silu"}
"""Other names under which transformers knows an activation."""
_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
_FULL = "full_attention"
_WRAPPED = ("text_config", "llm_config", "language_config", "thinker_config")
"""Keys under which multimodal models have the config of their language model."""
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_shape(config: Mapping[str, Any], *, where: str = "config.json") -> ModelShape:
    """Return the shape that a config.json describes; keys that it lacks are read as transformers reads them.

    Raises:
        CheckpointError: an architecture or a feature is not supported, a size is missing or impossible, a value has the
            wrong type, or keys contradict each other.
    """
    family = _family(config, where)
    filled = {**family.defaults, **config}
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
    """Return a config.json with all keys written out, so that transformers 4 and 5 read this shape from it.

    Raises:
        CheckpointError: see `read_shape`.
    """
    shape = read_shape(config, where=where)
    return write_config({**family_of(shape).defaults, **config}, shape)


def _family(config: Mapping[str, Any], where: str) -> Family:
    """Find the family by `architectures`, or by `model_type` if that is missing; transformers uses `model_type`."""
    by_architecture = {family.architecture: family for family in FAMILIES.values()}
    wrapper = next((key for key in _WRAPPED if config.get(key)), None)
    if wrapper:
        raise CheckpointError(
            f"This is a multimodal model: the config of its language model is inside {wrapper}.",
            where=where,
            allowed=", ".join(sorted(by_architecture)),
            next_step="Save the language model alone with transformers, and use that folder.",
        )
    names, kind = config.get("architectures"), config.get("model_type")
    if not names and isinstance(kind, str) and kind in FAMILIES:
        return FAMILIES[kind]
    listed = names if isinstance(names, list) else [names]
    if len(listed) != 1 or not isinstance(listed[0], str) or listed[0] not in by_architecture:
        found = ", ".join(shown_name(str(one)) for one in listed[:5]) if names else "(none)"
        raise CheckpointError(
            f"Architecture {found}{'' if kind is None else f' (model_type {shown(kind)})'} is not supported.",
            where=where,
            allowed=f"one of {', '.join(sorted(by_architecture))}",
        )
    family = by_architecture[listed[0]]
    if kind is not None and kind != family.name:
        raise CheckpointError(
            f"architectures is {listed[0]}, but model_type is {shown(kind)}.",
            where=where,
            allowed=f"model_type {family.name!r} with this architecture",
            next_step="transformers uses model_type, other programs use architectures. Correct the wrong one.",
        )
    return family


def _read_rope(config: Mapping[str, Any], family: Family, where: str) -> Rope:
    defaults = family.defaults
    rope = read_rope(
        {"max_position_embeddings": defaults["max_position_embeddings"], **config},
        default_fraction=defaults["partial_rotary_factor"],
        llama3=family.llama3_rope,
        where=where,
    )
    if rope.fraction != 1.0 and not family.partial_rotary:
        raise CheckpointError(
            f"partial_rotary_factor = {rope.fraction} is not supported for {family.name}.", where=where, allowed="1.0"
        )
    return rope


def _shape(config: Mapping[str, Any], sizes: Mapping[str, int], family: Family, rope: Rope, where: str) -> ModelShape:
    heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
    return ModelShape(
        family=family.name,
        num_layers=sizes["num_hidden_layers"],
        hidden_size=hidden,
        ffn_hidden_size=sizes["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=_size_or(heads, config, "num_key_value_heads", where),
        kv_channels=_size_or(hidden // heads, config, "head_dim", where),
        vocab_size=sizes["vocab_size"],
        max_position_embeddings=size(config["max_position_embeddings"], "max_position_embeddings", where),
        tied_embeddings=switch(config.get("tie_word_embeddings"), "tie_word_embeddings", where),
        norm=family.norm,
        norm_eps=positive(config[family.norm_eps_key], family.norm_eps_key, where),
        activation=family.activation,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        rope_theta=rope.theta,
        rotary_fraction=rope.fraction,
        rope_scaling=rope.scaling,
        sliding_window_tokens=_window(config, where) if family.sliding_window == "every_layer" else None,
    )


def _size_or(default: int, config: Mapping[str, Any], key: str, where: str) -> int:
    """Read a size; null means the default."""
    value = config.get(key)
    return size(default if value is None else value, key, where)


def _window(config: Mapping[str, Any], where: str) -> int | None:
    value = config.get("sliding_window")
    return None if value is None else size(value, "sliding_window", where)


def _refuse_unsupported(config: Mapping[str, Any], family: Family, where: str) -> None:
    expected = {"hidden_act": family.defaults["hidden_act"], **dict.fromkeys(family.must_be_off, False)}
    for key, value in expected.items():
        found = config.get(key) if key == "hidden_act" else switch(config.get(key), key, where)
        if (_SPELLINGS.get(str(found), found)) != value:
            raise CheckpointError(
                f"{key} = {shown(found)} is not supported for {family.name}.", where=where, allowed=json.dumps(value)
            )
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise CheckpointError(
            f"The weights are quantized (quantization_config: {method or 'of an unnamed method'}).",
            where=where,
            next_step="Use the unquantized version of the model: float32, bfloat16 or float16.",
        )


def _refuse_sliding_layers(config: Mapping[str, Any], family: Family, num_layers: int, where: str) -> None:
    """Refuse layers whose attention has a window of their own; `layer_types` takes precedence over the older keys."""
    kinds = config.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list):
            raise CheckpointError(
                f"layer_types = {shown(kinds)} is not a list.", where=where, allowed=f"null, or a list of {_FULL}"
            )
        others = sorted({str(kind) for kind in kinds} - {_FULL})
        if others:
            raise CheckpointError(f"layer_types contains {shortened(', '.join(others))}.", where=where, allowed=_FULL)
        return
    if family.sliding_window != "some_layers":
        return
    if not switch(config.get("use_sliding_window"), "use_sliding_window", where):
        return
    first = config.get("max_window_layers")
    if config.get("sliding_window") is not None and (not isinstance(first, int) or first < num_layers):
        raise CheckpointError(
            f"use_sliding_window = True is not supported for {family.name} with max_window_layers = {first}.",
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
internal to transformers: versions before 5.3 run code of the hub that `_attn_implementation_internal` names."""


def written_family(shape: ModelShape) -> Family:
    """Return the family under which transformers loads a model of this shape; see `Family.uneven_heads_as`."""
    own = family_of(shape)
    is_uneven = shape.hidden_size % shape.num_attention_heads
    return FAMILIES[own.uneven_heads_as] if own.uneven_heads_as is not None and is_uneven else own


def write_config(config: Mapping[str, Any], shape: ModelShape) -> dict[str, Any]:
    """Return a copy of `config` with the sizes of `shape`, without the keys that let transformers fetch code.

    `head_dim` is always explicit: after width pruning hidden_size / heads is not the head size. Rotary embeddings are
    written as transformers 4 and as transformers 5 read them. The family may differ: see `written_family`.
    """
    out = {key: value for key, value in config.items() if not key.startswith("_") and key not in _NOT_OF_THE_MODEL}
    family, own = written_family(shape), family_of(shape)
    if family is not own:
        # Keys whose defaults differ between the two families.
        out |= {"sliding_window": None, "max_position_embeddings": shape.max_position_embeddings}
    out.update(
        architectures=[family.architecture],
        model_type=family.name,
        num_hidden_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_query_groups,
        head_dim=shape.kv_channels,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=shape.tied_embeddings,
        hidden_act=own.defaults["hidden_act"],
        **rope_keys(Rope(shape.rope_theta, shape.rotary_fraction, shape.rope_scaling)),
    )
    # null and {} mean that nothing is quantized, but not all readers accept them.
    out.pop("quantization_config", None)
    if out.get("layer_types"):
        out["layer_types"] = [_FULL] * shape.num_layers
    if own.sliding_window == "some_layers" and "use_sliding_window" in out:
        out["use_sliding_window"] = False
    if isinstance(out.get("max_window_layers"), int):
        out["max_window_layers"] = min(out["max_window_layers"], shape.num_layers)
    return out
