"""Model card: the README.md of an exported model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from nemo_minitron import __version__
from nemo_minitron.families.axes import FFN
from nemo_minitron.families.shape import SIZE_AXES
from nemo_minitron.report.comparison import ordered
from nemo_minitron.report.text import code, mebibytes, millions, plain, table

_LICENSE_NOTE = (
    "The weights derive from the teacher's, so the teacher's license and its conditions apply to them: attribution, and"
    " naming and use policies if the license has them. The training text has licenses of its own."
)
_LLAMA_NOTE = (
    ' The Llama licenses require that derived models are named "Llama-...", display "Built with Llama", and include a'
    " copy of the license and its notice."
)
_SIZES = {axis.target_key: "MLP size" if axis is FFN else axis.title for axis in SIZE_AXES}


def render_card(
    title: str,
    *,
    facts: Mapping[str, Any],
    teacher: Mapping[str, Any],
    model: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
) -> str:
    """Render the model card: YAML header, lineage, sizes, results, usage, license.

    Args:
        facts: facts of the exported model (`hf.checkpoint.model_facts`).
        teacher: result of the teacher's stage.
        model: result of the stage that made the model.
        metrics: metrics.json of each evaluated model.
    """
    source = str(teacher.get("source") or "the teacher")
    by_label = {str(found["label"]): found for found in metrics}
    metrics = [by_label[label] for label in ordered(by_label)]
    sections = [
        f"# {plain(title)}",
        _summary(facts, teacher, source, distilled="tokens" in model),
        "## Lineage\n\n" + _lineage(facts, teacher, model, source),
        "## Sizes\n\n" + _sizes(facts, teacher),
        *(["## Results\n\n" + _results(metrics)] if metrics else []),
        _USE,
        *(["## Training data\n\n" + _training_data(model)] if "tokens" in model else []),
        "## License\n\n" + _license(teacher.get("license")),
    ]
    header = yaml.safe_dump(_header(teacher, source, distilled="tokens" in model), sort_keys=False, allow_unicode=True)
    return f"---\n{header}---\n\n" + "\n\n".join(sections) + "\n"


_USE = """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this folder
model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(path)
ids = tokenizer("The water cycle begins when", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=32)[0]))
```

It has the weaknesses of its teacher, and more: evaluate it on your own task before you rely on it."""


def _header(teacher: Mapping[str, Any], source: str, *, distilled: bool) -> dict[str, Any]:
    header: dict[str, Any] = {"license": teacher.get("license") or "other", "library_name": "transformers"}
    if source.startswith("hf:"):
        header["base_model"] = source.removeprefix("hf:")
    header["pipeline_tag"] = "text-generation"
    header["tags"] = ["nemo-minitron", "minitron", "pruned", *(["distilled"] if distilled else [])]
    return header


def _summary(facts: Mapping[str, Any], teacher: Mapping[str, Any], source: str, *, distilled: bool) -> str:
    share = facts["num_params"] / teacher["num_params"]
    how = "Pruned, then distilled from its teacher" if distilled else "Pruned, not trained after that,"
    return (
        f"{facts['num_params']:,} parameters, {share:.0%} of its teacher, {code(source)} ({teacher['num_params']:,})."
        f" {how} with nemo-minitron {__version__}, after NVIDIA's Minitron"
        " ([2407.14679](https://arxiv.org/abs/2407.14679), [2408.11796](https://arxiv.org/abs/2408.11796))."
    )


def _lineage(facts: Mapping[str, Any], teacher: Mapping[str, Any], model: Mapping[str, Any], source: str) -> str:
    steps = [f"**Teacher** {code(source)}, {millions(teacher['num_params'])} parameters."]
    cuts = [f"{name} {old} → {new}" for name, old, new in _size_rows(facts, teacher) if old != new]
    left = f", {millions(facts['num_params'])} parameters left"
    steps.append(f"**Pruned**: {', '.join(cuts) or 'nothing'}{left}.")
    if "tokens" in model:
        steps.append(f"**Distilled**: {_distillation(model)}")
    stored = f", {mebibytes(facts['checkpoint_bytes'])} MiB of weights" if "checkpoint_bytes" in facts else ""
    steps.append(f"**Stored** as {plain(str(facts.get('dtype', 'it was')))}{stored}.")
    return "\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1))


def _distillation(model: Mapping[str, Any]) -> str:
    loss = plain(str(model.get("loss", "next-token cross entropy")))
    text = f"{loss}; {model['tokens']:,} tokens in {model['num_steps']:,} steps."
    losses = [model.get(key) for key in ("initial_valid_loss", "final_valid_loss", "final_valid_teacher_loss")]
    if None in losses:
        return text
    before, after, best = losses
    return f"{text} Held-out loss {before:.3f} → {after:.3f} nats per token; the teacher's is {best:.3f}."


def _size_rows(facts: Mapping[str, Any], teacher: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    mine, theirs = facts["shape"], teacher.get("shape", {})
    return [(name, str(theirs.get(key, "")), str(mine[key])) for key, name in _SIZES.items() if key in mine]


def _sizes(facts: Mapping[str, Any], teacher: Mapping[str, Any]) -> str:
    total = ("parameters", f"{teacher['num_params']:,}", f"{facts['num_params']:,}")
    return table(["", "teacher", "this model"], [total, *_size_rows(facts, teacher)])


def _results(metrics: Sequence[Mapping[str, Any]]) -> str:
    tasks = list(dict.fromkeys(task for found in metrics for task in found["tasks"]))
    rows = [
        ["parameters", *(f"{found['num_params']:,}" for found in metrics)],
        ["bits per byte", *(f"{found['bits_per_byte']:.4f}" for found in metrics)],
        ["perplexity", *(f"{found['perplexity']:.2f}" for found in metrics)],
        *([plain(task), *(_score(found["tasks"].get(task, {})) for found in metrics)] for task in tasks),
    ]
    results = table(["", *(plain(str(found["label"])) for found in metrics)], rows)
    notes = ["Bits per byte and perplexity (per token) are on held-out documents of the training text."]
    if tasks:
        limit = next((found["tasks_limit"] for found in metrics if found.get("tasks_limit")), None)
        on = f", first {limit} examples of each task" if limit else ""
        notes.append(f"Tasks: lm-eval, zero-shot{on}; length-normalized accuracy if available, ± standard error.")
    return f"{results}\n\n{' '.join(notes)}"


def _score(scores: Mapping[str, float]) -> str:
    metric = "acc_norm" if "acc_norm" in scores else "acc"
    if metric not in scores:
        return ""
    error = scores.get(f"{metric}_stderr")
    return f"{scores[metric]:.3f}" + (f" ± {error:.3f}" if error is not None else "")


def _training_data(model: Mapping[str, Any]) -> str:
    sources = ", ".join(code(str(source)) for source in model.get("data_sources", []))
    return f"{sources or 'See the recipe of the run'}. No other text was used after the teacher's own training."


def _license(license_id: str | None) -> str:
    name = license_id or "Unknown: look it up at the teacher's source"
    llama = _LLAMA_NOTE if license_id and "llama" in license_id.lower() else ""
    return f"{plain(name)}. {_LICENSE_NOTE}{llama}"
