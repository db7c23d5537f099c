"""The toy model through SteerLM: it learns ratings, rates answers, and answers as briefly as it is told to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import REPO, Cli
from tests.support.aligner import finished

pytestmark = pytest.mark.slow

ASKED = "Spell moor."


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    return finished(REPO / "recipes/toy/steerlm.yaml", tmp_path_factory.mktemp("steerlm"))


def _result(run: Path, stage: str) -> dict[str, Any]:
    return json.loads((run / stage / "manifest.json").read_text())["result"]


def test_both_trainings_lower_the_loss(run: Path) -> None:
    for stage in ("attribute_model", "steerlm_sft"):
        result = _result(run, stage)
        assert result["valid_loss"] < result["first_valid_loss"], stage


def test_the_attribute_model_agrees_with_the_raters(run: Path) -> None:
    agreement = _result(run, "attribute_model")["agreement"]
    for name in ("helpfulness", "verbosity"):
        assert agreement[name]["r2_over_mean"] > 0.9, name
        assert agreement[name]["pearson"] > 0.95, name


def test_answers_are_rated_as_people_had_rated_them(run: Path) -> None:
    raters = [json.loads(line) for line in (REPO / "nemo_minitron/toy/chats.jsonl").read_text().splitlines()]
    known = {(row["prompt"], row["response"]): row for row in raters}
    rows = [json.loads(line) for part in ("train", "valid") for line in (run / f"annotate/{part}.jsonl").open()]
    assert len(rows) == 400  # 240 chats without their ratings, 160 answers that never had any
    assert all(row["attributes"].keys() == {"helpfulness", "verbosity"} for row in rows)
    texts = [tuple(message["content"] for message in row["messages"]) for row in rows]
    errors = [
        abs(row["attributes"][name] - known[text][name])
        for row, text in zip(rows, texts, strict=True)
        if text in known
        for name in ("helpfulness", "verbosity")
    ]
    assert len(errors) == 480
    assert sum(errors) / len(errors) < 0.1


def test_the_length_of_answers_follows_the_requested_verbosity(run: Path) -> None:
    found = json.loads((run / "evaluate_steerlm/metrics.json").read_text())["attribute"]
    assert found["prompts"] == 16
    assert found["rank_correlation"] - 4 * found["se"] > 0.3
    assert found["mean_tokens_by_level"]["4"] > 2 * found["mean_tokens_by_level"]["0"]


def test_plain_transformers_passes_attributes_to_the_exported_model(run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(run / "export", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(run / "export", local_files_only=True)
    said = [{"role": "user", "content": ASKED}]
    wished = {"helpfulness": 4, "verbosity": 0}
    text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True, attributes=wished)
    assert text.endswith("<|im_start|>assistant\nAttributes: helpfulness:4,verbosity:0\n")
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    made = model.generate(ids, do_sample=False, max_new_tokens=48, stop_strings=["<|im_end|>"], tokenizer=tokenizer)
    assert "-" in tokenizer.decode(made[0, ids.shape[1] :])


def test_chat_answers_are_as_long_as_requested(run: Path, minitron: Cli) -> None:
    told = {}
    for verbosity in (0, 4):
        code, told[verbosity] = minitron(
            "chat", run, "--once", ASKED, "--attributes", f"helpfulness=4,verbosity={verbosity}"
        )
        assert code == 0
        assert "im_end" not in told[verbosity]
    assert len(told[4]) > len(told[0])


def test_the_report_shows_ratings_lengths_and_answers_to_each_wish(run: Path) -> None:
    told = (run / "report.md").read_text()
    assert "rank correlation of length and verbosity" in told
    assert "Attribute model and human ratings" in told
    assert "| verbosity | 0 | 1 | 2 | 3 | 4 |" in told
    page = (run / "report.html").read_text()
    assert page.count("<h4>verbosity 0</h4>") == page.count("<h4>verbosity 4</h4>") == 3
