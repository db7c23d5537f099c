"""Stages and chats refuse a model that transformers reads in another way than Megatron."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_minitron.evaluation import generation
from tests.conftest import REPO, Cli
from tests.support.model_folders import save_spelled
from tests.support.tiny_models import tiny_model, tiny_tokenizer

V5 = {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "transformers_version": "5.2.0"}
STAGES = {
    "evaluate": "{label: x, inputs: {model: teacher, data: text}, num_tokens: 64, seq_len_tokens: 32, "
    "precision: fp32, prompts: [The hound], max_new_tokens: 2}",
    "evaluate_chat": "{label: x, inputs: {model: teacher, chats: chats}, precision: fp32, max_new_tokens: 2}",
    "speed": "{inputs: {models: {teacher: teacher}}, prompt_tokens: 4, new_tokens: 2, rounds: 1, precision: fp32}",
}


def test_models_are_loaded_in_one_place() -> None:
    """Everything that computes with a model goes through the compared loader."""
    package = REPO / "nemo_minitron"
    texts = {str(file.relative_to(package)): file.read_text() for file in package.rglob("*.py")}
    written_out = "report/model_card.py"  # this text tells users how to load the model
    loading = {name for name, text in texts.items() if re.search(r"import AutoModel", text)} - {written_out}
    assert loading == {"evaluation/generation.py"}
    callers = {name for name, text in texts.items() if "load_for_inference" in text}
    assert callers == {"evaluation/generation.py", "evaluation/agreement.py"}


@pytest.fixture
def v5_folder(tmp_path: Path) -> Path:
    """Return a model with rope_theta 1e6 as transformers 5 writes it."""
    folder = save_spelled(
        tmp_path / "v5_model", tiny_model("llama_mha", rope_theta=1e6), ("rope_theta", "rope_scaling"), V5
    )
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def ignoring_rope_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read such a folder as transformers 4.57 does."""
    right = generation.model_config
    monkeypatch.setattr(generation, "model_config", lambda shape: right(replace(shape, rope_theta=10000.0)))


def _recipe(folder: Path, model: Path, how: str) -> Path:
    texts = "".join(json.dumps({"text": f"document {i} about the hound and the moor " * 4}) + "\n" for i in range(8))
    (folder / "texts.jsonl").write_text(texts)
    rows = [
        {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"A number {i}."}]}
        for i in range(6)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"path: {model}" if how == "adopt" else f"source: {model}"
    measured = "".join(f"  {kind}: {{kind: {kind}, {keys[1:]}\n" for kind, keys in STAGES.items())
    file = folder / "recipe.yaml"
    file.write_text(
        f"""defaults: [_self_]
stages:
  teacher: {{kind: {how}, {source}}}
  text: {{kind: tokenize, valid_fraction: 0.5, sources: [{{source: {folder}/texts.jsonl}}]}}
  chats: {{kind: chat_data, rows: conversations, valid_rows: 2, sources: [{{source: {folder}/chats.jsonl}}]}}
{measured}execution: {{device: cpu, run_root: {folder}/runs, workers: 1, threads: 1}}
"""
    )
    return file


@pytest.mark.parametrize("kind", STAGES)
def test_a_stage_refuses_a_model_that_transformers_reads_otherwise(
    kind: str, v5_folder: Path, tmp_path: Path, minitron: Cli, ignoring_rope_parameters: None
) -> None:
    code, out = minitron("run", _recipe(tmp_path, v5_folder, "adopt"), "--until", kind)
    output = " ".join(out.split())
    assert code == 2, out
    assert "do not compute the same logits" in output
    assert "rope_theta: 10000 in transformers, 1e+06 in Megatron" in output
    assert "v5_model" in output
    assert not (tmp_path / "runs" / "recipe" / kind).exists()


def test_a_chat_does_not_begin_with_such_a_model(
    v5_folder: Path, tmp_path: Path, minitron: Cli, ignoring_rope_parameters: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    code, out = minitron("chat", v5_folder, "--once", "Hello")
    assert code == 2, out
    assert "rope_theta: 10000 in transformers, 1e+06 in Megatron" in " ".join(out.split())


def test_every_spelling_of_one_model_is_measured_alike(v5_folder: Path, tmp_path: Path, minitron: Cli) -> None:
    v4_folder = save_spelled(tmp_path / "v4_model", tiny_model("llama_mha", rope_theta=1e6))
    tiny_tokenizer().save_pretrained(v4_folder)
    found = []
    for folder, how in ((v5_folder, "import"), (v5_folder, "adopt"), (v4_folder, "import")):
        place = tmp_path / f"{how}_{folder.name}"
        place.mkdir()
        code, out = minitron("run", _recipe(place, folder, how))
        assert code == 0, out
        run = place / "runs" / "recipe"
        measured = [json.loads((run / kind / "metrics.json").read_text()) for kind in ("evaluate", "evaluate_chat")]
        found.append([measured[0]["loss_nats_per_token"], measured[0]["samples"], measured[1]["conversations"]])
        remembered = json.loads((run / ".compared" / "logits.json").read_text())
        assert sum("model" in facts for facts in remembered.values() if isinstance(facts, dict)) == 1
    assert found[0] == found[1] == found[2]


def test_without_a_usable_session_megatron_answers_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_minitron.backends.megatron.model.probe import Probe, run_probe

    folder = save_spelled(tmp_path, tiny_model("llama31_rope"))
    probe = Probe((5, 6, 7), (0, 1, 1500), 2)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    here = run_probe(folder, probe, None)
    assert torch.equal(torch.get_rng_state(), before), "what is sampled later must not depend on the comparison"
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    child = run_probe(folder, probe, None)
    assert (child.logits - here.logits).abs().max() <= 1e-4
    assert torch.equal(child.rope_frequencies, here.rope_frequencies)
