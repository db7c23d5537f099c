"""Rotary embeddings in config.json, in the spellings of transformers 4 and 5.

transformers 4 reads `rope_theta`, `rope_scaling` and `partial_rotary_factor`; transformers 5 reads `rope_parameters`,
which has all three, or an object of them for each type of layer. Each version ignores the keys of the other, so a file
whose spellings disagree describes two models, and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_minitron.errors import CheckpointError, shortened
from nemo_minitron.families.shape import Llama3RopeScaling
from nemo_minitron.families.values import positive, table
from nemo_minitron.system.shown import shown

LLAMA3_CONSTANTS: dict[str, float | int] = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
DEFAULT_THETA = 10000.0
_LAYER_TYPE = "full_attention"
_TYPE_SUFFIX = "_attention"
_ORIGINAL_LENGTH = "original_max_position_embeddings"
_EXPECTED = "one value, the same in rope_parameters, rope_scaling and beside them"


@dataclass(frozen=True)
class Rope:
    """The rotary embeddings of a model."""

    theta: float
    fraction: float
    scaling: Llama3RopeScaling | None


def read_rope(config: Mapping[str, Any], *, default_fraction: float, llama3: bool, where: str) -> Rope:
    """Read the rotary embeddings that a config.json describes.

    Args:
        default_fraction: `partial_rotary_factor` if no spelling has it.
        llama3: whether the family's code in transformers supports the scaling of Llama 3.1.

    Raises:
        CheckpointError: a scaling is not supported, a value is not a number, or spellings disagree.
    """
    spellings = _spellings(config, where)
    theta = _agreed("rope_theta", [config, *spellings.values()], where)
    fraction = _agreed("partial_rotary_factor", [config, *spellings.values()], where)
    fraction = default_fraction if fraction is None else fraction
    if fraction > 1.0:
        raise CheckpointError(
            f"partial_rotary_factor = {fraction} is not supported.", where=where, allowed="a number above 0, at most 1"
        )
    scalings = {key: _scaling(found, key, config, llama3, where) for key, found in spellings.items()}
    if len(set(scalings.values())) > 1:
        raise CheckpointError(
            f"{' and '.join(scalings)} disagree: {' and '.join(map(_in_words, scalings.values()))}.",
            where=where,
            allowed="the same scaling in both, or one of the two keys",
            next_step="transformers 4 reads rope_scaling, transformers 5 rope_parameters. Remove the wrong one.",
        )
    return Rope(theta or DEFAULT_THETA, fraction, next(iter(scalings.values()), None))


def rope_keys(rope: Rope) -> dict[str, Any]:
    """Return the keys of config.json in both spellings, so that transformers 4 and 5 read the same model."""
    scaling: dict[str, Any] = {"rope_type": "default"}
    if rope.scaling is not None:
        scaling = {"rope_type": "llama3", "factor": rope.scaling.factor, **LLAMA3_CONSTANTS}
    both: dict[str, Any] = {"rope_theta": rope.theta}
    if rope.fraction != 1.0:
        both["partial_rotary_factor"] = rope.fraction
    return {
        "rope_theta": rope.theta,
        "partial_rotary_factor": rope.fraction,
        "rope_scaling": None if rope.scaling is None else scaling,
        "rope_parameters": {**scaling, **both},
    }


def _spellings(config: Mapping[str, Any], where: str) -> dict[str, Mapping[str, Any]]:
    """Return those of `rope_parameters` and `rope_scaling` that the config has."""
    found = {key: table(config.get(key), key, where) for key in ("rope_parameters", "rope_scaling")}
    return {key: _flat(value, key, config, where) for key, value in found.items() if value}


def _flat(found: Mapping[str, Any], key: str, config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return the object for layers with full attention, if there is one for each type of layer."""
    nested = {name: value for name, value in found.items() if isinstance(value, Mapping)}
    if not nested:
        return found
    # The types of the layers are checked elsewhere: all layers in layer_types have full attention.
    chosen = nested.get(_LAYER_TYPE, next(iter(nested.values())))
    unclear = not config.get("layer_types") and any(value != chosen for value in nested.values())
    if len(nested) < len(found) or not all(name.endswith(_TYPE_SUFFIX) for name in nested) or unclear:
        raise CheckpointError(
            f"{key} contains {shortened(', '.join(found))}.",
            where=where,
            allowed=f"the same for all layers, or {_LAYER_TYPE} and layer_types that name no other type",
        )
    return table(chosen, key, where)


def _agreed(key: str, places: list[Mapping[str, Any]], where: str) -> float | None:
    """Return the value of a key that may be in several places.

    Raises:
        CheckpointError: the values differ.
    """
    values = [positive(place[key], key, where) for place in places if place.get(key) is not None]
    if len(set(values)) > 1:
        raise CheckpointError(
            f"{key} is {' and '.join(map(str, dict.fromkeys(values)))}.",
            where=where,
            allowed=_EXPECTED,
            next_step="transformers 4 reads the key at the top, transformers 5 rope_parameters. Remove the wrong one.",
        )
    return values[0] if values else None


def _scaling(
    found: Mapping[str, Any], key: str, config: Mapping[str, Any], llama3: bool, where: str
) -> Llama3RopeScaling | None:
    kinds = {str(found[name]) for name in ("rope_type", "type") if found.get(name) is not None} or {"default"}
    if len(kinds) > 1:
        raise CheckpointError(
            f"{key} has two types: {' and '.join(sorted(kinds))}.", where=where, allowed="one of them"
        )
    kind = kinds.pop()
    if (
        kind == "linear"
        and found.get("factor") is not None
        and positive(found["factor"], f"{key}.factor", where) == 1.0
    ):
        return None
    if kind == "default":
        if found.get("factor") is not None and positive(found["factor"], f"{key}.factor", where) != 1.0:
            raise CheckpointError(f"{key} has a factor, {shown(found['factor'])}, and no rope_type.", where=where)
        return None
    if kind != "llama3" or not llama3:
        raise CheckpointError(
            f"rope_type {shown(kind)} is not supported for this family.",
            where=f"{where}, key {key}",
            allowed="default, llama3" if llama3 else "default",
        )
    if found.get("factor") is None:
        raise CheckpointError(f"{key} has no factor.", where=where, allowed="a number from 1")
    _require_constants(found, key, config, where)
    return Llama3RopeScaling(factor=positive(found["factor"], f"{key}.factor", where))


def _require_constants(found: Mapping[str, Any], key: str, config: Mapping[str, Any], where: str) -> None:
    """Require the three other numbers of Llama 3.1's scaling."""
    given = {name: found[name] for name in LLAMA3_CONSTANTS if found.get(name) is not None}
    # transformers 5 prefers an original length outside the scaling; without any, it takes the length of the model.
    length = config.get(_ORIGINAL_LENGTH) or given.get(_ORIGINAL_LENGTH, config.get("max_position_embeddings"))
    for name, value in {**given, _ORIGINAL_LENGTH: length}.items():
        if value != LLAMA3_CONSTANTS[name]:
            raise CheckpointError(
                f"{key}.{name} = {shown(value)} is not supported.", where=where, allowed=str(LLAMA3_CONSTANTS[name])
            )


def _in_words(scaling: Llama3RopeScaling | None) -> str:
    return "none" if scaling is None else f"llama3 with factor {scaling.factor}"
