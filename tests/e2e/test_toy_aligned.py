"""The toy model through NeMo-Aligner: rows, SFT, RPO, metrics, export, report, and errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from nemo_minitron.backends.alignment.nemo_aligner.environment import aligner_python
from nemo_minitron.errors import EnvironmentProblem
from tests.conftest import REPO, Cli
from tests.support.aligner import finished

RECIPE = REPO / "recipes/toy/aligned.yaml"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run."""
    return finished(RECIPE, tmp_path_factory.mktemp("aligned"))


def test_both_trainings_lower_the_loss(run: Path) -> None:
    for stage in ("sft", "dpo"):
        result = json.loads((run / stage / "manifest.json").read_text())["result"]
        assert result["valid_loss"] < result["first_valid_loss"], stage
        assert result["lengths"]["train"]["dropped_rows"] == 0


def test_the_finished_model_is_a_hugging_face_model_that_chats(run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(run / "export", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(run / "export", local_files_only=True)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Spell moor."}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nSpell moor.<|im_end|>\n<|im_start|>assistant\n"
    before = AutoModelForCausalLM.from_pretrained(run / "distill", local_files_only=True)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    assert not torch.equal(model(ids).logits, before(ids).logits)


def test_preferences_are_measured_against_the_reference(run: Path) -> None:
    metrics = json.loads((run / "evaluate_dpo/metrics.json").read_text())
    assert metrics["preferences"]["against_reference"]["accuracy"] > 0.9
    assert metrics["preferences"]["against_reference"]["pairs"] == 16
    assert {sample["prompt"] for sample in metrics["samples"]} == {"Spell moor.", "How many letters has hound?"}
    assert not any("<|im_end|>" in sample["text"] for sample in metrics["samples"])  # spelled out by this tokenizer


def test_the_report_has_a_chapter(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert "<h2>Alignment</h2>" in page
    assert "Answers to the same questions" in page
    told = (run / "report.md").read_text()
    assert "## Alignment" in told
    assert "after RPO" in told


def test_chat_answers(run: Path, minitron: Cli) -> None:
    code, told = minitron("chat", run, "--once", "Spell moor.", "--max-new-tokens", "8")
    assert code == 0
    assert told.strip()
    code, told = minitron("chat", run, "--once", "x", "--attributes", "verbosity=9")
    assert code == 2
    assert "0 to 4" in told
    code, told = minitron("chat", run / "logs", "--once", "x")
    assert code == 2
    assert "No finished model" in told


def test_bad_rows_stop_before_anything_is_trained(run: Path, tmp_path: Path, minitron: Cli) -> None:
    root = tmp_path / "runs/toy"
    root.mkdir(parents=True)
    shutil.copytree(run, root / "aligned", ignore=shutil.ignore_patterns("dpo", "evaluate_dpo", "export", "report*"))
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"q{i}", "chosen": "good", "rejected": "bad"} for i in range(60)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, told = minitron(
        "run",
        RECIPE,
        f"execution.run_root={tmp_path / 'runs'}",
        f"stages.preference_data.sources.0.source={pairs}",
        "--rerun",
        "changed",
        "--until",
        "dpo",
    )
    assert code == 2
    assert "A row has no chosen_reward and no rejected_reward" in told
    assert "pairs.jsonl" in told


def test_without_the_environment_the_message_tells_how_to_make_it(
    tmp_path: Path, minitron: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MINITRON_ALIGNER_PYTHON", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(EnvironmentProblem, match="minitron env aligner"):
        aligner_python()
    monkeypatch.setenv("MINITRON_ALIGNER_PYTHON", str(tmp_path / "python"))
    with pytest.raises(EnvironmentProblem, match="does not exist"):
        aligner_python()
