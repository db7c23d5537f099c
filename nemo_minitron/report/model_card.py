"""README.md of an exported model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from nemo_minitron import __version__
from nemo_minitron.report.markdown import table

_LICENSE_NOTE = (
    "The weights derive from the teacher, so the teacher's licence and its conditions apply to them"
    " (attribution, and naming where the licence asks for it)."
)
_LLAMA_NOTE = ' The Llama licences ask that derived models carry "Llama" in their name and "Built with Llama".'


def render_card(
    title: str,
    *,
    facts: Mapping[str, Any],
    teacher: Mapping[str, Any],
    model: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
) -> str:
    """The model card: YAML header, lineage, sizes, results, how to load, licence.

    Args:
        facts: of the exported model (`hf.checkpoint.model_facts`).
        teacher: result of the teacher's stage.
        model: result of the stage that made the model.
        metrics: metrics.json of each evaluated model.
    """
    license_id = teacher.get("license")
    header = {
        "license": license_id or "other",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["minitron", "pruned", "distilled"],
    }
    source = str(teacher.get("source", "the teacher"))
    if source.startswith("hf:"):
        header["base_model"] = source.removeprefix("hf:")
    share = facts["num_params"] / teacher["num_params"]
    sections = [
        f"# {title}",
        f"{facts['num_params']:,} parameters, {share:.0%} of its teacher ({source}, {teacher['num_params']:,}). "
        f"Pruned by activation importance and distilled from the teacher with nemo-minitron {__version__}.",
        "## Sizes\n\n" + _sizes(facts, teacher),
        *_training(model),
        *(["## Results\n\n" + _results(metrics)] if metrics else []),
        "## Use\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto")\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH")\n```',
        "## Licence\n\n" + _license(license_id),
    ]
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n" + "\n\n".join(sections) + "\n"


def _sizes(facts: Mapping[str, Any], teacher: Mapping[str, Any]) -> str:
    mine, theirs = facts["shape"], teacher.get("shape", {})
    rows = [[key.replace("_", " "), str(theirs.get(key, "")), str(value)] for key, value in mine.items()]
    return table(["", "teacher", "this model"], rows)


def _training(model: Mapping[str, Any]) -> list[str]:
    if "tokens" not in model:
        return []
    text = (
        f"## Training\n\nForward KL to the live teacher's logits, no other loss: {model['tokens']:,} tokens in "
        f"{model['num_steps']:,} steps. Held-out loss {model['initial_valid_loss']:.3f} before, "
        f"{model['final_valid_loss']:.3f} after, {model['initial_valid_teacher_loss']:.3f} for the teacher "
        "(nats per token)."
    )
    return [text]


def _results(metrics: Sequence[Mapping[str, Any]]) -> str:
    tasks = list(dict.fromkeys(task for found in metrics for task in found["tasks"]))
    rows = [
        ["parameters", *(f"{found['num_params']:,}" for found in metrics)],
        ["bits per byte", *(f"{found['bits_per_byte']:.4f}" for found in metrics)],
        ["perplexity", *(f"{found['perplexity']:.2f}" for found in metrics)],
        *([task, *(_score(found["tasks"].get(task, {})) for found in metrics)] for task in tasks),
    ]
    return table(["", *(found["label"] for found in metrics)], rows)


def _score(scores: Mapping[str, float]) -> str:
    value = scores.get("acc_norm", scores.get("acc"))
    return "" if value is None else f"{value:.3f}"


def _license(license_id: str | None) -> str:
    name = license_id or "unknown: look it up at the source of the teacher"
    llama = _LLAMA_NOTE if license_id and "llama" in license_id else ""
    return f"{name}. {_LICENSE_NOTE}{llama}"
