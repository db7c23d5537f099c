"""Sizes of the chunks of logits, and which fused kernels of Megatron a session uses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.models.common.embeddings import rope_utils

from nemo_minitron.backends.megatron.model import build
from nemo_minitron.distillation.chunks import block_tokens, chunk_tokens
from nemo_minitron.families import read_shape
from nemo_minitron.schema.execution import Kernels, Parallel
from tests.support.tiny_models import tiny_config


@pytest.mark.parametrize(
    ("vocab_size", "on_gpu", "expected"),
    [
        (128_256, False, 523),
        (128_256, True, 4096),  # 523 rows would be 3 tiles of 256 for 2.04
        (16_032, True, 4096),  # a rank of tp 8: 4,186 rows are rounded down
        (8_192, True, 8192),
        (10_000_000, False, 32),
    ],
)
def test_chunks_on_a_gpu_fill_whole_tiles(vocab_size: int, on_gpu: bool, expected: int) -> None:
    assert chunk_tokens(vocab_size, on_gpu=on_gpu) == expected
    if on_gpu:
        assert expected % 256 == 0


def test_blocks_are_parts_of_chunks() -> None:
    assert block_tokens(128_256, 523, on_gpu=False) == 8
    assert block_tokens(128_256, 4096, on_gpu=True) == 523
    assert block_tokens(400, 100, on_gpu=False) == 100
    assert block_tokens(10_000_000, 32, on_gpu=False) == 4


@pytest.mark.parametrize(
    ("has_engine", "fuse_rope", "expected"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_rope_is_fused_where_transformer_engine_runs(
    has_engine: bool, fuse_rope: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "has_transformer_engine", lambda: has_engine)
    # Megatron refuses the key if Transformer Engine's kernel is missing.
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", object())
    session: Any = SimpleNamespace(parallel=Parallel(), on_gpu=False, kernels=Kernels(fuse_rope=fuse_rope))
    config = {**tiny_config("llama_mha").to_dict(), "architectures": ["LlamaForCausalLM"]}
    shape = read_shape(config, where="test")
    assert build.transformer_config(shape, session, "bf16").apply_rope_fusion is expected
