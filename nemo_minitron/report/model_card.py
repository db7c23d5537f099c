"""Model card: the README.md of an exported model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from nemo_minitron import __version__
from nemo_minitron.report.comparison import ordered, score_of, score_text, task_metrics
from nemo_minitron.report.lineage import Lineage
from nemo_minitron.report.lineage_steps import DISTILLED, PRUNED, Step, size_rows, steps_of
from nemo_minitron.report.text import code, mebibytes, millions, plain, table

_LICENSE_NOTE = (
    "The weights derive from the teacher's, so the teacher's license and its conditions apply to them: attribution, and"
    " naming and use policies if the license has them. The training text has licenses of its own."
)
_LLAMA_NOTE = (
    ' The Llama licenses require that derived models are named "Llama-...", display "Built with Llama", and include a'
    " copy of the license and its notice."
)


def render_card(
    title: str,
    *,
    facts: Mapping[str, Any],
    teacher: Mapping[str, Any],
    lineage: Lineage,
    metrics: Sequence[Mapping[str, Any]],
) -> str:
    """Render the model card: YAML header, lineage, sizes, results, usage, license.

    Args:
        facts: facts of the exported model (`hf.checkpoint.model_facts`).
        teacher: result of the teacher's stage.
        lineage: the stages that made the model.
        metrics: metrics.json of each evaluated model.
    """
    source = str(teacher.get("source") or "the teacher")
    by_label = {str(found["label"]): found for found in metrics}
    models = {label: by_label[label] for label in ordered(by_label)}
    steps = steps_of(lineage, teacher, facts)
    sections = [
        f"# {plain(title)}",
        _summary(facts, teacher, source, steps, lineage),
        "## Lineage\n\n" + _lineage(facts, teacher, steps, lineage, source),
        "## Sizes\n\n" + _sizes(facts, teacher),
        *(["## Results\n\n" + _results(models)] if models else []),
        _USE,
        *(["## Training data\n\n" + _texts(lineage)] if lineage.texts() else []),
        "## License\n\n" + _license(teacher.get("license")),
    ]
    header = yaml.safe_dump(_header(teacher, source, steps), sort_keys=False, allow_unicode=True)
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


def _header(teacher: Mapping[str, Any], source: str, steps: Sequence[Step]) -> dict[str, Any]:
    header: dict[str, Any] = {"license": teacher.get("license") or "other", "library_name": "transformers"}
    if source.startswith("hf:"):
        header["base_model"] = source.removeprefix("hf:")
    header["pipeline_tag"] = "text-generation"
    done = {step.title for step in steps}
    header["tags"] = ["nemo-minitron", "minitron", *(title.lower() for title in (PRUNED, DISTILLED) if title in done)]
    return header


def _summary(
    facts: Mapping[str, Any], teacher: Mapping[str, Any], source: str, steps: Sequence[Step], lineage: Lineage
) -> str:
    share = facts["num_params"] / teacher["num_params"]
    how = ", then ".join(step.summary for step in steps) or "exported"
    if not lineage.missing and not any(step.trains for step in steps):
        how += ", not trained after that,"
    return (
        f"{facts['num_params']:,} parameters, {share:.0%} of its teacher, {code(source)} ({teacher['num_params']:,})."
        f" {how[0].upper()}{how[1:]} with nemo-minitron {__version__}, after NVIDIA's Minitron"
        " ([2407.14679](https://arxiv.org/abs/2407.14679), [2408.11796](https://arxiv.org/abs/2408.11796))."
    )


def _lineage(
    facts: Mapping[str, Any], teacher: Mapping[str, Any], steps: Sequence[Step], lineage: Lineage, source: str
) -> str:
    lines = [f"**Teacher** {code(source)}, {millions(teacher['num_params'])} parameters."]
    lines += [f"**{step.title}**{step.text}" for step in steps]
    stored = f", {mebibytes(facts['checkpoint_bytes'])} MiB of weights" if "checkpoint_bytes" in facts else ""
    lines.append(f"**Stored** as {plain(str(facts.get('dtype', 'it was')))}{stored}.")
    text = "\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1))
    if not lineage.missing:
        return text
    missing = ", ".join(code(stage) for stage in lineage.missing)
    return f"{text}\n\nNot complete: the records of stages of the run are gone or have been replaced: {missing}."


def _sizes(facts: Mapping[str, Any], teacher: Mapping[str, Any]) -> str:
    total = ("parameters", f"{teacher['num_params']:,}", f"{facts['num_params']:,}")
    return table(["", "teacher", "this model"], [total, *size_rows(teacher.get("shape", {}), facts["shape"])])


def _results(models: Mapping[str, Mapping[str, Any]]) -> str:
    metrics = task_metrics(models)
    rows = [
        ["parameters", *(f"{found['num_params']:,}" for found in models.values())],
        ["bits per byte", *(f"{found['bits_per_byte']:.4f}" for found in models.values())],
        ["perplexity", *(f"{found['perplexity']:.2f}" for found in models.values())],
        *(
            [plain(f"{task} ({metric})"), *(score_text(score_of(task, found, metric)) for found in models.values())]
            for task, metric in metrics.items()
        ),
    ]
    results = table(["", *map(plain, models)], rows)
    notes = ["Bits per byte and perplexity (per token) are on held-out documents of the training text."]
    if metrics:
        limit = next((found["tasks_limit"] for found in models.values() if found.get("tasks_limit")), None)
        on = f", first {limit} examples of each task" if limit else ""
        notes.append(f"Tasks: lm-eval, zero-shot{on}; ± standard error.")
    return f"{results}\n\n{' '.join(notes)}"


def _texts(lineage: Lineage) -> str:
    """List the texts after the teacher's own training, each with the kinds of the stages that read it."""
    lines = [f"- {code(source)}: {', '.join(map(code, kinds))}" for source, kinds in lineage.texts().items()]
    return "\n".join(["Texts after the teacher's own training, and the kinds of stages that read them:\n", *lines])


def _license(license_id: str | None) -> str:
    name = license_id or "Unknown: look it up at the teacher's source"
    llama = _LLAMA_NOTE if license_id and "llama" in license_id.lower() else ""
    return f"{plain(name)}. {_LICENSE_NOTE}{llama}"
