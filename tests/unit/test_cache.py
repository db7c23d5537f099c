"""The teacher cache: what is read is what was written, and everything else is an error."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from nemo_minitron.backends.megatron.distillation import teacher_cache
from nemo_minitron.distillation.cache import (
    FACTS_FILE,
    MAX_VOCAB_SIZE,
    SAMPLES_PER_SHARD,
    CacheFacts,
    TeacherCache,
    gives_kl,
    pack,
    require_same_keys,
    require_vocabulary,
    shard_name,
    unpack,
    write_facts,
    write_shard,
)
from nemo_minitron.distillation.sparse import SparseTeacher, sparse_kl, sparsify, uniforms_of
from nemo_minitron.errors import ArtifactError, PlanError
from nemo_minitron.schema.losses import Sampled, TopK
from nemo_minitron.stages.cache_teacher import run
from nemo_minitron.stages.distill.params import DistillStage

DRAWS, TOP_K = Sampled(kind="sampled", rounds=64), TopK(kind="top_k", k=9)
NUM_SAMPLES, LENGTH, VOCAB = 70, 6, 300


def _tokens(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, VOCAB, LENGTH)


def _teacher(number: int, sparse: Sampled | TopK) -> SparseTeacher:
    logits = torch.randn(LENGTH, VOCAB, generator=torch.Generator().manual_seed(number)) * 3
    return sparsify(logits, sparse, 1.0, uniforms_of(1, torch.tensor([number]), LENGTH, 64), vocab=_whole())


def _whole() -> object:
    from nemo_minitron.distillation.vocab import WHOLE

    return WHOLE


@pytest.fixture(params=[DRAWS, TOP_K], ids=["draws", "top_k"])
def sparse(request: pytest.FixtureRequest) -> Sampled | TopK:
    return request.param


@pytest.fixture
def folder(sparse: Sampled | TopK, tmp_path: Path) -> Path:
    facts = CacheFacts(sparse.model_dump(mode="json"), 1.0, VOCAB, LENGTH, NUM_SAMPLES, seed=1)
    for shard in range(facts.num_shards):
        entries = [pack(_teacher(number, sparse), _tokens(number), sparse) for number in facts.samples_of(shard)]
        write_shard(tmp_path, shard, entries)
    write_facts(tmp_path, facts)
    return tmp_path


def test_any_order_and_batch_gives_the_loss_of_what_was_written(folder: Path, sparse: Sampled | TopK) -> None:
    cache = TeacherCache(folder)
    numbers = [69, 0, 64, 63]
    found = cache.read(numbers, np.stack([_tokens(number) for number in numbers]))
    student = torch.randn(len(numbers) * LENGTH, VOCAB, generator=torch.Generator().manual_seed(99))
    loss, grad = sparse_kl(student.clone(), found, 1.0)
    for row, number in enumerate(numbers):
        rows = slice(row * LENGTH, (row + 1) * LENGTH)
        expected, expected_grad = sparse_kl(student[rows].clone(), _teacher(number, sparse), 1.0)
        # fp16 entropy; 14 bits of a log-probability.
        torch.testing.assert_close(loss[rows], expected, rtol=0, atol=3e-3)
        torch.testing.assert_close(grad[rows], expected_grad, rtol=0, atol=1e-6 if sparse is DRAWS else 7e-4)


def test_a_draw_takes_three_bytes_and_equal_draws_are_one_entry() -> None:
    teacher = SparseTeacher(
        torch.tensor([[7] * 60 + [MAX_VOCAB_SIZE - 1] * 4]), torch.full((1, 64), 1 / 64), torch.zeros(1)
    )
    entry = pack(teacher, np.array([1]), DRAWS)
    assert len(entry.payload) == 6
    ids, probs = unpack(entry, DRAWS)
    assert ids.tolist() == [[7, MAX_VOCAB_SIZE - 1]]
    assert probs.tolist() == [[60 / 64, 4 / 64]]


def test_quantised_probabilities_stay_within_the_stated_error() -> None:
    log_probs = -torch.rand(50, 9, generator=torch.Generator().manual_seed(0)).double() * 19
    teacher = SparseTeacher(torch.arange(9).expand(50, 9), log_probs.exp(), torch.zeros(50))
    _, probs = unpack(pack(teacher, np.arange(50), TOP_K), TOP_K)
    assert np.abs(probs / log_probs.exp().numpy() - 1).max() < 7e-4


def test_a_sample_that_is_not_there_is_an_error(folder: Path) -> None:
    with pytest.raises(ArtifactError, match="has no sample 70") as error:
        TeacherCache(folder).read([70], _tokens(0)[None])
    assert error.value.allowed == "0 to 69"


def test_another_text_is_an_error(folder: Path) -> None:
    with pytest.raises(ArtifactError, match="Sample 3 of the teacher cache has another text"):
        TeacherCache(folder).read([3], _tokens(4)[None])


@pytest.mark.parametrize("field", ["payload", "offset", "per_token", "negative_entropy", "checksum"])
def test_a_changed_byte_is_an_error(folder: Path, field: str) -> None:
    file = folder / shard_name(0)
    tensors = load_file(file)
    changed = tensors[field].copy()
    changed.reshape(-1)[0] += 1
    save_file({**tensors, field: changed}, file)
    with pytest.raises(ArtifactError, match="damaged"):
        TeacherCache(folder).read([0], _tokens(0)[None])


def test_a_missing_or_cut_off_shard_is_an_error(folder: Path) -> None:
    (folder / shard_name(1)).unlink()
    with pytest.raises(ArtifactError, match="damaged"):
        TeacherCache(folder).read([SAMPLES_PER_SHARD], _tokens(SAMPLES_PER_SHARD)[None])
    file = folder / shard_name(0)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="damaged"):
        TeacherCache(folder).read([0], _tokens(0)[None])


def test_another_format_is_an_error(folder: Path) -> None:
    facts = json.loads((folder / FACTS_FILE).read_text())
    (folder / FACTS_FILE).write_text(json.dumps({**facts, "format_version": 9, "a_field_of_it": 1}))
    with pytest.raises(ArtifactError, match="format 9"):
        TeacherCache(folder)


def test_vocabularies_up_to_2_to_the_18() -> None:
    require_vocabulary(MAX_VOCAB_SIZE)
    with pytest.raises(PlanError, match="262,145"):
        require_vocabulary(MAX_VOCAB_SIZE + 1)


def test_the_k_that_are_left_sum_to_one_after_rounding(tmp_path: Path) -> None:
    """Otherwise the gradient would change the sum of all logits."""
    dropped = TopK(kind="top_k", k=9, tail="drop")
    write_shard(tmp_path, 0, [pack(_teacher(0, dropped), _tokens(0), dropped)])
    write_facts(tmp_path, CacheFacts(dropped.model_dump(mode="json"), 1.0, VOCAB, LENGTH, 1, seed=1))
    found = TeacherCache(tmp_path).read([0], _tokens(0)[None])
    torch.testing.assert_close(found.probs.sum(-1), torch.ones(LENGTH), rtol=0, atol=3e-7)
    torch.testing.assert_close(found.probs, _teacher(0, dropped).probs, rtol=2e-3, atol=0)


FACTS = CacheFacts(DRAWS.model_dump(mode="json"), 2.0, VOCAB, LENGTH, 40, seed=1, valid_num_tokens=9)
KEYS = {
    "kind": "distill",
    "loss": {"logits": {"sparse": DRAWS.model_dump(), "temperature": 2.0}},
    "num_steps": 10,
    "global_batch_size": 4,
    "seq_len_tokens": LENGTH,
    "lr": 1.0,
    "seed": 1,
}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"loss": {"logits": {"sparse": DRAWS.model_dump()}}}, "temperature = 1.0, the cache has 2.0"),
        ({"loss": {"logits": {"temperature": 2.0}}}, "sparse = None, the cache has {'kind': 'sampled', 'rounds': 64}"),
        ({"seed": 2}, "seed = 2, the cache has 1"),
        ({"seq_len_tokens": 7}, "seq_len_tokens = 7, the cache has 6"),
        ({"reset_attention_mask": True}, "reset_attention_mask = True, the cache has False"),
        ({"num_steps": 11}, "num_steps \\* global_batch_size = 44, the cache has 40 samples"),
    ],
)
def test_a_distillation_with_other_keys_is_an_error(changed: dict, words: str, tmp_path: Path) -> None:
    require_same_keys(FACTS, DistillStage.model_validate(KEYS), tmp_path)
    with pytest.raises(ArtifactError, match=words):
        require_same_keys(FACTS, DistillStage.model_validate({**KEYS, **changed}), tmp_path)


def test_held_out_windows_have_shards_of_their_own_after_the_samples() -> None:
    facts = CacheFacts(DRAWS.model_dump(mode="json"), 1.0, VOCAB, LENGTH, NUM_SAMPLES, seed=1, num_heldout=66)
    assert [facts.samples_of(shard) for shard in range(facts.num_shards)] == [
        range(64),
        range(64, 70),
        range(128, 192),
        range(192, 194),
    ]
    known = [number for number in range(-1, 300) if facts.has(number)]
    assert known == [*range(70), *range(128, 194)]


def test_only_entries_at_temperature_1_that_drop_nothing_determine_the_kl() -> None:
    assert gives_kl(DRAWS, 1.0)
    assert gives_kl(TOP_K, 1.0)
    assert not gives_kl(DRAWS, 2.0)
    assert not gives_kl(TopK(kind="top_k", k=9, tail="drop"), 1.0)


@pytest.mark.parametrize("num_written", [1, 2])
def test_a_cache_without_a_shard_is_not_published(
    num_written: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On several nodes, the folder listing of one node may lack a file that another one has written."""
    facts = CacheFacts(DRAWS.model_dump(mode="json"), 1.0, VOCAB, LENGTH, NUM_SAMPLES, seed=1)
    ctx: Any = SimpleNamespace(work_dir=tmp_path / "work", out_dir=tmp_path / "out", is_main=True)
    ctx.open_session = ctx.progress = ctx.check_stop = None
    for folder in (ctx.work_dir, ctx.out_dir):
        folder.mkdir()
    for shard in range(num_written):
        (ctx.work_dir / shard_name(shard)).write_bytes(b"1234")
    monkeypatch.setattr(teacher_cache, "write_cache", lambda *_, **__: facts)
    monkeypatch.setattr(run, "require_one_tokenizer", lambda *_: None)
    inputs: Any = SimpleNamespace(teacher=SimpleNamespace(path=tmp_path), data=SimpleNamespace(path=tmp_path))
    params: Any = None
    if num_written < facts.num_shards:
        with pytest.raises(ArtifactError, match=r"shard_000001\.safetensors of 2 shards is missing"):
            run.cache_teacher(params, inputs, ctx)
    else:
        found = run.cache_teacher(params, inputs, ctx)
        assert found["bytes_per_token"] == 8 / (NUM_SAMPLES * LENGTH)
        assert sorted(path.name for path in ctx.out_dir.iterdir()) == [FACTS_FILE, shard_name(0), shard_name(1)]
