"""A small version of the claims suite's teacher: tokenizer, random weights and training, from text only."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from tests.conftest import REPO, Cli

VOCABULARY = 320
SMALL = (
    f"stages.teacher_init.architecture.vocab_size={VOCABULARY}",
    f"stages.teacher_init.tokenizer.vocab_size={VOCABULARY}",
    "stages.teacher_init.architecture.num_hidden_layers=2",
    "stages.teacher_init.architecture.hidden_size=32",
    "stages.teacher_init.architecture.intermediate_size=64",
    "stages.teacher_init.architecture.num_attention_heads=2",
    "stages.teacher_init.architecture.num_key_value_heads=2",
    "stages.teacher_init.architecture.head_dim=16",
    "stages.teacher.num_steps=40",
    "stages.teacher.warmup_steps=4",
    "stages.teacher.lr=0.01",
    "stages.teacher.global_batch_size=8",
    "stages.teacher.seq_len_tokens=32",
    "stages.teacher.valid_num_tokens=512",
    "execution.parallel_by_stage={teacher: {dp: 1, micro_batch_size: 8}}",
)


def _write_text(file: Path) -> None:
    words = [f"{a}{b}" for a in ("ka", "lo", "mi", "su") for b in ("ra", "ten", "bo", "li")]
    choices = torch.randint(len(words), (60, 200), generator=torch.Generator().manual_seed(0)).tolist()
    file.write_text("\f".join(" ".join(words[i] for i in row) for row in choices))


def test_a_model_learns_the_words_of_a_text_from_nothing(minitron: Cli, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    _write_text(text)
    source = f"stages.teacher_init.tokenizer.sources.0.source={text}"
    recipe = REPO / "recipes/claims/teacher.yaml"
    code, output = minitron("run", recipe, f"execution.run_root={tmp_path}", source, *SMALL, "--until", "teacher")
    assert code == 0, output
    run = tmp_path / "claims/teacher"
    before = json.loads((run / "teacher_init/manifest.json").read_text())["result"]
    after = json.loads((run / "teacher/manifest.json").read_text())["result"]
    assert after["num_params"] == before["num_params"]
    assert after["initial_valid_loss"] > math.log(VOCABULARY) - 0.1
    # The 16 words are drawn uniformly, so a trained model has a loss of ln(16) for each token, which is a word.
    assert after["final_valid_loss"] < math.log(16) + 0.3
