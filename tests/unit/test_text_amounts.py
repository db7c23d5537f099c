"""Warnings about too little training text and too little held-out text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.artifacts.store import Store
from nemo_minitron.errors import ArtifactError
from nemo_minitron.plan.heldout_rows import heldout_warnings
from nemo_minitron.plan.text_amounts import too_little_text
from nemo_minitron.schema.base import StageParams
from nemo_minitron.stages.registry import STAGES

COMMON = {"lr": 1e-3, "num_steps": 10, "global_batch_size": 4, "seq_len_tokens": 16, "valid_num_tokens": 600}
RETRAINING = {"lr": 1e-3, "global_batch_size": 4, "seq_len_tokens": 16}


def tokenized(root: Path, name: str, train: int, valid: int) -> None:
    (root / name).mkdir()
    source = {"source": "a.txt", "weight": 1.0}
    facts = {"train": [{**source, "num_tokens": train}], "valid": [{**source, "num_tokens": valid}]}
    (root / name / "data.json").write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("stage", "key"),
    [
        ({"kind": "train", **COMMON}, "valid_num_tokens"),
        ({"kind": "distill", **COMMON}, "valid_num_tokens"),
        ({"kind": "distill_layers", **COMMON}, "valid_num_tokens"),
        (
            {"kind": "cache_teacher", "num_samples": 4, "seq_len_tokens": 16, "valid_num_tokens": 600},
            "valid_num_tokens",
        ),
        ({"kind": "evaluate", "label": "one", "num_tokens": 600, "inputs": {"model": "distill"}}, "num_tokens"),
        ({"kind": "check_teacher", "max_loss": 3.0, "num_tokens": 600}, "num_tokens"),
        ({"kind": "compensate", "heldout_tokens": 600}, "heldout_tokens"),
    ],
)
def test_a_short_held_out_part_is_said(stage: dict[str, object], key: str, tmp_path: Path) -> None:
    tokenized(tmp_path, "data", train=1_000_000, valid=599)
    params = STAGES[str(stage["kind"])].params.model_validate(stage)
    (warning,) = too_little_text("one", params, Store(tmp_path), {"data"})
    assert warning.startswith(f"stages.one.{key} = 600: the held-out part of stages.data has only 599 tokens.")
    assert list(too_little_text("one", params, Store(tmp_path), set())) == []
    tokenized(tmp_path, "enough", train=1_000_000, valid=600)
    (tmp_path / "data/data.json").write_bytes((tmp_path / "enough/data.json").read_bytes())
    assert list(too_little_text("one", params, Store(tmp_path), {"data"})) == []


def test_a_repair_is_judged_on_the_text_that_it_names(tmp_path: Path) -> None:
    tokenized(tmp_path, "data", train=1_000_000, valid=1_000_000)
    tokenized(tmp_path, "novel", train=1_000_000, valid=10)
    stage = {"kind": "compensate", "inputs": {"heldout": "novel"}}
    params = STAGES["compensate"].params.model_validate(stage)
    (warning,) = too_little_text("repair", params, Store(tmp_path), {"data", "novel"})
    assert "the held-out part of stages.novel has only 10 tokens" in warning


@pytest.mark.parametrize(
    "stage",
    [
        {"kind": "compensate"},
        {"kind": "score_reconstruction"},
        {"kind": "search", "grid": {"num_layers": [3]}, "retraining": RETRAINING, "compensation": {}},
    ],
)
def test_calibration_text_that_would_be_read_again_is_said(stage: dict[str, Any], tmp_path: Path) -> None:
    """256 samples of 512 tokens: the second half would be the first once more, and least squares learns nothing."""
    tokenized(tmp_path, "data", train=65_536, valid=1_000_000)
    params = STAGES[stage["kind"]].params.model_validate(stage)
    (warning,) = too_little_text("one", params, Store(tmp_path), {"data"})
    assert warning.startswith("stages.one: of 131,072 calibration tokens (num_samples * seq_len_tokens), only 65,536 ")
    assert "a.txt will be read 2.0 times" in warning
    tokenized(tmp_path, "enough", train=131_072, valid=1_000_000)
    (tmp_path / "data/data.json").write_bytes((tmp_path / "enough/data.json").read_bytes())
    assert list(too_little_text("one", params, Store(tmp_path), {"data"})) == []


def test_damaged_facts_end_in_a_message_and_missing_ones_in_none(tmp_path: Path) -> None:
    params = STAGES["train"].params.model_validate({"kind": "train", **COMMON})
    assert list(too_little_text("one", params, Store(tmp_path), {"data"})) == []
    (tmp_path / "data").mkdir()
    (tmp_path / "data/data.json").write_text('{"train": []}')
    with pytest.raises(ArtifactError, match="does not list its sources"):
        list(too_little_text("one", params, Store(tmp_path), {"data"}))


def test_two_stages_that_split_the_same_rows_differently_are_named() -> None:
    def chats(source: str, valid_rows: int, seed: int = 1) -> StageParams:
        keys = {"kind": "chat_data", "rows": "conversations", "sources": [{"source": source}]}
        return STAGES["chat_data"].params.model_validate({**keys, "valid_rows": valid_rows, "seed": seed})

    same = {"one": chats("a.jsonl", 24), "two": chats("a.jsonl", 24), "three": chats("b.jsonl", 8)}
    assert list(heldout_warnings(same)) == []
    (warning,) = heldout_warnings({**same, "three": chats("b.jsonl", 8), "four": chats("b.jsonl", 16)})
    assert warning.startswith("stages.three and stages.four both read b.jsonl, with valid_rows = 8 and 16")
    assert len(list(heldout_warnings({**same, "two": chats("a.jsonl", 24, seed=2)}))) == 1


@pytest.mark.parametrize("kind", ["cache_teacher", "candidate"])
def test_the_tokens_that_a_teacher_or_a_candidate_has_read_are_counted(kind: str) -> None:
    assert STAGES[kind].result_tokens({"num_samples": 4, "tokens": 2048}) == 2048
