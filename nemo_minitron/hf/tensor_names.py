"""Diagnosis of tensor names that differ from those of the architecture."""

from __future__ import annotations

from collections.abc import Collection

_PREFIX_SOURCES = {
    "_orig_mod.": "torch.compile",
    "module.": "torch's data parallel wrapper",
    "base_model.model.": "peft",
    "language_model.": "a multimodal model",
}


def misnamed(found: Collection[str], expected: Collection[str]) -> str | None:
    """Return the advice for names that differ from the expected ones for a known reason; None: unknown reason.

    Args:
        found: names in the files.
        expected: names of the architecture.
    """
    if any(".lora_A." in name or ".base_layer." in name for name in found):
        return "The weights contain an unmerged adapter (peft): merge it (merge_and_unload) and save the model again."
    if any(name.endswith((".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv")) for name in found):
        return "The weights are quantized: use the model's unquantized version."
    if any(".experts." in name for name in found):
        return "The model is a mixture of experts, which is not supported."
    if any(name.startswith(("model.language_model.", "model.visual.", "vision_tower.")) for name in found):
        return "The weights are of a multimodal model: save its language model separately, and use that folder."
    body = set(expected) - {"lm_head.weight"}
    first = min(body)
    prefix = next((name.removesuffix(first) for name in found if name.endswith(first)), "")
    if prefix and {name.removeprefix(prefix) for name in found} >= body:
        return (
            f"All names begin with {prefix!r}, a prefix of {_PREFIX_SOURCES.get(prefix, 'another program')}: load the "
            "weights, remove the prefix, and save them again."
        )
    if {f"model.{name}" for name in found} >= body:
        return (
            "The names lack 'model.': the model was saved without its head. Save it with transformers as "
            "AutoModelForCausalLM."
        )
    return None
