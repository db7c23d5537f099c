"""Real trainings by NeMo-Aligner on the CPU: they learn, they go on, and every layout computes the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from nemo_minitron.backends.alignment.nemo_aligner.config import Method
from nemo_minitron.backends.alignment.nemo_aligner.process import run_task
from tests.support.aligner import Border, Layout, curves, losses, quiet, reward_head, train, training_config, write_rows
from tests.support.processes import MARK, marked
from tests.support.tiny_models import load_transformers, tiny_model_dir

pytestmark = pytest.mark.slow

NUM_ROWS = 24
ONE_MICRO_BATCH = {
    f"model.{section}micro_batch_size": NUM_ROWS for section in ("", "data.train_ds.", "data.validation_ds.")
}
"""A batch's loss is the mean over micro-batches of the mean over tokens, which depends on the order of the rows."""
METHODS: dict[str, tuple[Method, dict[str, Any]]] = {
    "sft": ("sft", ONE_MICRO_BATCH),
    "attribute-conditioned sft": ("sft", ONE_MICRO_BATCH),
    **{kind: ("dpo", {"model.dpo.preference_loss": kind}) for kind in ("dpo", "ipo", "rpo_sq", "rpo_bwd_kl")},
    "rpo_fwd_kl": ("dpo", {"model.dpo.preference_loss": "rpo_fwd_kl"}),
    "regression": ("reward_model", {}),
    "ranking": (
        "reward_model",
        {
            "model.reward_model_type": "binary_ranking",
            "model.regression.num_attributes": 1,
            "model.micro_batch_size": 1,
            "model.forward_micro_batch_size": 1,
        },
    ),
}


@pytest.fixture(scope="module")
def border(tmp_path_factory: pytest.TempPathFactory) -> Border:
    """A width-pruned Llama in NeMo's form."""
    root = tmp_path_factory.mktemp("aligner")
    model = tiny_model_dir(root, "llama_gqa_tied", head_dim=16)
    return Border(model, root / "work").cross()


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_goes_down_and_the_model_comes_back(name: str, border: Border, tmp_path: Path) -> None:
    method, keys = METHODS[name]
    rows, work = tmp_path / "rows.jsonl", tmp_path / "work"
    write_rows(method, rows, NUM_ROWS, ranking=name == "ranking", conditioned=name.startswith("attribute"))
    # Batches of all rows: the first training loss and the first validation are the untouched model's on the same rows.
    config = training_config(method, border.nemo, rows, work, num_steps=12, rows_per_batch=NUM_ROWS, keys=keys)
    found = train(method, config, border.nemo, work)
    assert losses(found, "val/loss")[0] == pytest.approx(losses(found)[0], rel=1e-4)
    assert losses(found, "val/loss")[-1] < losses(found)[0]
    exported = load_transformers(border.back(tmp_path / "hf", work / "trained"))
    if method == "reward_model":
        expected = rewards_by_transformers(exported, work / "trained", rows, border.model)
        torch.testing.assert_close(torch.tensor(ratings(border, rows, work)), expected, atol=1e-4, rtol=0.0)
        return
    tokens = torch.randint(0, 400, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = exported(tokens).logits
    torch.testing.assert_close(border.logits(tokens, work / "trained"), expected, atol=1e-4, rtol=0.0)


def ratings(border: Border, rows: Path, work: Path) -> list[list[float]]:
    """What the reward model trained in `work` says of every row, by `annotate`."""
    tokenizer = border.nemo.with_name("nemo.tokenizer")
    paths = {"nemo": work / "trained", "tokenizer": tokenizer, "rows": rows, "out": work / "found.jsonl"}
    task = {**{key: str(path) for key, path in paths.items()}, "batch_size": 5}
    run_task("annotate", task, work / "annotation", work / "log.txt", *quiet())
    return [json.loads(line) for line in (work / "found.jsonl").read_text().splitlines()]


@torch.no_grad()
def rewards_by_transformers(trunk: Any, nemo: Path, rows: Path, model_dir: Path) -> torch.Tensor:
    """The head's numbers, [row, attribute], at the last token of each text, from transformers' hidden states."""
    weight, bias = reward_head(nemo)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    texts = [json.loads(line)["text"] for line in rows.read_text().splitlines()]
    tokens = [torch.tensor([tokenizer(text, add_special_tokens=False).input_ids]) for text in texts]
    last = torch.cat([trunk.model(row).last_hidden_state[:, -1] for row in tokens])
    return last @ weight.T + bias


LAYOUTS = {"tp2": Layout(tp=2), "pp2": Layout(pp=2), "dp2": Layout(dp=2)}


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_two_ranks_compute_what_one_does(method: Method, border: Border, tmp_path: Path) -> None:
    # As many rows as a batch: data-parallel ranks draw theirs in another order.
    write_rows(method, tmp_path / "rows.jsonl", num_rows=4)
    found = {}
    for name, layout in {"one": Layout(), **LAYOUTS}.items():
        work = tmp_path / name
        config = training_config(method, border.nemo, tmp_path / "rows.jsonl", work, num_steps=3, layout=layout)
        found[name] = train(method, config, border.nemo, work, layout)
    for name in LAYOUTS:
        for figure in ("train/loss", "train/grad_norm"):
            expected = losses(found["one"], figure)
            assert losses(found[name], figure) == pytest.approx(expected, rel=1e-4), (name, figure)


def test_a_killed_training_goes_on_with_the_same_losses(border: Border, tmp_path: Path) -> None:
    write_rows("sft", tmp_path / "rows.jsonl", num_rows=24)

    def config(work: Path) -> dict[str, Any]:
        return training_config("sft", border.nemo, tmp_path / "rows.jsonl", work, num_steps=10)

    whole = train("sft", config(tmp_path / "whole"), border.nemo, tmp_path / "whole")
    work = tmp_path / "killed"
    child = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tests.support.aligner_child",
            str(border.nemo),
            str(tmp_path / "rows.jsonl"),
            str(work),
        ],
        env=os.environ | {MARK: str(work)},
        start_new_session=True,
    )
    _wait_for_step(work, 5, child)
    child.send_signal(signal.SIGKILL)  # NeMo-Aligner's processes follow by themselves
    child.wait()
    _wait_for_end(str(work))
    found = train("sft", config(work), border.nemo, work)
    assert losses(found) == pytest.approx(losses(whole), rel=1e-6)
    assert losses(found, "val/loss")[-1] == pytest.approx(losses(whole, "val/loss")[-1], rel=1e-6)


def _wait_for_step(work: Path, step: int, child: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 300
    while time.monotonic() < until and child.poll() is None:
        if (work / "curves.jsonl").is_file() and curves(work) and curves(work)[-1]["step"] >= step:
            return
        time.sleep(0.05)
    raise AssertionError("the training ended before it could be killed")


def _wait_for_end(mark: str) -> None:
    until = time.monotonic() + 60
    while left := list(marked(mark)):
        assert time.monotonic() < until, f"these outlive their runner: {[found.cmdline() for found in left]}"
        time.sleep(0.2)


def test_an_attribute_model_gives_numbers_to_every_row(border: Border, tmp_path: Path) -> None:
    rows, work = tmp_path / "rows.jsonl", tmp_path / "work"
    write_rows("reward_model", rows)
    config = training_config("reward_model", border.nemo, rows, work, num_steps=40)
    train("reward_model", config, border.nemo, work)
    helpfulness = [rating[4] for rating in ratings(border, rows, work)]
    right, wrong = helpfulness[1::2], helpfulness[::2]
    assert len(helpfulness) == 24
    assert min(right) > max(wrong)
