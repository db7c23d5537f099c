"""The conversions and the training of a stage give the same bits with one start of NeMo as with three."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load

from nemo_minitron.backends.alignment.base import (
    PreferenceObjective,
    SftObjective,
    TaskContext,
    Training,
)
from nemo_minitron.backends.alignment.nemo_aligner import training as training_module
from nemo_minitron.backends.alignment.nemo_aligner.backend import NemoAligner
from nemo_minitron.schema.execution import Parallel
from tests.support.aligner import curves, quiet, same_tensors, write_rows
from tests.support.tiny_models import tiny_model_dir

pytestmark = pytest.mark.slow

NUM_ROWS = 16
OBJECTIVES: dict[str, Any] = {"sft": SftObjective(), "dpo": PreferenceObjective("dpo", 0.1, 1.0, 0.0, False)}


@contextmanager
def _own_processes(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield None


def _train(method: str, root: Path, model: Path) -> Path:
    """Run the stage's work on a toy model; returns its work folder, beside which `out` has the result."""
    (root / "out").mkdir(parents=True)
    work = root / "work"
    work.mkdir()
    rows = root.parent / "rows.jsonl"
    write_rows(method, rows, NUM_ROWS)  # type: ignore[arg-type]
    training = Training(model, OBJECTIVES[method], rows, rows, NUM_ROWS, 4, 8, 128, 1e-3, 1e-4, 1, 2, 1234)
    context = TaskContext("stage", work, Parallel(micro_batch_size=2), "cpu", 2, *quiet())
    NemoAligner().train(training, root / "out", context)
    return work


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_one_start_gives_the_bits_of_three(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model_dir(tmp_path, "llama_gqa_tied", dtype=torch.bfloat16)
    one = _train(method, tmp_path / "one", model)
    monkeypatch.setattr(training_module, "task_server", _own_processes)
    three = _train(method, tmp_path / "three", model)
    for folder in ("nemo", "trained"):
        found, expected = (_tensors(work / folder / "model_weights") for work in (one, three))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), folder
    assert same_tensors(one.parent / "out", three.parent / "out")
    assert not same_tensors(one.parent / "out", model), "the training has changed the model"
    figures = ("step", "train/loss", "train/grad_norm", "val/loss", "val/loss_se")
    rows = [[{key: row[key] for key in figures if key in row} for row in curves(w / "training")] for w in (one, three)]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0] if "val/loss" in row] == [0, 2, 4], "the first is the untouched model's"


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    reader = FileSystemReader(folder)
    kept = {name: value for name, value in reader.read_metadata().state_dict_metadata.items() if hasattr(value, "size")}
    out = {name: torch.empty(value.size, dtype=value.properties.dtype) for name, value in kept.items()}
    load(out, storage_reader=reader, no_dist=True)
    return out
