"""The transformers config of a model, made from the same reading of config.json that Megatron is built from.

Versions of transformers read one config.json in different ways: before 5.0, the rope base in `rope_parameters` is
silently ignored. The config is therefore made from the `ModelShape`, with names that every version knows, and no other
key of the folder reaches transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_minitron.errors import CheckpointError, shortened
from nemo_minitron.families import ModelShape, write_config
from nemo_minitron.families.registry import family_of
from nemo_minitron.hf.checkpoint import Checkpoint
from nemo_minitron.limits import CONFIG_BYTES, too_large

GENERATION_FILE = "generation_config.json"
_NEVER = ("attention_bias", "mlp_bias", "use_sliding_window")
"""Options of transformers' models that no supported model enables."""


def model_config(shape: ModelShape) -> Any:
    """Return transformers' config of a model of this shape."""
    from transformers import AutoConfig

    family = family_of(shape)
    keys = {
        "rope_scaling": None,
        **write_config({}, shape),
        "max_position_embeddings": shape.max_position_embeddings,
        family.norm_eps_key: shape.norm_eps,
        "partial_rotary_factor": shape.rotary_fraction,
        "sliding_window": shape.sliding_window_tokens,
        **dict.fromkeys(_NEVER, False),
        # With a padding id outside the vocabulary, the embeddings could not be built; nothing here needs one.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    return AutoConfig.for_model(**keys)


def generation_config(checkpoint: Checkpoint) -> Any:
    """Return a generation config with the end tokens only: no sampling, penalties, biases or forced tokens.

    Raises:
        CheckpointError: generation_config.json is damaged, or an end token is not a token id.
    """
    from transformers import GenerationConfig

    return GenerationConfig(eos_token_id=end_tokens(checkpoint))


def end_tokens(checkpoint: Checkpoint) -> int | list[int] | None:
    """Return `eos_token_id` of generation_config.json, or of config.json if that file lacks it.

    Raises:
        CheckpointError: as `generation_config`.
    """
    file = checkpoint.path / GENERATION_FILE
    content = _read(file) if file.is_file() else {}
    if "eos_token_id" not in content:
        file, content = checkpoint.path / "config.json", dict(checkpoint.config)
    found = content.get("eos_token_id")
    listed = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in listed):
        raise CheckpointError(
            f"eos_token_id = {found!r} is not a token id.",
            where=str(file),
            allowed="a whole number, a list of them, or null",
        )
    return found or None if isinstance(found, list) else found


def _read(file: Path) -> dict[str, Any]:
    try:
        content = too_large(file, CONFIG_BYTES) or json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        content = shortened(error)
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{file.name} is damaged: {content if isinstance(content, str) else 'it is not a JSON object'}",
            where=str(file),
            next_step="Copy the file again, or remove it: only its eos_token_id is read.",
        )
    return content
