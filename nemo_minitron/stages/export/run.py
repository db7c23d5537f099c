"""Export the finished model as a Hugging Face folder with a model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nemo_minitron.artifacts.store import Store
from nemo_minitron.stages.artifacts import Evaluation, Model
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.export.params import ExportStage
from nemo_minitron.stages.kind import Result
from nemo_minitron.system.disclosure import masked


@dataclass(frozen=True)
class Inputs:
    """Inputs of the stage, by role."""

    model: Model
    teacher: Model
    evaluations: Mapping[str, Evaluation] = field(default_factory=dict)


def export(params: ExportStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Write a Hugging Face folder with tokenizer, chat template, generation config and a model card.

    Tensors are copied one at a time. config.json states values that a reader would otherwise have to infer (head_dim),
    with the key names of both transformers 4 and 5.
    """
    import torch

    from nemo_minitron.families import parameters
    from nemo_minitron.hf.checkpoint import Checkpoint, CheckpointWriter, copy_side_files, model_facts
    from nemo_minitron.report.lineage import read_lineage
    from nemo_minitron.report.model_card import render_card

    model, teacher = inputs.model, inputs.teacher
    source = Checkpoint.open(model.path)
    dtype = None if params.dtype == "keep" else getattr(torch, params.dtype)
    writer = CheckpointWriter(ctx.out_dir, source.config, dtype=dtype)
    names = [parameter.hf for parameter in parameters(source.shape)]
    for name in ctx.progress.track(names, "export", len(names), "tensors"):
        writer.add(name, source.read(name))
    writer.close()
    copy_side_files(model.path, ctx.out_dir)
    facts = model_facts(ctx.out_dir)
    card = render_card(
        params.model_name or ctx.recipe_name,
        facts=facts,
        teacher=teacher.result,
        lineage=read_lineage(model.stage, model.fingerprint, teacher.stage, Store(ctx.run_dir)),
        metrics=[found.metrics() for found in inputs.evaluations.values()],
    )
    environment = dict(ctx.execution.cluster.environment) if ctx.execution.cluster else {}
    (ctx.out_dir / "README.md").write_text(masked(card, environment), encoding="utf-8")
    return {**facts, "license": teacher.license, "teacher": teacher.source}
