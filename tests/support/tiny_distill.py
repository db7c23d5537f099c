"""A distillation of twenty steps between two tiny models, for the tests that run it in several ways."""

from __future__ import annotations

from pathlib import Path

from nemo_minitron.stages.distill.params import DistillStage
from tests.support.tiny_data import tiny_data_dir
from tests.support.tiny_models import tiny_model_dir

TWENTY_STEPS = DistillStage(
    kind="distill",
    num_steps=20,
    global_batch_size=4,
    seq_len_tokens=32,
    lr=2e-3,
    warmup_steps=2,
    precision="fp32",
    valid_interval_steps=10,
    valid_num_tokens=256,
    save_interval_steps=100,
)


def distill_folders(root: Path) -> dict[str, Path]:
    """Make student, teacher and data below `root`, which is also the work folder."""
    return {
        "student": tiny_model_dir(root / "student", "llama_gqa_tied", intermediate_size=64, seed=1),
        "teacher": tiny_model_dir(root / "teacher", "llama_gqa_tied"),
        "data": tiny_data_dir(root / "data"),
        "work": root,
    }
