"""The toy model through SteerLM 2.0: sampled answers, weights, and a model that follows the requested verbosity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_minitron.evaluation.attribute_likelihood import answer_weights
from nemo_minitron.stages.steerlm2_answers.rows import LOG_ATTRIBUTES, LOG_MODEL, LOG_REFERENCE
from tests.conftest import REPO, Cli
from tests.support.aligner import finished

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    return finished(REPO / "recipes/toy/steerlm2.yaml", tmp_path_factory.mktemp("steerlm2"))


def _result(run: Path, stage: str) -> dict[str, Any]:
    return json.loads((run / stage / "manifest.json").read_text())["result"]


def _rows(run: Path, part: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"steerlm2_answers/{part}.jsonl").read_text().splitlines()]


def test_every_prompt_has_its_answers_and_their_log_probabilities(run: Path) -> None:
    result = _result(run, "steerlm2_answers")
    for part in ("train", "valid"):
        rows = _rows(run, part)
        assert len(rows) == result[part]["rows"] > 0.9 * result[part]["prompts"]
        logs = np.array([[[a[LOG_ATTRIBUTES], a[LOG_REFERENCE], a[LOG_MODEL]] for a in r["responses"]] for r in rows])
        assert logs.shape == (len(rows), 8, 3)
        assert np.isfinite(logs).all()
        assert (logs < 0).all()
        found = [answer_weights(*each.T) for each in logs]
        effective = np.mean([1 / np.square(weights).sum() for weights in found])
        assert result[part]["effective_answers"] == pytest.approx(effective)


def test_the_training_lowers_the_distance_to_the_weights(run: Path) -> None:
    result, sampled = _result(run, "steerlm2"), _result(run, "steerlm2_answers")
    assert result["method"] == "steerlm2"
    # Before the first step the model is the one that was sampled, so its weights are uniform.
    assert result["first_valid_loss"] == pytest.approx(sampled["valid"]["distance_nats"], abs=1e-3)
    assert result["valid_loss"] < result["first_valid_loss"]


def test_the_length_of_answers_follows_the_requested_verbosity(run: Path) -> None:
    found = json.loads((run / "evaluate_steerlm2/metrics.json").read_text())["attribute"]
    assert found["rank_correlation"] - 4 * found["se"] > 0


def test_the_report_and_chat_know_the_model(run: Path, minitron: Cli) -> None:
    text = (run / "report.md").read_text()
    assert "Sampled answers to held-out prompts that request attributes" in text
    assert "| answers_after |" in text
    code, output = minitron("chat", run, "--once", "Spell moor.", "--attributes", "helpfulness=4,verbosity=0")
    assert code == 0
    assert "im_end" not in output
