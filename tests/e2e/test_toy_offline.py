"""The toy model distilled by NeMo-Aligner from cached logits, from the recipe to the exported model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import REPO
from tests.support.aligner import finished

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run."""
    return finished(REPO / "recipes/toy/offline.yaml", tmp_path_factory.mktemp("offline"))


def test_the_student_is_trained(run: Path) -> None:
    result = json.loads((run / "distill_offline/manifest.json").read_text())["result"]
    assert result["valid_loss"] < result["first_valid_loss"]


def test_it_is_nearer_to_the_teacher_than_the_pruned_model(run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [json.loads(line) for line in (run / "chat_data/valid.jsonl").open()]
    tokenizer = AutoTokenizer.from_pretrained(run / "export", local_files_only=True)
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]

    @torch.no_grad()
    def log_probs(folder: Path) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        ids = [torch.tensor([tokenizer(text, add_special_tokens=False).input_ids]) for text in texts]
        return torch.cat([model(row).logits[0].double().log_softmax(-1) for row in ids])

    teacher = log_probs(run / "teacher")
    kl = {name: (teacher.exp() * (teacher - log_probs(run / name))).sum(-1).mean() for name in ("prune", "export")}
    assert kl["export"] < 0.7 * kl["prune"], kl
