"""Metrics of aligned models, compared with numbers computed by hand."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_minitron.data.chat.rows import ATTRIBUTES
from nemo_minitron.evaluation.answers import answer_log_probs
from nemo_minitron.evaluation.attributes import agreement
from nemo_minitron.evaluation.chat_metrics import (
    answer_loss,
    preference_metrics,
    rank_correlation,
)
from nemo_minitron.evaluation.final_number import final_number, is_exact_match
from nemo_minitron.stages.annotate.params import AnnotateStage
from nemo_minitron.stages.annotate.run import merged
from nemo_minitron.system.progress import Progress
from tests.support.tiny_models import load_transformers, tiny_model_dir


def test_preferences_count_ties_as_half() -> None:
    found = preference_metrics([2.0, 1.0, 0.0, 3.0], [1.0, 1.0, 2.0, 0.0])
    assert found["accuracy"] == 0.625
    assert found["margin_nats"] == 0.5
    assert found["margin_nats_se"] == pytest.approx(np.std([1, 0, -2, 3], ddof=1) / 2)
    assert preference_metrics([1.0], [0.0])["accuracy_se"] is None, "NaN would not be JSON"


def test_the_loss_per_token_has_the_error_of_a_ratio() -> None:
    log_probs, sizes = [-6.0, -2.0, -16.0], [2, 2, 4]
    found = answer_loss(log_probs, sizes)
    assert found["loss_nats_per_token"] == 3.0
    # Differences to 3 nats per token: 0, -4 and 4, whose standard deviation is 4.
    assert found["loss_se"] == pytest.approx(4 / np.sqrt(3) / (8 / 3))
    assert answer_loss([-6.0], [2])["loss_se"] is None
    draws = np.random.default_rng(0)
    many = draws.integers(1, 40, 4000)
    values = -many * 2.0 + draws.normal(0, 3, 4000) * np.sqrt(many)
    samples = [answer_loss(part, size) for part, size in zip(np.split(values, 40), np.split(many, 40), strict=True)]
    means, errors = ([sample[key] for sample in samples] for key in ("loss_nats_per_token", "loss_se"))
    assert np.mean(errors) == pytest.approx(np.std(means, ddof=1), rel=0.35), "the spread of 40 samples"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("so 3 + 4 = 7\n#### 7", "7"),
        ("#### 1,200.", "1200"),
        ("about 12 apples, or 13", "13"),
        ("none", None),
        ("#### 1/2", "1/2"),
        ("#### -1/3 of it", "-1/3"),
        ("#### 1/0", None),
        ("#### -$5", "-5"),
        ("#### $-5.50", "-5.5"),
        ("it is \u22125", "-5"),
        ("#### $18 in 2 days", "18"),
        ("12-18", "18"),
        ("x-5", "5"),
        ("7 - 5", "5"),
        ("#### +5", "5"),
        ("####-5", "-5"),
        ("#### 1 234", "1234"),
        ("#### 1\u202f234\u202f567.5", "1234567.5"),
        ("#### 18 2", "18"),
        ("#### 2024 300", None),
        ("#### 3,5", None),
        ("#### 12,34", None),
        ("#### 1.2.3", None),
        ("1, 2 or 3", "3"),
        ("3/4/2024", None),
        ("it is .5", "0.5"),
        ("so...5", "5"),
        ("#### Answer\nIt is 6.", "6"),
        ("#### 5\n#### 6", "6"),
        ("9" * 5000, None),
    ],
)
def test_the_final_number(text: str, wanted: str | None) -> None:
    assert final_number(text) == (None if wanted is None else Fraction(wanted))


def test_exact_match_compares_numbers() -> None:
    assert is_exact_match("The answer is 72.0", "x\n#### 72")
    assert not is_exact_match("#### 71", "#### 72")
    assert not is_exact_match("no idea", "#### 72")
    assert not is_exact_match("no idea", "none either")
    assert not is_exact_match("#### 1/3", "#### 1/2")
    assert is_exact_match("#### 0.5", "#### 1/2")


def test_rank_correlation_is_spearmans() -> None:
    levels = [[0, 1, 2, 3, 4]] * 3
    lengths = [[3, 5, 5, 9, 20], [1, 2, 2, 2, 3], [9, 8, 7, 9, 9]]
    found = rank_correlation(levels, lengths)
    # Pearson's correlation of the ranks, equal values with the mean of theirs.
    level_ranks = np.array([2, 5, 8, 11, 14] * 3)
    length_ranks = np.array([5.5, 7.5, 7.5, 12.5, 15, 1, 3, 3, 3, 5.5, 12.5, 10, 9, 12.5, 12.5])
    expected = np.corrcoef(level_ranks, length_ranks)[0, 1]
    assert found["rank_correlation"] == pytest.approx(expected)
    assert 0 < found["se"] < 1
    assert rank_correlation(levels, [[4] * 5] * 3)["rank_correlation"] == 0.0


def test_an_attribute_model_is_compared_with_the_mean() -> None:
    def label(helpfulness: float) -> list[float]:
        return [helpfulness if name == "helpfulness" else -100.0 for name in ATTRIBUTES]

    found = agreement([label(0), label(4)], [label(1), label(3)], [label(2), label(4)])
    assert set(found) == {"helpfulness", "all"}
    # Constant 3: errors 9 and 1. The model: 1 and 1.
    assert found["helpfulness"]["mse"] == 1.0
    assert found["helpfulness"]["mse_of_mean"] == 5.0
    assert found["all"]["r2_over_mean"] == pytest.approx(0.8)
    assert found["helpfulness"]["pearson"] == pytest.approx(1.0)


def test_annotation_rounds_clips_and_keeps_human_ratings() -> None:
    values = [9.0 if name == "verbosity" else 1.6 for name in ATTRIBUTES]
    stage = {"kind": "annotate", "attributes": ["verbosity", "helpfulness"]}
    row = {"attributes": {"helpfulness": 4.0}}
    assert merged(row, values, AnnotateStage(**stage)) == {"helpfulness": 4.0, "verbosity": 4}
    assert merged(row, values, AnnotateStage(**stage, keep_human=False)) == {"verbosity": 4, "helpfulness": 2}


def test_log_probs_of_answers_do_not_depend_on_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_transformers(tiny_model_dir(tmp_path, "llama_gqa_tied"))
    generator = torch.Generator().manual_seed(0)
    sequences = [
        (
            torch.randint(5, 400, (prompt,), generator=generator).tolist(),
            torch.randint(5, 400, (answer,), generator=generator).tolist(),
        )
        for prompt, answer in ((4, 3), (10, 1), (2, 8), (7, 7))
    ]
    together = answer_log_probs(model, sequences, Progress(silent=True), "all")
    monkeypatch.setattr("nemo_minitron.evaluation.answers.TOKENS_PER_BATCH", 1)
    alone = answer_log_probs(model, sequences, Progress(silent=True), "each")
    assert together == pytest.approx(alone, rel=1e-4)
    prompt, answer = sequences[0]
    logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    expected = sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))
    assert together[0] == pytest.approx(expected, rel=1e-4)
