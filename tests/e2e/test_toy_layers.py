"""The toy model by depth, with layer-local distillation before the distillation, and anchors in it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.conftest import REPO, Cli
from tests.support.tiny_models import load_transformers

LAYERS = (
    "++stages.layers={kind: distill_layers, num_steps: 60, global_batch_size: 4, seq_len_tokens: 128, lr: 2.0e-3, "
    "warmup_steps: 5, precision: fp32, valid_interval_steps: 30, valid_num_tokens: 2048}"
)
DISTILL = (
    "stages.distill.inputs={student: layers, plan: select}",
    "stages.distill.loss.anchors={weight: 0.5, decay_steps: 10}",
    "stages.distill.num_steps=12",
)


def test_the_layers_are_trained_before_the_whole_model(minitron: Cli, tmp_path: Path) -> None:
    recipe = REPO / "recipes/toy/depth.yaml"
    words = (f"execution.run_root={tmp_path}", LAYERS, *DISTILL)
    code, output = minitron("plan", recipe, *words)
    assert code == 0, output
    assert "layers" in output
    code, output = minitron("run", recipe, *words, "--until", "distill")
    assert code == 0, output
    code, output = minitron("report", recipe, *words)
    assert code == 0, output
    run = tmp_path / "toy/depth"
    layers, distilled = (_result(run / stage) for stage in ("layers", "distill"))
    before, after = layers["initial_layer_losses"], layers["final_layer_losses"]
    # One layer was dropped. The layer before it learns its part; the others already match the teacher.
    assert [loss for loss in before if loss] != []
    assert sum(after) < 0.9 * sum(before)
    assert layers["final_valid_kl"] < layers["initial_valid_kl"]
    assert distilled["initial_valid_kl"] == layers["final_valid_kl"]
    assert layers["tokens"] == 60 * 4 * 128
    curves = [json.loads(line) for line in (run / "distill/curves.jsonl").read_text().splitlines()]
    assert [row["step"] for row in curves if "anchor_loss" in row] == list(range(1, 11))
    assert "relative squared error inside the layers" in distilled["loss"]
    found = list(run.rglob("report.md"))
    assert found
    assert "## Layer-local distillation" in found[0].read_text()
    assert "Layer-local distillation: layers" in found[0].with_suffix(".html").read_text()
    assert load_transformers(run / "layers").config.num_hidden_layers == 3


def _result(folder: Path) -> dict[str, object]:
    return json.loads((folder / "manifest.json").read_text())["result"]
