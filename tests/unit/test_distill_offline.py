"""Problems that `check` reports for an offline distillation."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import REPO, Cli

RECIPE = REPO / "recipes/toy/offline.yaml"


@pytest.mark.parametrize(
    ("override", "output"),
    [
        ("stages.distill_offline.top_k=600", "the teacher's vocabulary has 512 tokens"),
        ("+execution.parallel_by_stage.distill_offline.tp=3", "tp = 3: must divide the vocabulary, 512"),
        ("+execution.parallel_by_stage.distill_offline.pp=3", "the same number of layers in every pipeline stage"),
        ("stages.distill_offline.kd_loss_weight=0", "are both 0"),
        ("stages.distill_offline.kd_loss=mse", "fwd_kl"),
        ("stages.distill_offline.inputs.teacher=chat_data", "teacher"),
        ("stages.distill_offline.global_batch_size=32", "valid_rows = 24"),
        (
            "stages.distill_offline.aligner.model.knowledge_distillation.logit_scale=2",
            "Did you mean model.knowledge_distillation.logits_scale?",
        ),
        ("stages.distill_offline.aligner.model.data.top_k=5", "set by the stage"),
    ],
)
def test_check_names_what_is_wrong(override: str, output: str, minitron: Cli, tmp_path: Path) -> None:
    code, found = minitron("check", RECIPE, f"execution.run_root={tmp_path}", override)
    assert code == 2, found
    assert output in " ".join(found.split())
