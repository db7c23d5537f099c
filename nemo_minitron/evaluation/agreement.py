"""Comparison of transformers' logits with Megatron's, so that the measured model is the model that is trained."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_minitron import __version__
from nemo_minitron.artifacts.compared import LOGITS_FILE, file_state, read_record, write_record
from nemo_minitron.artifacts.manifest import installed_version
from nemo_minitron.artifacts.run_paths import COMPARED
from nemo_minitron.errors import MinitronError, NumericsError
from nemo_minitron.evaluation.generation import load_for_inference
from nemo_minitron.families import ModelShape, num_params
from nemo_minitron.hf.checkpoint import Checkpoint
from nemo_minitron.system.files import cache_dir

if TYPE_CHECKING:
    from nemo_minitron.backends.megatron.model.probe import Probe
    from nemo_minitron.backends.megatron.runtime.session import Session

LIMIT = 1e-3
"""Largest accepted difference of two logits, for logits whose standard deviation is between 1 and 10."""
POSITIONS = (*range(24), *range(240, 264), *range(2000, 2024))
"""Positions of the compared tokens. Distances of 2000 reveal a wrong rope base, and rope scaling that only changes
wavelengths above 8192 positions. Much larger distances would measure the fp32 rounding of the angles instead."""
LAYER_PARAMETERS = 2**25
"""Parameters of the compared layers, at most; at least two layers are compared. All layers share code and config."""
PROBE_VERSION = 1
"""Increase this to repeat comparisons that were made before."""


def load_compared(
    model_dir: Path, precision: str, device: str, *, memory: Path | None, session: Session | None = None
) -> Any:
    """Compare the logits of transformers and Megatron, and return the model in transformers, in eval mode.

    Args:
        memory: file with the comparisons that were made before; None: compare again, and record nothing.
        session: the open Megatron session of this process, if there is one.

    Raises:
        CheckpointError: the folder is not a complete, supported model.
        NumericsError: transformers and Megatron do not compute the same logits.
    """
    require_agreement(model_dir, memory, session)
    return load_for_inference(model_dir, precision, device)


def memory_of(model_dir: Path) -> Path | None:
    """Return the file that records a model's comparison: in the run that published it, else in the user's cache.

    Returns None if the user has no home folder; then the model is compared each time.
    """
    if (model_dir / "manifest.json").is_file():
        return model_dir.resolve().parent / COMPARED / LOGITS_FILE
    try:
        return cache_dir() / "compared" / LOGITS_FILE
    except (RuntimeError, MinitronError):
        return None


def require_agreement(model_dir: Path, memory: Path | None, session: Session | None = None) -> None:
    """Compare the logits of transformers and Megatron for this folder, once for each state of its files.

    Raises:
        NumericsError: the logits differ, or are not finite.
    """
    checkpoint = Checkpoint.open(model_dir)
    key, known = _identity(checkpoint), {} if memory is None else read_record(memory)
    if key in known:
        return
    known[key] = {"model": str(model_dir), **_compare(checkpoint, session)}
    if memory is not None:
        write_record(memory, known)


def _identity(checkpoint: Checkpoint) -> str:
    """Return a hash of the config, the weight files, and the versions of the code on both sides."""
    facts = {
        "probe": PROBE_VERSION,
        "versions": [__version__, *(installed_version(name) for name in ("torch", "transformers", "megatron-core"))],
        "config": checkpoint.config,
        "files": {str(file.resolve()): file_state(file) for file in checkpoint.files},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _compare(checkpoint: Checkpoint, session: Session | None) -> dict[str, float]:
    """Compare the logits and return {difference, limit}; raises as `require_agreement`."""
    from nemo_minitron.backends.megatron.model.probe import run_probe

    probe = make_probe(checkpoint.shape)
    model = load_for_inference(checkpoint.path, "fp32", "cpu", num_layers=probe.num_layers)
    found = transformers_logits(model, probe)
    expected = run_probe(checkpoint.path, probe, session)
    difference = float((found - expected.logits).abs().max())
    limit = accepted_difference(expected.logits)
    differs = different_readings(model, checkpoint.shape, expected.rope_frequencies)
    if difference <= limit and not differs:
        return {"difference": difference, "limit": limit}
    if not bool(expected.logits.isfinite().all()):
        raise NumericsError(
            "The model's logits are not finite.",
            where=str(checkpoint.path),
            next_step="The weights contain NaN or infinite values. Use the last checkpoint before the loss diverged.",
        )
    reading = "; ".join(differs) or "Both read the same values from config.json"
    raise NumericsError(
        "transformers and Megatron do not compute the same logits for this model, so the measured model would differ "
        f"from the trained one: the logits differ by up to {difference:.3g}. {reading}.",
        where=str(checkpoint.path),
        allowed=f"a difference of at most {limit:.3g}",
        next_step="Correct config.json, or install another version of transformers (here: "
        f"{installed_version('transformers')}) or of megatron-core (here: {installed_version('megatron-core')}).",
    )


def make_probe(shape: ModelShape) -> Probe:
    """Return a probe with token ids from the whole vocabulary, including the first and the last one."""
    from nemo_minitron.backends.megatron.model.probe import Probe

    # The probe is no longer than a sliding window, beyond which Megatron does not attend.
    size = min(len(POSITIONS), shape.sliding_window_tokens or len(POSITIONS))
    tokens = [(number * 7919 + number * number * 31) % shape.vocab_size for number in range(size)]
    tokens[-1] = shape.vocab_size - 1
    per_layer = num_params(shape.resized(num_layers=2)) - num_params(shape.resized(num_layers=1))
    return Probe(tuple(tokens), POSITIONS[:size], min(shape.num_layers, max(2, LAYER_PARAMETERS // per_layer)))


@torch.inference_mode()
def transformers_logits(model: Any, probe: Probe) -> Tensor:
    """Return the logits of the probe, [tokens, vocabulary]."""
    ids, positions = torch.tensor([probe.tokens]), torch.tensor([probe.positions])
    # Without a mask, transformers treats gaps between positions as the boundaries of packed texts.
    mask = torch.ones_like(ids)
    logits: Tensor = model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
    return logits[0]


def accepted_difference(logits: Tensor) -> float:
    """Return the largest accepted difference: LIMIT, scaled for logits with a small or large standard deviation.

    A loss changes by as much as its logits, so the limit is absolute for logits of trained models. It grows with a
    standard deviation above 10, as the fp32 rounding error does, and shrinks with one below 1, where LIMIT would hide
    any difference.
    """
    spread = float(logits.std())
    return LIMIT * min(spread, max(1.0, spread / 10))


def different_readings(model: Any, shape: ModelShape, rope_frequencies: Tensor) -> list[str]:
    """Return the settings of transformers' model that differ from the shape that Megatron is built from."""
    inner = model.base_model
    attention, norm = inner.layers[0].self_attn, inner.norm
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    activation = "silu" if shape.gated else "relu2"
    pairs = {
        "head_dim": (attention.head_dim, shape.kv_channels),
        "norm eps": (getattr(norm, "variance_epsilon", getattr(norm, "eps", None)), shape.norm_eps),
        "hidden_act": (model.config.hidden_act, activation),
        "tie_word_embeddings": (is_tied, shape.tied_embeddings),
        "sliding_window": (getattr(model.config, "sliding_window", None), shape.sliding_window_tokens),
    }
    out = [
        f"{name}: {found} in transformers, {ours} in Megatron" for name, (found, ours) in pairs.items() if found != ours
    ]
    return [*_different_rope(inner.rotary_emb.inv_freq.float().cpu(), rope_frequencies), *out]


def _different_rope(found: Tensor, expected: Tensor) -> list[str]:
    if found.shape != expected.shape:
        return [f"rotated channels: {2 * len(found)} in transformers, {2 * len(expected)} in Megatron"]
    if torch.allclose(found, expected, rtol=1e-5):
        return []
    bases = [_rope_base(frequencies) for frequencies in (found, expected)]
    if abs(bases[0] / bases[1] - 1) > 1e-3:
        return [f"rope_theta: {bases[0]:.6g} in transformers, {bases[1]:.6g} in Megatron"]
    return ["rope scaling: transformers and Megatron scale the frequencies differently"]


def _rope_base(frequencies: Tensor) -> float:
    """Return the rope base, computed from the second frequency, which no supported scaling changes."""
    return float(frequencies[1].double() ** -len(frequencies)) if len(frequencies) > 1 else 1.0
