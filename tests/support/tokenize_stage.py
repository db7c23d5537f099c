"""The tokenize stage on the toy text and with the toy model's tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from nemo_minitron.data.readers import read_documents
from nemo_minitron.hf.source import BUILT_IN
from nemo_minitron.schema.data import DataSource
from nemo_minitron.schema.execution import Execution
from nemo_minitron.stages.artifacts import Model
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.tokenize.params import TokenizeStage
from nemo_minitron.stages.tokenize.run import Inputs, tokenize
from nemo_minitron.system.interrupts import StopRequest
from nemo_minitron.system.progress import Progress

TOY_MODEL, TOY_TEXT = BUILT_IN["toy-llama"], BUILT_IN["toy-text"]


def toy_texts() -> list[str]:
    return [text.text for text in read_documents(TOY_TEXT, DataSource(source="asset:toy-text"))]


def context(folder: Path, stop: StopRequest | None = None, **execution: Any) -> StageContext:
    out, work = folder / "out", folder / "work"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    work.mkdir(exist_ok=True)
    progress = Progress(silent=True)
    return StageContext("data", "test", out, work, Execution(**execution), progress, stop=stop or StopRequest())


def run_stage(
    folder: Path,
    sources: list[dict[str, Any]],
    *,
    model: Path = TOY_MODEL,
    workers: int = 1,
    stop: StopRequest | None = None,
    **params: Any,
) -> dict[str, Any]:
    """Run the stage with the folder `out` for results and `work` for what survives a stop."""
    stage = TokenizeStage(kind="tokenize", sources=sources, **params)
    inputs = Inputs(Model("teacher", "import", model, "", {}))
    return dict(tokenize(stage, inputs, context(folder, stop, workers=workers)))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (folder / "out").iterdir()}
