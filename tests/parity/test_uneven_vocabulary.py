"""Tensor-parallel ranks with different numbers of vocabulary rows divide the tokens into the same chunks and blocks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open

from nemo_minitron.distillation.cache import _read_entry, unpack
from nemo_minitron.schema.execution import Kernels, Parallel
from nemo_minitron.schema.losses import LogitsLoss, Loss, Sampled, TopK
from nemo_minitron.stages.cache_teacher.params import CacheTeacherStage
from tests.support.distributed import run_ranks
from tests.support.gradients import gradients_and_losses
from tests.support.megatron_ranks import cache_shards
from tests.support.tiny_data import tiny_data_dir
from tests.support.tiny_models import tiny_model_dir

CHUNK_BYTES, BLOCK_BYTES = 2**15, 2**13
VOCAB = 257
ROWS = {257: (129, 128), 262: (131, 126)}
"""Teacher's vocabulary -> rows of the common tokens on each of two ranks, which split both models equally."""
LOSSES = {
    "forward KL": Loss(),
    "KL and next token, balanced": Loss(next_token="balanced"),
    "more entries than a rank has tokens": Loss(logits=LogitsLoss(sparse=TopK(kind="top_k", k=200))),
    "more entries than there are tokens": Loss(logits=LogitsLoss(sparse=TopK(kind="top_k", k=400, tail="drop"))),
    "draws": Loss(logits=LogitsLoss(sparse=Sampled(kind="sampled", rounds=20))),
}
ONE, TWO = Parallel(micro_batch_size=2), Parallel(tp=2, micro_batch_size=2)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return {
        "student": tiny_model_dir(tmp_path / "student", "llama_mha", vocab_size=VOCAB, intermediate_size=64, seed=1),
        "data": tiny_data_dir(tmp_path / "data", vocab_size=VOCAB),
        "work": tmp_path / "work",
    }


@pytest.mark.parametrize("teacher_vocab", ROWS)
@pytest.mark.parametrize("fused_kl", ["off", "torch"])
def test_gradients_and_losses_equal_those_of_one_process(
    fused_kl: str, teacher_vocab: int, folders: dict[str, Path], tmp_path: Path
) -> None:
    most, fewest = ROWS[teacher_vocab]
    assert BLOCK_BYTES // (4 * most) == 15, "the blocks of the first rank"
    assert BLOCK_BYTES // (4 * fewest) == 16, "those that the last rank would have of its own"
    folders = {**folders, "teacher": tiny_model_dir(tmp_path / "teacher", "llama_mha", vocab_size=teacher_vocab)}
    losses = LOSSES if fused_kl == "off" else {"forward KL": Loss()}
    options = (folders, Kernels(fused_kl=fused_kl), CHUNK_BYTES, BLOCK_BYTES)
    (expected, *numbers), (found, *others) = (
        run_ranks(parallel.world_size, gradients_and_losses, losses, parallel, *options)[0] for parallel in (ONE, TWO)
    )
    for name, (gradients, values) in expected.items():
        assert found[name][1] == pytest.approx(values, rel=1e-9), name
        for parameter, gradient in gradients.items():
            error = np.linalg.norm(found[name][0][parameter] - gradient) / np.linalg.norm(gradient)
            assert error < 1e-9, (name, parameter)
    assert others == [pytest.approx(number, rel=1e-9) for number in numbers]


def test_a_cache_of_all_tokens_is_that_of_one_process(folders: dict[str, Path], tmp_path: Path) -> None:
    every = TopK(kind="top_k", k=400)
    params = CacheTeacherStage(
        kind="cache_teacher", sparse=every, num_samples=8, seq_len_tokens=32, precision="fp32", valid_num_tokens=64
    )
    found = []
    for parallel in (ONE, TWO):
        out = tmp_path / f"cache {parallel.tp}"
        out.mkdir()
        run_ranks(parallel.world_size, cache_shards, params, parallel, folders["student"], folders["data"], out)
        found.append(_distributions(out, every))
    assert found[0].sum(1) == pytest.approx(1.0, abs=1e-3)
    assert found[1] == pytest.approx(found[0], rel=2e-3, abs=1e-6)


def _distributions(folder: Path, sparse: TopK) -> NDArray:
    """Return the distributions [samples * S, V] of the first samples, each of which must have every token once."""
    out = []
    with safe_open(folder / "shard_000000.safetensors", framework="np") as shard:
        for number in range(8):
            ids, probs = unpack(_read_entry(shard, number)[0], sparse)
            assert (np.sort(ids, axis=1) == np.arange(VOCAB)).all()
            dense = np.zeros((32, VOCAB))
            np.put_along_axis(dense, ids, probs, axis=1)
            out.append(dense)
    return np.concatenate(out)
