"""What a rank opens and lists when a stage starts: files of the run, never the text that the data were made of."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from nemo_minitron import api
from nemo_minitron.execution.task import StageTask
from tests.support.distributed import run_ranks
from tests.support.tiny_models import tiny_model_dir

EVENTS = ("open", "os.listdir", "os.scandir", "glob.glob")


def paths_of_rank(task: dict[str, Any]) -> list[str]:
    """Run the task on this rank as its worker does, and return every path that Python opens or lists meanwhile."""
    from nemo_minitron.artifacts.store import Store
    from nemo_minitron.execution.task import run_task
    from nemo_minitron.system.interrupts import StopRequest
    from nemo_minitron.system.progress import Progress

    found: list[str] = []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in EVENTS and isinstance(args[0], str | os.PathLike):
            found.append(os.path.abspath(args[0]))

    sys.addaudithook(hook)
    loaded = StageTask.load(task)
    run_task(loaded, Store(loaded.run_dir).inputs(loaded.inputs), Progress(silent=True), StopRequest())
    return list(found)


def test_ranks_read_the_run_and_not_the_text(tmp_path: Path) -> None:
    model = tiny_model_dir(tmp_path / "model", "llama_gqa_tied")
    text = tmp_path / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(f"Text number {number} about models. " * 20)
    evaluated = {
        "kind": "evaluate",
        "label": "x",
        "inputs": {"model": "teacher"},
        "num_tokens": 64,
        "seq_len_tokens": 32,
    }
    recipe = {
        "name": "r",
        "stages": {
            "teacher": {"kind": "import", "source": str(model)},
            "data": {"kind": "tokenize", "inputs": {"tokenizer": "teacher"}, "sources": [{"source": str(text)}]},
            "measured": {**evaluated, "precision": "fp32"},
        },
        "execution": {"run_root": str(tmp_path / "runs"), "device": "cpu", "parallel": {"dp": 2}},
    }
    file = tmp_path / "r.yaml"
    file.write_text(json.dumps(recipe))
    loaded = api.load_recipe(file)
    api.run(loaded, until="data")
    plan = api.plan(loaded)
    (call,) = [call for call in plan.calls if call.name == "measured"]
    work, out = tmp_path / "work", tmp_path / "runs/r/out"
    for folder in (work, out):
        folder.mkdir()
    StageTask.of(call, plan.recipe, out, work).save()
    task = json.loads((work / StageTask.of(call, plan.recipe, out, work).file.name).read_text())
    for paths in run_ranks(2, paths_of_rank, task):
        assert any(path.startswith(str(tmp_path / "runs")) for path in paths), "the hook must see the run's files"
        assert not [path for path in paths if path.startswith((str(text), str(model)))]
