"""Packed documents do not attend to each other if the recipe requests it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_minitron.backends.megatron.data.datasets import mask_between_documents
from nemo_minitron.backends.megatron.distillation import distill, teacher_cache
from nemo_minitron.backends.megatron.model import layers
from nemo_minitron.backends.megatron.model.forward import evaluating, model_logits
from nemo_minitron.backends.megatron.model.weights import load_model
from nemo_minitron.backends.megatron.runtime.session import open_session
from nemo_minitron.errors import EnvironmentProblem
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.stages.cache_teacher.params import CacheTeacherStage
from nemo_minitron.stages.distill.params import DistillStage
from nemo_minitron.stages.train.params import TrainStage
from tests.support.tiny_models import tiny_model_dir

EOD = 0


def test_the_mask_is_causal_within_documents() -> None:
    mask = mask_between_documents(torch.tensor([[5, 6, EOD, 7]]), EOD)
    assert (~mask[0, 0]).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]


@torch.no_grad()
def test_each_document_has_the_logits_of_a_separate_sequence(tmp_path: Path) -> None:
    folder = tiny_model_dir(tmp_path, "llama_gqa_tied")
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(1, 512, (1, size), generator=generator) for size in (11, 20))
    packed = torch.cat([first, torch.tensor([[EOD]]), second], 1)
    with open_session(Parallel(), device="cpu", threads=1) as session:
        model, _ = load_model(folder, session, precision="fp32", seq_len_tokens=32)
        with evaluating(model):
            masked = model_logits(model, {"tokens": packed, "attention_mask": mask_between_documents(packed, EOD)})
            open_ = model_logits(model, {"tokens": packed})
            alone = [model_logits(model, {"tokens": tokens}) for tokens in (first, second)]
    torch.testing.assert_close(masked[:, :11], alone[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(masked[:, 12:], alone[1], rtol=1e-5, atol=1e-5)
    assert (open_[:, 12:] - alone[1]).abs().max() > 0.1, "without the mask the first document is seen"


KEYS = {"num_steps": 1, "global_batch_size": 1, "seq_len_tokens": 8, "lr": 0.1}


@pytest.mark.parametrize(
    ("start", "params", "folders"),
    [
        (distill.prepare, DistillStage(kind="distill", **KEYS), 4),
        (distill.prepare_cached, DistillStage(kind="distill", **KEYS), 4),
        (distill.prepare_training, TrainStage(kind="train", **KEYS), 3),
        (teacher_cache.write_cache, CacheTeacherStage(kind="cache_teacher", num_samples=1, seq_len_tokens=8), 3),
    ],
)
def test_where_transformer_engine_would_see_across_documents_no_stage_starts(
    start: Any, params: Any, folders: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused before anything is read: none of the folders exists."""
    rest = [tmp_path / "nothing"] * folders + [None] * (1 + (start is teacher_cache.write_cache))
    apart = params.model_copy(update={"reset_attention_mask": True})
    for has_engine, wanted in ((True, params), (False, apart)):
        monkeypatch.setattr(layers, "has_transformer_engine", lambda has_engine=has_engine: has_engine)
        with pytest.raises(Exception, match="nothing"):
            start(wanted, *rest)
    monkeypatch.setattr(layers, "has_transformer_engine", lambda: True)
    with pytest.raises(EnvironmentProblem, match="Transformer Engine's attention would ignore the document mask"):
        start(apart, *rest)
