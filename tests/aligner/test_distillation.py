"""Offline distillation by NeMo-Aligner on the CPU: figures against transformers, and it learns."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.aligner import Border, Layout, ask_teacher, losses, train, training_config, write_rows
from tests.support.tiny_models import load_transformers, tiny_model_dir, tiny_tokenizer

pytestmark = pytest.mark.slow
ONE = Layout()
TOP_K, NUM_ROWS = 12, 10
"""Of the rows, two do not fill a file."""


def _border(root: Path, case: str, **sizes: Any) -> Border:
    return Border(tiny_model_dir(root, case, **sizes), root / case / "work").cross()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Border:
    return _border(tmp_path_factory.mktemp("teacher"), "llama_mha", seed=1)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Border:
    """A width-pruned shape."""
    return _border(tmp_path_factory.mktemp("student"), "llama_gqa_tied", head_dim=16)


@pytest.fixture(scope="module")
def cache(teacher: Border, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Name of the files of a cache."""
    return _cached(teacher, tmp_path_factory.mktemp("cache"))


def _cached(teacher: Border, root: Path, layout: Layout = ONE) -> Path:
    write_rows("topk_logits", root / "rows.jsonl", NUM_ROWS)
    out = root / "train_CHUNK_ID.jsonl"
    ask_teacher(teacher.nemo, root / "rows.jsonl", out, root / "work", top_k=TOP_K, layout=layout)
    return out


def _rows(cache: Path) -> list[dict[str, Any]]:
    files = [cache.with_name(cache.name.replace("CHUNK_ID", str(number))) for number in range(2)]
    assert not cache.with_name(cache.name.replace("CHUNK_ID", "2")).exists()
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@torch.no_grad()
def _log_probs(model: Path, tokens: list[int]) -> torch.Tensor:
    """[S, V]"""
    found: torch.Tensor = load_transformers(model)(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return found


def test_the_cache_holds_the_teachers_likeliest_tokens(teacher: Border, cache: Path) -> None:
    rows = _rows(cache)
    assert len(rows) == 8
    tokenizer = tiny_tokenizer()
    for number, row in enumerate(rows):
        whole = tokenizer(f"What is {number} and {number}?\nIt is {2 * number}.").input_ids
        assert [*row["tokens"], row["labels"][-1]] == whole
        assert row["labels"][:-1] == row["tokens"][1:]
        answer = tokenizer(f"It is {2 * number}.").input_ids
        assert row["loss_mask"] == [0] * (len(whole) - 1 - len(answer)) + [1] * len(answer)
        expected = _log_probs(teacher.model, row["tokens"]).topk(TOP_K)
        found = torch.tensor(row["topk_logits"]) - torch.tensor(row["log_sum_exp_logits"])[:, None]
        torch.testing.assert_close(found, expected.values, atol=1e-4, rtol=0.0)
        assert row["topk_token_ids"] == expected.indices.tolist()


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2), Layout(dp=2)], ids=["tp2", "pp2", "dp2"])
def test_every_layout_caches_the_same(layout: Layout, teacher: Border, cache: Path, tmp_path: Path) -> None:
    for one, other in zip(_rows(_cached(teacher, tmp_path, layout)), _rows(cache), strict=True):
        assert one["topk_token_ids"] == other["topk_token_ids"]
        for key in ("topk_logits", "log_sum_exp_logits"):
            torch.testing.assert_close(torch.tensor(one[key]), torch.tensor(other[key]), atol=1e-4, rtol=0.0)


def test_a_half_made_cache_is_made_whole(teacher: Border, cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(cache.parent, folder)
    name, files = folder / cache.name, sorted(folder.glob("train_*.jsonl"))
    kept, lost = files
    wanted = lost.read_bytes()
    lost.rename(lost.with_suffix(".partial"))  # as a kill leaves it
    before_ns = kept.stat().st_mtime_ns
    ask_teacher(teacher.nemo, folder / "rows.jsonl", name, folder / "work", top_k=TOP_K)
    assert lost.read_bytes() == wanted
    assert kept.stat().st_mtime_ns == before_ns
    assert sorted(folder.glob("train_*")) == files


def _plain_kl(student: Border, rows: list[dict[str, Any]]) -> float:
    """KL(teacher || student) over the teacher's tokens, each side made to sum to 1; mean of micro-batches of 2."""
    sums = []
    for row in rows:
        student_log = _log_probs(student.model, row["tokens"]).gather(1, torch.tensor(row["topk_token_ids"]))
        teacher_log = torch.tensor(row["topk_logits"]).log_softmax(-1)
        each = (teacher_log.exp() * (teacher_log - student_log.log_softmax(-1))).sum(-1)
        mask = torch.tensor(row["loss_mask"], dtype=torch.float32)
        sums.append((float((each * mask).sum()), float(mask.sum())))
    pairs = [(sums[i], sums[i + 1]) for i in range(0, len(sums), 2)]
    return sum((a[0] + b[0]) / (a[1] + b[1]) for a, b in pairs) / len(pairs)


def test_the_student_learns_the_teacher_and_comes_back(student: Border, cache: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    keys = {"model.data.n_chunks": 1}  # as many rows as a batch: their order does not matter
    config = training_config("knowledge_distillation", student.nemo, cache, work, num_steps=20, keys=keys)
    found = train("knowledge_distillation", config, student.nemo, work)
    # One micro-batch of all four rows would weigh tokens otherwise, so micro-batches are compared in any order.
    rows = _rows(cache)[:4]
    orders = ([0, 1, 2, 3], [0, 2, 1, 3], [0, 3, 1, 2])
    expected = [_plain_kl(student, [rows[i] for i in order]) for order in orders]
    assert any(losses(found)[0] == pytest.approx(value, rel=1e-4) for value in expected), (losses(found)[0], expected)
    assert losses(found, "val/loss")[-1] < 0.6 * losses(found)[0]
    tokens = torch.randint(0, 400, (2, 60), generator=torch.Generator().manual_seed(0))
    exported = student.back(tmp_path / "hf", work / "trained")
    with torch.no_grad():
        logits = load_transformers(exported)(tokens).logits
    torch.testing.assert_close(student.logits(tokens, work / "trained"), logits, atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2)], ids=["tp2", "pp2"])
def test_two_ranks_learn_what_one_does(layout: Layout, student: Border, cache: Path, tmp_path: Path) -> None:
    found = []
    for name, used in (("one", Layout()), ("two", layout)):
        work = tmp_path / name
        config = training_config("knowledge_distillation", student.nemo, cache, work, num_steps=3, layout=used)
        found.append(train("knowledge_distillation", config, student.nemo, work, used))
    for figure in ("train/loss", "train/grad_norm"):
        assert losses(found[1], figure) == pytest.approx(losses(found[0], figure), rel=1e-4), figure
