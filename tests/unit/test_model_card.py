"""Tests of the model card."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_minitron.artifacts.manifest import Manifest, write_manifest
from nemo_minitron.artifacts.store import Store
from nemo_minitron.report.lineage import Lineage, read_lineage
from nemo_minitron.report.model_card import render_card

SHAPE = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96}
FACTS: dict[str, Any] = {
    "num_params": 50,
    "dtype": "bfloat16",
    "checkpoint_bytes": 3 * 2**20,
    "shape": {**SHAPE, "ffn_hidden_size": 48},
}
TEACHER: dict[str, Any] = {"num_params": 100, "license": "llama3.1", "source": "hf:org/Llama-x", "shape": SHAPE}
CUT: dict[str, Any] = {"num_params": 50, "shape": FACTS["shape"]}
DISTILLED = {
    **CUT,
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


TEXT = {"sources": ["asset:books", "my`text`.jsonl"]}


def _stage(stage: str, kind: str, result: dict[str, Any], **inputs: Any) -> Manifest:
    return Manifest("a/recipe", stage, kind, f"fingerprint of {stage}", {}, inputs, result)


def _lineage(*stages: Manifest) -> Lineage:
    """Return the lineage of the model that the last stage made."""
    return Lineage(stages[-1].stage, "teacher", {stage.stage: stage for stage in stages})


DATA = _stage("data", "tokenize", TEXT, tokenizer="teacher")
PRUNE = _stage("prune", "prune", CUT, model="teacher", plan="select")
DISTILL = _stage("distill", "distill", DISTILLED, student="prune", teacher="teacher", data="data")
PRUNED_ONLY, ONE_ROUND = _lineage(PRUNE), _lineage(DATA, PRUNE, DISTILL)


def _header(card: str) -> dict[str, Any]:
    return dict(yaml.safe_load(card.split("---")[1]))


def test_the_header_names_license_base_model_and_tags() -> None:
    card = render_card("small", facts=FACTS, teacher=TEACHER, lineage=ONE_ROUND, metrics=METRICS)
    assert _header(card) == {
        "license": "llama3.1",
        "library_name": "transformers",
        "base_model": "org/Llama-x",
        "pipeline_tag": "text-generation",
        "tags": ["nemo-minitron", "minitron", "pruned", "distilled"],
    }


def test_lineage_goes_from_the_teacher_to_the_stored_file() -> None:
    card = render_card("small", facts=FACTS, teacher=TEACHER, lineage=ONE_ROUND, metrics=[])
    assert "1. **Teacher** `hf:org/Llama-x`" in card
    assert "2. **Pruned**: MLP size 96 → 48, " in card
    assert (
        "3. **Distilled**: forward KL to the live teacher's logits, no other loss; 143,360 tokens in 140 steps." in card
    )
    assert "Held-out loss 5.226 → 4.054" in card
    assert "4. **Stored** as bfloat16, 3.0 MiB" in card
    assert "- `asset:books`: `distill`\n- `my'text'.jsonl`: `distill`\n" in card


def test_results_are_in_a_table_with_the_method_of_measurement() -> None:
    card = render_card("small", facts=FACTS, teacher=TEACHER, lineage=ONE_ROUND, metrics=METRICS)
    assert "|  | teacher | distilled |" in card
    assert "| sciq (acc) | 0.750 | 0.750 |" in card
    assert "first 100 examples" in card
    assert "## Results" not in render_card("small", facts=FACTS, teacher=TEACHER, lineage=ONE_ROUND, metrics=[])


def test_a_model_that_was_not_distilled_has_no_distillation_facts() -> None:
    card = render_card("small", facts=FACTS, teacher=TEACHER, lineage=PRUNED_ONLY, metrics=[])
    assert "distilled" not in _header(card)["tags"]
    assert "**Distilled**" not in card
    assert "Pruned, not trained after that" in card


def _card(lineage: Lineage) -> str:
    return render_card("small", facts=FACTS, teacher=TEACHER, lineage=lineage, metrics=[])


def test_trainings_after_the_distillation_are_named_with_their_text() -> None:
    chats = _stage("chat_data", "chat_data", {"sources": [{"source": "asset:chats", "rows": 9}]})
    rated = _stage("rated", "annotate", {"rows": "conversations"}, chats="chat_data")
    facts = {**CUT, "num_steps": 60, "first_valid_loss": 3.9, "valid_loss": 3.4, "lengths": {"train": {"rows": 800}}}
    sft = _stage("sft", "sft", facts, model="distill", chats="rated")
    rewards = {"num_steps": 16, "start": {"reward": 0.1}, "end": {"reward": 0.5}}
    ppo = _stage("ppo", "ppo", {**CUT, **rewards}, model="sft", chats="chat_data")
    card = _card(_lineage(DATA, PRUNE, DISTILL, chats, rated, sft, ppo))
    assert "Pruned, then distilled from its teacher, then trained by `sft`, then trained by `ppo` with" in card
    assert "4. **Trained** by `sft`: 800 rows in 60 steps. Held-out loss 3.900 → 3.400." in card
    assert "5. **Trained** by `ppo`: 16 steps. Mean reward of answers to held-out prompts 0.100 → 0.500." in card
    assert "- `asset:chats`: `annotate`, `sft`, `ppo`" in card
    assert "- `asset:books`: `distill`" in card
    assert "not trained" not in card


def test_a_model_that_was_aligned_without_distillation_was_trained() -> None:
    card = _card(_lineage(PRUNE, _stage("dpo", "dpo", {**CUT, "num_steps": 60}, model="prune", chats="pairs")))
    assert "Pruned, then trained by `dpo` with" in card
    assert "distilled" not in _header(card)["tags"]


def test_every_round_is_listed_with_its_own_sizes_and_tokens() -> None:
    first = {"num_params": 75, "shape": {**SHAPE, "ffn_hidden_size": 64}}
    card = _card(
        _lineage(
            _stage("prune", "prune", first, model="teacher", plan="select"),
            _stage("distill", "distill", {**first, "tokens": 5000, "num_steps": 5}, student="prune", teacher="teacher"),
            _stage("prune_2", "prune", CUT, model="distill", plan="select_2"),
            _stage("repair", "compensate", {**CUT, "num_tokens": 300}, student="prune_2", teacher="teacher"),
            _stage("distill_2", "distill", {**DISTILLED, "tokens": 7000}, student="repair", teacher="teacher"),
        )
    )
    for line in (
        "2. **Pruned**: MLP size 96 → 64, ",
        "3. **Distilled**: next-token cross entropy; 5,000 tokens in 5 steps.",
        "4. **Pruned**: MLP size 64 → 48, ",
        "5. **Repaired** by least squares on 300 tokens.",
        "6. **Distilled**: forward KL to the live teacher's logits, no other loss; 7,000 tokens in 140 steps.",
    ):
        assert f"\n{line}" in card


def test_the_correction_of_the_teacher_and_its_text_are_named() -> None:
    other = _stage("other", "tokenize", {"sources": ["asset:other"]}, tokenizer="teacher")
    trained = {"num_params": 100, "shape": SHAPE, "tokens": 900, "num_steps": 9, "data_sources": ["asset:other"]}
    correct = _stage("corrected", "correct", trained, model="teacher", data="other")
    distill = _stage("distill", "distill", DISTILLED, student="prune", teacher="corrected", data="data")
    card = _card(_lineage(DATA, other, correct, PRUNE, distill))
    assert "Its teacher had been trained by `correct`: next-token cross entropy; 900 tokens in 9 steps." in card
    assert "- `asset:other`: `correct`\n" in card


def test_the_lineage_is_read_from_the_manifests_of_the_run(tmp_path: Path) -> None:
    def publish(manifest: Manifest, **fingerprints: str) -> None:
        (tmp_path / manifest.stage).mkdir()
        write_manifest(tmp_path / manifest.stage, replace(manifest, payload={"inputs": fingerprints}))

    for stage in (DATA, PRUNE):
        publish(stage)
    publish(DISTILL, student=PRUNE.fingerprint, teacher="any", data=DATA.fingerprint)
    lineage = read_lineage("distill", DISTILL.fingerprint, "teacher", Store(tmp_path))
    assert [record.stage for record in lineage.line] == ["prune", "distill"]
    assert lineage.missing == ("select",)
    assert lineage.texts() == {"asset:books": ["distill"], "my`text`.jsonl": ["distill"]}
    write_manifest(tmp_path / "prune", replace(PRUNE, fingerprint="made anew"))
    replaced = read_lineage("distill", DISTILL.fingerprint, "teacher", Store(tmp_path))
    assert replaced.missing == ("prune",)
    assert "have been replaced: `prune`." in _card(replaced)


def test_a_card_has_the_scores_of_the_report() -> None:
    tasks = {
        "gsm8k": {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.05},
        "wikitext": {"word_perplexity": 20.5},
        "mmlu_group": {},
    }
    metrics = [{**found, "tasks": tasks} for found in METRICS]
    card = render_card("small", facts=FACTS, teacher=TEACHER, lineage=ONE_ROUND, metrics=metrics)
    assert "| gsm8k (exact_match,strict-match) | 0.250 ± 0.050 | 0.250 ± 0.050 |" in card
    assert "| wikitext (word_perplexity) | 20.500 | 20.500 |" in card
    assert "mmlu_group" not in card


@pytest.mark.parametrize(
    ("license_id", "expected"),
    [
        ("llama3.1", "Built with Llama"),
        ("apache-2.0", "apache-2.0. The weights derive"),
        (None, "Unknown: look it up"),
    ],
)
def test_the_license_and_its_conditions_are_included(license_id: str | None, expected: str) -> None:
    card = render_card(
        "small", facts=FACTS, teacher={**TEACHER, "license": license_id}, lineage=PRUNED_ONLY, metrics=[]
    )
    assert expected in card
    assert "teacher's license and its conditions apply" in card
    assert _header(card)["license"] == (license_id or "other")
    assert ("Built with Llama" in card) == (license_id == "llama3.1")


def test_names_from_data_stay_on_their_line() -> None:
    card = render_card(
        "a\n# b <i>", facts=FACTS, teacher={**TEACHER, "source": "/data/`x`\n---"}, lineage=PRUNED_ONLY, metrics=[]
    )
    assert "# a # b \\<i\\>\n" in card
    assert "`/data/'x' ---`" in card
    assert _header(card)["license"] == "llama3.1"
