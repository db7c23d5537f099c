"""Why the tensors of a file are not named as their architecture names them."""

from __future__ import annotations

from collections.abc import Collection

_WHOSE = {
    "_orig_mod.": "torch.compile",
    "module.": "torch's data parallel wrapper",
    "base_model.model.": "peft",
    "language_model.": "a multimodal model",
}


def misnamed(found: Collection[str], expected: Collection[str]) -> str | None:
    """What to do about names that differ from the expected ones in a way that is known; None: in another way.

    Args:
        found: names in the files.
        expected: names that the architecture has.
    """
    if any(".lora_A." in name or ".base_layer." in name for name in found):
        return "These are the weights of a model with an adapter inside (peft): merge them (merge_and_unload) and save."
    if any(name.endswith((".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv")) for name in found):
        return "The weights are quantized: use the model's unquantized version."
    if any(".experts." in name for name in found):
        return "This is a mixture of experts, which is not supported."
    if any(name.startswith(("model.language_model.", "model.visual.", "vision_tower.")) for name in found):
        return "These are the weights of a multimodal model: save its language model by itself, and give that folder."
    body = set(expected) - {"lm_head.weight"}
    first = min(body)
    prefix = next((name.removesuffix(first) for name in found if name.endswith(first)), "")
    if prefix and {name.removeprefix(prefix) for name in found} >= body:
        return (
            f"All names begin with {prefix!r}, as {_WHOSE.get(prefix, 'another program')} writes them: load the "
            "weights, take it off, and save them again."
        )
    if {f"model.{name}" for name in found} >= body:
        return (
            "The names lack 'model.': the model was saved without its head. Save it with transformers as "
            "AutoModelForCausalLM."
        )
    return None
