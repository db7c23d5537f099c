"""Packed documents do not attend to each other if the recipe requests it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from nemo_minitron.backends.megatron.distillation import distill, teacher_cache
from nemo_minitron.backends.megatron.model import layers
from nemo_minitron.backends.megatron.model.documents import (
    AttentionInDocuments,
    document_bounds,
    mask_between_documents,
)
from nemo_minitron.backends.megatron.model.forward import evaluating, model_logits, token_nll
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


def test_the_bounds_are_those_of_documents_in_every_row() -> None:
    tokens = torch.tensor([[5, 6, EOD, 7], [EOD, EOD, 8, EOD], [1, 2, 3, 4]])
    bounds = document_bounds(tokens, EOD)
    assert bounds.dtype == torch.int32
    assert bounds.tolist() == [0, 3, 4, 5, 6, 8, 12]


class PackedAttention(nn.Module):
    """A core attention with the interface of Transformer Engine's, which ignores masks and takes packed sequences."""

    calls: ClassVar[list[str]] = []

    def __init__(self, config: Any, layer_number: int, *_: Any, **__: Any) -> None:
        super().__init__()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        if packed_seq_params is None:
            self.calls.append("sbhd")
            return _causal(query, key, value)
        self.calls.append("thd")
        assert packed_seq_params.qkv_format == "thd"
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        assert packed_seq_params.cu_seqlens_kv.tolist() == bounds
        assert bounds[0] == 0
        assert bounds[-1] == len(query) == len(key) == len(value)
        longest = max(stop - start for start, stop in pairwise(bounds))
        assert longest <= packed_seq_params.max_seqlen_q == packed_seq_params.max_seqlen_kv
        documents = [
            _causal(*(x[start:stop, None] for x in (query, key, value)))[:, 0] for start, stop in pairwise(bounds)
        ]
        return torch.cat(documents)


def _causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return causal attention [S, B, heads * head_dim] by plain products."""
    groups = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(groups, 2) for x in (key, value))
    scores = torch.einsum("sbhd,tbhd->bhst", query, key) / query.shape[-1] ** 0.5
    scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
    return torch.einsum("bhst,tbhd->sbhd", scores.softmax(-1), value).flatten(2)


class PackedAttentionInDocuments(AttentionInDocuments, PackedAttention):
    """What engine_attention.EngineAttention is, with a stand-in for Transformer Engine's kernels."""


def test_attention_by_bounds_is_that_of_the_mask() -> None:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(1, 9, (2, 24), generator=generator)
    tokens[0, 5], tokens[0, 6], tokens[1, 23] = EOD, EOD, EOD
    query, key, value = (torch.randn(24, 2, heads, 16, generator=generator) for heads in (8, 2, 2))
    config: Any = SimpleNamespace(context_parallel_size=1)
    by_mask = layers.SdpaCoreAttention(config, 1)(query, key, value, mask_between_documents(tokens, EOD))
    by_bounds = PackedAttentionInDocuments(config, 1)(
        query, key, value, document_bounds(tokens, EOD), attn_mask_type=None, packed_seq_params=None
    )
    torch.testing.assert_close(by_bounds, by_mask, rtol=0, atol=1e-6)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("kind", ["llama_gqa_tied", "qwen3"])
def test_bounds_give_the_loss_and_gradients_of_the_mask(
    kind: str, recompute: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model_dir(tmp_path, kind)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 512, (3, 32), generator=generator)
    tokens[0, 11], tokens[1, 0], tokens[1, 20], tokens[1, 21] = EOD, EOD, EOD, EOD
    PackedAttention.calls.clear()
    found = []
    with open_session(Parallel(recompute=recompute), device="cpu", threads=1) as session:
        for separate in (mask_between_documents, document_bounds):
            if separate is document_bounds:
                modules = {**layers._modules(), "attention": PackedAttentionInDocuments}
                monkeypatch.setattr(layers, "_modules", lambda modules=modules: modules)
            model, shape = load_model(folder, session, precision="fp32", seq_len_tokens=32)
            logits = model_logits(model, {"tokens": tokens, "attention_mask": separate(tokens, EOD)})
            loss = token_nll(logits, tokens.roll(-1, 1), shape.vocab_size).mean()
            loss.backward()
            gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
            found.append((logits.detach(), float(loss), gradients))
        plain = model_logits(model, {"tokens": tokens})
    assert set(PackedAttention.calls) == {"thd", "sbhd"}
    (logits, loss, gradients), (other_logits, other_loss, other_gradients) = found
    assert (plain - logits).abs().max() > 0.1, "documents must matter for this to mean anything"
    torch.testing.assert_close(other_logits, logits, rtol=1e-6, atol=1e-5)
    assert other_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-5, atol=1e-6)


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
    apart = params.model_copy(update={"reset_attention_mask": True})
    for has_engine, cp, wanted in ((True, 2, params), (False, 2, apart), (True, 1, apart)):
        monkeypatch.setattr(layers, "has_transformer_engine", lambda has_engine=has_engine: has_engine)
        with pytest.raises(Exception, match="nothing"):
            start(wanted, *_arguments(start, folders, tmp_path, cp))
    monkeypatch.setattr(layers, "has_transformer_engine", lambda: True)
    with pytest.raises(EnvironmentProblem, match="cp = 2: Transformer Engine's attention would see across documents"):
        start(apart, *_arguments(start, folders, tmp_path, 2))


def _arguments(start: Any, folders: int, tmp_path: Path, cp: int) -> list[Any]:
    session = SimpleNamespace(parallel=Parallel(cp=cp))
    return [tmp_path / "nothing"] * folders + [session] + [None] * (start is teacher_cache.write_cache)
