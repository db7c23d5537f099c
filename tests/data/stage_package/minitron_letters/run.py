"""Count letters on all ranks."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

from minitron_letters.params import CountLettersStage
from nemo_minitron.errors import DataError
from nemo_minitron.stages.artifacts import Model
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.kind import Result


@dataclass(frozen=True)
class Inputs:
    """Inputs of the stage, by role."""

    model: Model


def count_letters(params: CountLettersStage, inputs: Inputs, ctx: StageContext) -> Result:
    """Count a part of the vocabulary on each rank. The first attempt fails after half of the work."""
    session, before = ctx.open_session, ctx.work_dir / "attempts"
    attempts = len(before.read_text()) if before.is_file() else 0
    session.barrier()
    if ctx.is_main:
        before.write_text("x" * (attempts + 1))
    if attempts == 0:
        raise DataError("The first attempt always fails.", where=f"stages.{ctx.name}")
    vocab = json.loads((inputs.model.path / "tokenizer.json").read_text())["model"]["vocab"]
    own = sorted(vocab)[session.dp_rank :: ctx.execution.parallel.dp]
    found = torch.tensor([float(sum(token.count(params.letter) for token in own)), float(len(own))])
    session.sum(found)
    if ctx.is_main:
        (ctx.out_dir / "letters.json").write_text(json.dumps({params.letter: int(found[0])}))
    return {"num_letters": int(found[0]), "num_tokens": int(found[1]), "attempts": attempts + 1}
