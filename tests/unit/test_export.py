"""The exported folder: plain transformers loads it, with the same values in another data type and all side files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from nemo_minitron.hf.checkpoint import model_facts
from nemo_minitron.schema.execution import Execution
from nemo_minitron.stages.artifacts import Evaluation, Model
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.export.params import ExportStage
from nemo_minitron.stages.export.run import Inputs, export
from nemo_minitron.system.progress import Progress
from tests.support.tiny_models import load_transformers, tiny_model_dir


def _export(tmp_path: Path, model_dir: Path, **params: Any) -> tuple[Path, Any]:
    out = tmp_path / "out"
    out.mkdir()
    facts = {**model_facts(model_dir), "license": "apache-2.0", "source": "hf:org/teacher"}
    (tmp_path / "evaluate").mkdir()
    metrics = {"label": "distilled", "num_params": 1, "bits_per_byte": 1.0, "perplexity": 2.0, "tasks": {}}
    (tmp_path / "evaluate/metrics.json").write_text(json.dumps(metrics))
    model, teacher = (Model(role, "import", model_dir, "f" * 64, facts) for role in ("model", "teacher"))
    inputs = Inputs(model, teacher, {"e": Evaluation("e", "evaluate", tmp_path / "evaluate", "f" * 64, {})})
    ctx = StageContext("export", "a/recipe", out, tmp_path, Execution(), Progress(silent=True))
    return out, export(ExportStage(kind="export", **params), inputs, ctx)


@torch.no_grad()
def _logits(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    return load_transformers(folder, dtype)(torch.tensor([[5, 6, 7, 8]])).logits


@pytest.mark.parametrize("case", ["llama_gqa_tied", "mistral", "qwen2", "qwen3", "nemotron"])
def test_transformers_computes_the_same_logits(case: str, tmp_path: Path) -> None:
    model_dir = tiny_model_dir(tmp_path, case)
    out, result = _export(tmp_path, model_dir, dtype="keep")
    assert torch.equal(_logits(out, torch.float32), _logits(model_dir, torch.float32))
    assert result["dtype"] == "float32"
    assert result["num_params"] == sum(p.numel() for p in load_transformers(out).parameters())


def test_conversion_rounds_the_weights_and_nothing_else(tmp_path: Path) -> None:
    model_dir = tiny_model_dir(tmp_path, "llama_mha")
    out, result = _export(tmp_path, model_dir, dtype="bfloat16")
    before, after = load_transformers(model_dir).state_dict(), load_transformers(out, "auto").state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor.bfloat16(), after[name]) for name, tensor in before.items())
    assert (result["dtype"], result["checkpoint_bytes"] < 0.6 * model_facts(model_dir)["checkpoint_bytes"]) == (
        "bfloat16",
        True,
    )


def test_all_side_files_of_the_model_are_exported(tmp_path: Path) -> None:
    model_dir = tiny_model_dir(tmp_path, "llama_mha")
    config = json.loads((model_dir / "config.json").read_text())
    config.pop("head_dim", None)
    (model_dir / "config.json").write_text(json.dumps(config))
    (model_dir / "generation_config.json").write_text('{"eos_token_id": 0}')
    (model_dir / "LICENSE").write_text("terms")
    out, result = _export(tmp_path, model_dir, model_name="A small one")
    assert json.loads((out / "config.json").read_text())["head_dim"] == 8
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": 0}
    assert (out / "LICENSE").read_text() == "terms"
    tokenizer = AutoTokenizer.from_pretrained(out)
    chat = [{"role": "user", "content": "hi"}]
    assert "<|im_start|>user" in tokenizer.apply_chat_template(chat, tokenize=False)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "# A small one" in card
    assert "base_model: org/teacher" in card
    assert "| bits per byte | 1.0000 |" in card
    assert result["license"] == "apache-2.0"
