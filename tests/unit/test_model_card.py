"""Tests of the model card."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from nemo_minitron.report.model_card import render_card

SHAPE = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96}
FACTS: dict[str, Any] = {
    "num_params": 50,
    "dtype": "bfloat16",
    "checkpoint_bytes": 3 * 2**20,
    "shape": {**SHAPE, "ffn_hidden_size": 48},
}
TEACHER: dict[str, Any] = {"num_params": 100, "license": "llama3.1", "source": "hf:org/Llama-x", "shape": SHAPE}
DISTILLED = {
    "loss": "forward KL to the live teacher's logits, no other loss",
    "tokens": 143_360,
    "num_steps": 140,
    "initial_valid_loss": 5.2264,
    "final_valid_loss": 4.0541,
    "final_valid_teacher_loss": 3.4801,
    "data_sources": ["asset:books", "my`text`.jsonl"],
}
METRICS = [
    {
        "label": label,
        "num_params": 100,
        "bits_per_byte": 1.1,
        "perplexity": 31.2,
        "tasks_limit": 100,
        "tasks": {"sciq": {"acc": 0.75, "acc_norm": 0.68, "acc_norm_stderr": 0.05}},
    }
    for label in ("distilled", "teacher")
]


def _header(card: str) -> dict[str, Any]:
    return dict(yaml.safe_load(card.split("---")[1]))


def test_the_header_names_license_base_model_and_tags() -> None:
    card = render_card("small", facts=FACTS, teacher=TEACHER, model=DISTILLED, metrics=METRICS)
    assert _header(card) == {
        "license": "llama3.1",
        "library_name": "transformers",
        "base_model": "org/Llama-x",
        "pipeline_tag": "text-generation",
        "tags": ["nemo-minitron", "minitron", "pruned", "distilled"],
    }


def test_lineage_goes_from_the_teacher_to_the_stored_file() -> None:
    card = render_card("small", facts=FACTS, teacher=TEACHER, model=DISTILLED, metrics=[])
    assert "1. **Teacher** `hf:org/Llama-x`" in card
    assert "2. **Pruned**: MLP size 96 → 48, " in card
    assert (
        "3. **Distilled**: forward KL to the live teacher's logits, no other loss; 143,360 tokens in 140 steps." in card
    )
    assert "Held-out loss 5.226 → 4.054" in card
    assert "4. **Stored** as bfloat16, 3.0 MiB" in card
    assert "`asset:books`, `my'text'.jsonl`" in card


def test_results_are_in_a_table_with_the_method_of_measurement() -> None:
    card = render_card("small", facts=FACTS, teacher=TEACHER, model=DISTILLED, metrics=METRICS)
    assert "|  | teacher | distilled |" in card
    assert "| sciq | 0.680 ± 0.050 | 0.680 ± 0.050 |" in card
    assert "first 100 examples" in card
    assert "## Results" not in render_card("small", facts=FACTS, teacher=TEACHER, model=DISTILLED, metrics=[])


def test_a_model_that_was_not_distilled_has_no_distillation_facts() -> None:
    card = render_card("small", facts=FACTS, teacher=TEACHER, model={}, metrics=[])
    assert "distilled" not in _header(card)["tags"]
    assert "**Distilled**" not in card
    assert "Pruned, not trained after that" in card


@pytest.mark.parametrize(
    ("license_id", "expected"),
    [
        ("llama3.1", "Built with Llama"),
        ("apache-2.0", "apache-2.0. The weights derive"),
        (None, "Unknown: look it up"),
    ],
)
def test_the_license_and_its_conditions_are_included(license_id: str | None, expected: str) -> None:
    card = render_card("small", facts=FACTS, teacher={**TEACHER, "license": license_id}, model={}, metrics=[])
    assert expected in card
    assert "teacher's license and its conditions apply" in card
    assert _header(card)["license"] == (license_id or "other")
    assert ("Built with Llama" in card) == (license_id == "llama3.1")


def test_names_from_data_stay_on_their_line() -> None:
    card = render_card("a\n# b <i>", facts=FACTS, teacher={**TEACHER, "source": "/data/`x`\n---"}, model={}, metrics=[])
    assert "# a # b \\<i\\>\n" in card
    assert "`/data/'x' ---`" in card
    assert _header(card)["license"] == "llama3.1"
