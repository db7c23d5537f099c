"""Rotary embeddings of a GGUF file -> keys of config.json. What transformers would drop in silence is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from nemo_minitron.errors import CheckpointError
from nemo_minitron.families.rope import DEFAULT_THETA, LLAMA3_CONSTANTS
from nemo_minitron.hf.gguf_header import FROM_FOLDER, ROPE_FACTORS, Header

_FACTOR_KEYS = ("rope.scaling.factor", "rope.scale_linear")
"""llama.cpp takes the first that is there; the second is the name that it had in 2023."""


def rope_config(header: Header) -> dict[str, Any]:
    """Keys of config.json that describe the rotary embeddings and that transformers does not read from GGUF.

    Raises:
        CheckpointError: a scaling other than Llama 3.1's, or one that turns only a part of a Llama or Qwen head.
    """
    _refuse_scaling(header)
    config: dict[str, Any] = dict(_partial_rotary(header))
    if header.rope_factors is not None and max(header.rope_factors, default=1.0) != 1.0:
        config["rope_scaling"] = _llama3_rope(header, header.rope_factors)
    return config


def _refuse_scaling(header: Header) -> None:
    """llama.cpp scales linearly where a factor has no type, and not at all where the factor is 0 or 1."""
    found = {key: header.number(key) for key in _FACTOR_KEYS if header.number(key) is not None}
    key, factor = next(iter(found.items()), (_FACTOR_KEYS[0], None))
    kind = header.of_architecture("rope.scaling.type")
    if kind == "none" or (kind in (None, "linear") and factor in (None, 0.0, 1.0)):
        return
    said = f"'linear' ({header.architecture}.{key} = {factor:g})" if kind in (None, "linear") else repr(kind)
    raise CheckpointError(
        f"Rope scaling {said} is not supported.", where=str(header.file), allowed="none, or Llama 3.1's"
    )


def _partial_rotary(header: Header) -> Iterator[tuple[str, float]]:
    """The share of a head's channels that are turned; without a key all of them are."""
    width, heads = header.number("embedding_length"), header.number("attention.head_count")
    head_dim = header.number("attention.key_length") or (width / heads if width and heads else None)
    turned = header.number("rope.dimension_count") or head_dim
    if not head_dim or not turned:
        return
    if header.architecture == "nemotron":
        yield "partial_rotary_factor", turned / head_dim
    elif turned != head_dim:
        raise CheckpointError(
            f"{header.architecture}.rope.dimension_count = {turned:g} of {head_dim:g} channels is not supported.",
            where=str(header.file),
            allowed=f"{head_dim:g}: rotary embeddings over the whole head",
        )


def _llama3_rope(header: Header, factors: tuple[float, ...]) -> dict[str, Any]:
    """The rope_scaling whose factors these are.

    Raises:
        CheckpointError: no Llama 3.1 scaling gives these factors.
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
    """By how much Llama 3.1 slows each rotary frequency down (Llama 3.1's published code).

    Wavelengths below 8192 / 4 tokens stay, those above 8192 / 1 are stretched by `factor`, in between is blended.
    """
    original = float(LLAMA3_CONSTANTS["original_max_position_embeddings"])
    out = []
    for index in range(num_frequencies):
        wavelength = 2 * math.pi * theta ** (index / num_frequencies)
        smooth = min(max((original / wavelength - 1.0) / (4.0 - 1.0), 0.0), 1.0)
        out.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return out
