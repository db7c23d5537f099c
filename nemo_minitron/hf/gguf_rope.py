"""Conversion of rotary embedding settings from GGUF to config.json. Unsupported settings are refused, not dropped."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from nemo_minitron.errors import CheckpointError
from nemo_minitron.families.rope import DEFAULT_THETA, LLAMA3_CONSTANTS
from nemo_minitron.hf.gguf_header import FROM_FOLDER, ROPE_FACTORS, Header

_FACTOR_KEYS = ("rope.scaling.factor", "rope.scale_linear")
"""GGUF keys of the scaling factor. llama.cpp uses the first that is present; the second is the name used until 2023."""


def rope_config(header: Header) -> dict[str, Any]:
    """Return the config.json keys of rope scaling and partial rotary embeddings, which transformers ignores in GGUF.

    Raises:
        CheckpointError: the scaling is not Llama 3.1's, or a Llama or Qwen head has partial rotary embeddings.
    """
    _refuse_scaling(header)
    config: dict[str, Any] = dict(_partial_rotary(header))
    if header.rope_factors is not None and max(header.rope_factors, default=1.0) != 1.0:
        config["rope_scaling"] = _llama3_rope(header, header.rope_factors)
    return config


def _refuse_scaling(header: Header) -> None:
    """Refuse rope scaling types. Like in llama.cpp, a factor without type means linear, and 0 or 1 mean no scaling."""
    found = {key: header.number(key) for key in _FACTOR_KEYS if header.number(key) is not None}
    key, factor = next(iter(found.items()), (_FACTOR_KEYS[0], None))
    kind = header.of_architecture("rope.scaling.type")
    if kind == "none" or (kind in (None, "linear") and factor in (None, 0.0, 1.0)):
        return
    found_kind = f"'linear' ({header.architecture}.{key} = {factor:g})" if kind in (None, "linear") else repr(kind)
    raise CheckpointError(
        f"Rope scaling {found_kind} is not supported.", where=str(header.file), allowed="none, or Llama 3.1's"
    )


def _partial_rotary(header: Header) -> Iterator[tuple[str, float]]:
    """Yield the config key for the fraction of a head's channels that are rotated; without a GGUF key all are."""
    width, heads = header.number("embedding_length"), header.number("attention.head_count")
    head_dim = header.number("attention.key_length") or (width / heads if width and heads else None)
    rotary_dim = header.number("rope.dimension_count") or head_dim
    if not head_dim or not rotary_dim:
        return
    if header.architecture == "nemotron":
        yield "partial_rotary_factor", rotary_dim / head_dim
    elif rotary_dim != head_dim:
        raise CheckpointError(
            f"{header.architecture}.rope.dimension_count = {rotary_dim:g} of {head_dim:g} channels is not supported.",
            where=str(header.file),
            allowed=f"{head_dim:g}: rotary embeddings over the whole head",
        )


def _llama3_rope(header: Header, factors: tuple[float, ...]) -> dict[str, Any]:
    """Return the `rope_scaling` of config.json that results in these factors.

    Raises:
        CheckpointError: no Llama 3.1 scaling results in these factors.
    """
    theta, factor = header.number("rope.freq_base") or DEFAULT_THETA, max(factors)
    sound = theta > 0.0 and np.isfinite(factors).all() and factor >= 1.0
    if not sound or not np.allclose(factors, llama3_factors(len(factors), theta, factor), rtol=1e-4):
        raise CheckpointError(
            "The rope scaling factors are not Llama 3.1's.",
            where=f"{header.file}, tensor {ROPE_FACTORS}",
            next_step=FROM_FOLDER,
        )
    return {"rope_type": "llama3", "factor": factor, **LLAMA3_CONSTANTS}


def llama3_factors(num_frequencies: int, theta: float, factor: float) -> list[float]:
    """Return the divisor of each rotary frequency in Llama 3.1 (Llama 3.1's published code).

    Wavelengths below 8192 / 4 tokens are unchanged, those above 8192 / 1 tokens are multiplied by `factor`, and the
    frequencies in between are interpolated.
    """
    original = float(LLAMA3_CONSTANTS["original_max_position_embeddings"])
    out = []
    for index in range(num_frequencies):
        wavelength = 2 * math.pi * theta ** (index / num_frequencies)
        smooth = min(max((original / wavelength - 1.0) / (4.0 - 1.0), 0.0), 1.0)
        out.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return out
