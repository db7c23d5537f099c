"""A teacher cache is the same in every layout that writes it, and trains the same student in every layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from nemo_minitron.backends.megatron.runtime import torch_versions
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.schema.losses import LogitsLoss, Loss, Sampled, TopK
from nemo_minitron.stages.cache_teacher.params import CacheTeacherStage
from nemo_minitron.stages.distill.params import DistillStage
from tests.support.distributed import run_ranks
from tests.support.megatron_ranks import (
    cache_shards,
    cached_losses,
    distill_losses,
    heldout_kls,
    teacher_losses,
    unequal_cache_shards,
)
from tests.support.tiny_data import tiny_data_dir
from tests.support.tiny_models import tiny_model_dir

DRAWS = Sampled(kind="sampled", rounds=20)
CACHE = CacheTeacherStage(
    kind="cache_teacher", sparse=DRAWS, num_samples=80, seq_len_tokens=32, precision="fp32", valid_num_tokens=256
)
WRITERS = {
    "one process": Parallel(micro_batch_size=4),
    "other batches": Parallel(micro_batch_size=7),
    "tp2": Parallel(tp=2, micro_batch_size=4),
    "pp2, batches that do not divide": Parallel(pp=2, micro_batch_size=3),
    "dp2": Parallel(dp=2, micro_batch_size=2),
}
READERS = {
    "cp2": Parallel(cp=2, micro_batch_size=2),
    "tp2 with sequence parallel": Parallel(tp=2, sequence_parallel=True, micro_batch_size=2),
    "pp2": Parallel(pp=2),
    "dp2": Parallel(dp=2),
}


def _distill(sparse: Sampled | TopK, **keys: object) -> DistillStage:
    return DistillStage(
        kind="distill",
        loss=Loss(logits=LogitsLoss(sparse=sparse)),
        num_steps=20,
        global_batch_size=4,
        seq_len_tokens=32,
        lr=2e-3,
        adam_eps=1e-6,  # otherwise rounding decides the sign of steps by near-zero gradients
        warmup_steps=2,
        precision="fp32",
        valid_interval_steps=10,
        valid_num_tokens=256,
        save_interval_steps=100,
        **keys,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("cache")
    found = {
        "student": tiny_model_dir(root / "student", "llama_gqa_tied", intermediate_size=64, seed=1, vocab_size=510),
        "teacher": tiny_model_dir(root / "teacher", "llama_gqa_tied", vocab_size=510),
        "data": tiny_data_dir(root / "data", vocab_size=510),
        "root": root,
    }
    for name, parallel in WRITERS.items():
        _write(name, CACHE, parallel, found)
    return found


def _write(name: str, params: CacheTeacherStage, parallel: Parallel, folders: dict[str, Path]) -> Path:
    out = folders["root"] / name
    out.mkdir()
    run_ranks(parallel.world_size, cache_shards, params, parallel, folders["teacher"], folders["data"], out)
    return out


def _read(name: str, parallel: Parallel, cache: Path, params: DistillStage, folders: dict[str, Path]) -> tuple:
    work = folders["root"] / f"work {name}"
    work.mkdir()
    order = (params, parallel, folders["student"], cache, folders["data"], work)
    return run_ranks(parallel.world_size, cached_losses, *order)[0]


@pytest.mark.skipif(torch_versions._VERSION < (2, 9), reason="the timeout of an open gloo group does not change")
def test_ranks_with_fewer_shards_wait_for_the_others(tmp_path: Path) -> None:
    teacher, data = tiny_model_dir(tmp_path / "teacher", "llama_gqa_tied"), tiny_data_dir(tmp_path / "data")
    work = tmp_path / "cache"
    work.mkdir()
    run_ranks(2, unequal_cache_shards, CACHE, Parallel(dp=2), teacher, data, work, 4.0)
    assert len(list(work.glob("shard_*"))) == 3, "two of them by rank 0"


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "one process"])
def test_every_layout_writes_the_same_draws(name: str, folders: dict[str, Path]) -> None:
    """With rounded logits, a draw at the border of two tokens may give either of them."""
    one, other = (_distributions(folders["root"] / writer) for writer in ("one process", name))
    assert one.shape == other.shape == (80 * 32, 510)
    same = np.isclose(one, other).all(axis=1)
    assert same.mean() >= 0.995
    # A draw that moved is one of twenty.
    assert np.abs(one - other).max() <= 0.1


def _distributions(folder: Path) -> NDArray:
    """Return the distributions [samples * S, V] of a whole cache, without the checks of its reader."""
    from safetensors import safe_open

    from nemo_minitron.distillation.cache import _read_entry, unpack

    out = []
    for number in range(80):
        with safe_open(folder / f"shard_{number // 64:06d}.safetensors", framework="np") as shard:
            ids, probs = unpack(_read_entry(shard, number % 64)[0], DRAWS)
        dense = np.zeros((32, 510))
        np.add.at(dense, (np.arange(32)[:, None], ids), probs)
        out.append(dense)
    return np.concatenate(out)


def test_every_layout_trains_to_the_same_result_from_the_cache(folders: dict[str, Path]) -> None:
    params, cache = _distill(DRAWS), folders["root"] / "one process"
    train, valid = _read("one", Parallel(micro_batch_size=4), cache, params, folders)
    assert valid[-1] < valid[0], "the student must learn for this to mean anything"
    for name, parallel in READERS.items():
        found_train, found_valid = _read(name, parallel, cache, params, folders)
        np.testing.assert_allclose(found_train, train, atol=2e-5, err_msg=name)
        np.testing.assert_allclose(found_valid, valid, atol=2e-5, err_msg=name)


def test_all_of_the_vocabulary_from_the_cache_is_the_live_teacher(folders: dict[str, Path]) -> None:
    """The losses agree up to quantization, with and without attention across documents."""
    everything, expected = TopK(kind="top_k", k=510), []
    for apart in (False, True):
        keys = {"sparse": everything, "reset_attention_mask": apart}
        parallel, name = Parallel(micro_batch_size=4), f"everything {apart}"
        params = _distill(everything, reset_attention_mask=apart)
        cache = _write(name, CACHE.model_copy(update=keys), parallel, folders)
        train, _ = _read(name, parallel, cache, params, folders)
        work = folders["root"] / f"live {apart}"
        work.mkdir()
        live = DistillStage.model_validate({**params.model_dump(), "loss": {}})
        order = (live, parallel, folders["student"], folders["teacher"], folders["data"], work)
        expected.append(run_ranks(1, distill_losses, *order)[0][0])
        np.testing.assert_allclose(train, expected[-1], atol=3e-3)
    assert np.abs(np.subtract(*expected)).max() > 1e-2, "the mask must matter for this to mean anything"


def test_the_cache_has_the_teachers_loss(folders: dict[str, Path]) -> None:
    losses = [json.loads((folders["root"] / name / "cache.json").read_text())["valid_teacher_loss"] for name in WRITERS]
    np.testing.assert_allclose(losses, losses[0], atol=1e-5)
    params, work = _distill(DRAWS), folders["root"] / "teacher loss"
    order = (params, params, *(folders[key] for key in ("student", "teacher")))
    rest = (folders["root"] / "one process", folders["data"], work)
    live, cached = run_ranks(1, teacher_losses, *order, *rest)[0]
    assert cached == losses[0]
    np.testing.assert_allclose(cached, live, atol=1e-5)
    # The loss of other text is not known.
    fewer = params.model_copy(update={"valid_num_tokens": 128})
    assert run_ranks(1, teacher_losses, fewer, fewer, *order[2:], *rest)[0][1] is None


def _kls(name: str, caches: list[tuple[str, Sampled | TopK]], folders: dict[str, Path], **keys: object) -> list:
    """Return the held-out KL of the untrained student to the live teacher, and to each (cache, kind of entries)."""
    work = folders["root"] / f"kl {name}"
    work.mkdir()
    live = DistillStage.model_validate({**_distill(DRAWS).model_dump(), "loss": {}, **keys})
    orders = [live, *(_distill(sparse).model_copy(update=keys) for _, sparse in caches)]
    sources = [folders["teacher"], *(folders["root"] / cache for cache, _ in caches)]
    parallel = READERS.get(name, Parallel())
    order = (orders, parallel, folders["student"], sources, folders["data"], work)
    return heldout_kls(*order) if name not in READERS else run_ranks(parallel.world_size, heldout_kls, *order)[0]


def _write_here(name: str, folders: dict[str, Path], **keys: object) -> None:
    out = folders["root"] / name
    out.mkdir()
    params, parallel = CACHE.model_copy(update=keys), Parallel(micro_batch_size=4)
    cache_shards(params, parallel, folders["teacher"], folders["data"], out)


def test_held_out_kl_to_all_of_the_vocabulary_is_that_to_the_live_teacher(folders: dict[str, Path]) -> None:
    """The KL of a part with a ghost token is a lower bound."""
    kept = {"kl all": TopK(kind="top_k", k=510), "kl some": TopK(kind="top_k", k=64)}
    for name, sparse in kept.items():
        _write_here(name, folders, sparse=sparse)
    live, whole, part = _kls("top-k", list(kept.items()), folders)
    assert abs(whole - live) < 1e-3
    assert 0.5 * live < part < live - 0.1


def test_held_out_kl_of_draws_is_that_to_the_live_teacher(folders: dict[str, Path]) -> None:
    draws, shards = Sampled(kind="sampled", rounds=64), range(2, 10)
    for number in shards:
        # The windows are numbered after the samples, so with more samples their draws differ.
        _write_here(f"draws {number}", folders, sparse=draws, num_samples=64 * number)
    live, *found = _kls("draws", [(f"draws {number}", draws) for number in shards], folders)
    error = np.std(found, ddof=1)
    assert 0 < error < 0.01 * live
    assert abs(np.mean(found) - live) < 3 * error / len(found) ** 0.5


def test_every_layout_has_the_same_held_out_kl(folders: dict[str, Path]) -> None:
    """The KL is the same for all layouts of writer and reader; for other text there is none."""
    live, *found = _kls("one", [(writer, DRAWS) for writer in WRITERS], folders)
    np.testing.assert_allclose(found, found[0], atol=2e-3)
    for name in READERS:
        np.testing.assert_allclose(_kls(name, [("one process", DRAWS)], folders), [live, found[0]], atol=1e-4)
    assert _kls("other text", [("one process", DRAWS)], folders, valid_num_tokens=128)[1] is None


def test_a_killed_writer_continues_with_the_missing_shards(folders: dict[str, Path]) -> None:
    parallel, out = WRITERS["dp2"], folders["root"] / "killed"
    shutil.copytree(folders["root"] / "dp2", out)
    kept, lost = out / "shard_000000.safetensors", out / "shard_000001.safetensors"
    whole, before = lost.read_bytes(), kept.stat().st_mtime_ns
    # A kill leaves a file under another name, half-written.
    (out / f".{lost.name}.partial").write_bytes(whole[:100])
    lost.unlink()
    run_ranks(2, cache_shards, CACHE, parallel, folders["teacher"], folders["data"], out)
    assert kept.stat().st_mtime_ns == before
    assert lost.read_bytes() == whole


def test_other_samples_than_the_cached_ones_are_an_error(folders: dict[str, Path]) -> None:
    other = tiny_data_dir(folders["root"] / "other data", vocab_size=510, seed=5)
    with pytest.raises(AssertionError, match="has another text"):
        _read("other", Parallel(), folders["root"] / "one process", _distill(DRAWS), {**folders, "data": other})
