"""The depth recipe: layers are scored by the loss without them, and the least important one is removed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from tests.conftest import REPO, Cli


def test_the_least_important_layer_is_removed_and_the_student_is_trained(minitron: Cli, tmp_path: Path) -> None:
    recipe = REPO / "recipes/toy/depth.yaml"
    code, output = minitron("run", recipe, f"execution.run_root={tmp_path}", "--until", "distill")
    assert code == 0, output
    run = tmp_path / "toy/depth"
    scores = load_file(run / "score/scores.safetensors")
    losses = scores["layers.lm_loss"]
    baseline = json.loads((run / "score/scores.json").read_text())["baseline_lm_loss"]
    assert (losses > baseline).all(), "every layer of the toy teacher helps"
    plan = json.loads((run / "select/prune_plan.json").read_text())
    kept = [layer for layer in range(4) if layer != int(np.argmin(losses))]
    assert plan["target"]["num_layers"] == 3
    assert sorted(map(int, plan["keep"]["ffn"])) == kept
    distilled = json.loads((run / "distill/manifest.json").read_text())["result"]
    assert distilled["final_valid_kl"] < 0.7 * distilled["initial_valid_kl"]
    config = json.loads((run / "distill/config.json").read_text())
    assert config["num_hidden_layers"] == 3
