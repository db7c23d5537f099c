"""Warnings about text that a training would repeat for too many epochs, once its size is known."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_minitron.artifacts.store import Store
from nemo_minitron.data.used import MAX_USEFUL_EPOCHS, expected_use
from nemo_minitron.errors import ArtifactError
from nemo_minitron.plan.folder import run_dir
from nemo_minitron.plan.planner import RunPlan
from nemo_minitron.schema.base import StageParams
from nemo_minitron.stages.registry import STAGES
from nemo_minitron.system.files import read_json


def epoch_warnings(plan: RunPlan) -> Iterator[str]:
    """Yield one line for each source that a training yet to run would repeat too often, once it is tokenized."""
    store = Store(run_dir(plan.recipe))
    for name, stage in plan.recipe.stages.items():
        use = STAGES[stage.kind].text_use(stage)
        if use is None or plan.states[name].status == "finished":
            continue
        if plan.states[use.data].status == "finished":
            yield from repeated_text(name, stage, store)


def repeated_text(name: str, stage: StageParams, store: Store) -> Iterator[str]:
    """Yield the warnings of `epoch_warnings` for one stage whose data has been tokenized."""
    text = STAGES[stage.kind].text_use(stage)
    if text is None:
        return
    file = store.published(text.data) / "data.json"
    if not file.is_file():
        return
    next_step = f"Create it again with --rerun {text.data}, or restore the file."
    facts = read_json(file, next_step)
    if not isinstance(facts, dict) or not isinstance(facts.get("train"), list):
        raise ArtifactError(f"{file.name} does not list its sources.", where=str(file), next_step=next_step)
    for use in expected_use(facts["train"], text.num_tokens):
        if use["epochs"] > MAX_USEFUL_EPOCHS:
            yield (
                f"stages.{name}: {use['source']} will be read {use['epochs']:.1f} times, {use['tokens']:,.0f} tokens; "
                f"beyond {MAX_USEFUL_EPOCHS:g} epochs, repeated text adds less and less (arXiv:2305.16264). "
                f"Lower its weight in stages.{text.data}, lower num_steps, or add text."
            )
