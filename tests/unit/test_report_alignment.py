"""The alignment section: figures before and after with errors and directions, one row for each model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.artifacts.types import Artifact
from nemo_minitron.backends.alignment.base import CURVES_FILE
from nemo_minitron.report.alignment import alignment_facts, measured_figures, tables
from nemo_minitron.report.curves import MAX_CURVE_ROWS
from nemo_minitron.report.html import _alignment_pictures
from nemo_minitron.report.markdown import headline
from nemo_minitron.report.rewards import reward_table

CURVE = [
    {"step": 0, "val/loss": 3.9, "val/loss_se": 0.11},
    {"step": 1, "train/loss": 3.8},
    {"step": 2, "train/loss": 3.5},
    {"step": 2, "val/loss": 3.4, "val/loss_se": 0.09},
]


def _stage(root: Path, name: str, kind: str, **result: Any) -> Artifact:
    folder = root / name
    folder.mkdir()
    (folder / CURVES_FILE).write_text("".join(json.dumps(row) + "\n" for row in CURVE))
    samples = [{"prompt": "2 and 2?", "text": f"answer of {name}"}]
    (folder / "metrics.json").write_text(json.dumps({**result, "samples": samples}))
    return Artifact(stage=name, kind=kind, path=folder, fingerprint="", result=result)


def _evaluation(root: Path, name: str, label: str, accuracy: float | None, loss: float | None = None) -> Artifact:
    result: dict[str, Any] = {"label": label, "rows": 64, "measured_rows": 64}
    if accuracy is not None:
        figures = {"pairs": 64, "accuracy": accuracy, "accuracy_se": 0.06, "margin_nats": 1.0, "margin_nats_se": 0.1}
        result["preferences"] = {"log_probs": figures, "mean_tokens": {"chosen": 70.2, "rejected": 69.9}}
    if loss is not None:
        result["conversations"] = {"loss_nats_per_token": loss, "loss_se": 0.05}
    return _stage(root, name, "evaluate_chat", **result)


@pytest.fixture
def facts(tmp_path: Path) -> dict[str, Any]:
    trained = {"first_valid_loss": 3.9, "first_valid_loss_se": 0.11, "valid_loss": 3.4, "valid_loss_se": 0.09}
    training = {"method": "sft", "num_steps": 2, **trained, "lengths": {"train": {"rows": 100, "dropped_rows": 0}}}
    found = alignment_facts(
        [
            _stage(tmp_path, "sft", "sft", **training),
            _evaluation(tmp_path, "before", "student", 0.5, None),
            _evaluation(tmp_path, "before_chats", "student", None, 3.9),
            _evaluation(tmp_path, "after", "after DPO", 0.85, None),
        ]
    )
    assert found is not None
    return dict(json.loads(json.dumps(found)))  # as it is read from report.json


def test_the_reward_of_a_single_answer_has_no_error() -> None:
    one = {"reward": 0.25, "kl_nats_per_token": 0.1, "answer_tokens": 3.0, "ended": 1.0}
    training = {"stage": "rl", "num_steps": 2, "start": one, "end": {**one, "reward": 0.5, "reward_se": 0.1}}
    assert reward_table([training])["rows"][0][2:4] == ["0.250", "0.500 ± 0.100"]


def test_the_loss_has_a_first_point_and_errors(facts: dict[str, Any]) -> None:
    table = tables(facts)[0]
    assert table["header"][-2:] == ["held-out loss before", "held-out loss after (lower is better)"]
    assert table["rows"] == [["sft", "100", "2", "3.900 ± 0.110", "3.400 ± 0.090"]]
    assert facts["curves"]["sft"][0] == {"step": 0, "train": None, "valid": 3.9, "valid_se": 0.11}


def test_evaluations_of_one_model_are_one_row_and_each_figure_has_its_direction(facts: dict[str, Any]) -> None:
    table = tables(facts)[1]
    assert table["header"] == [
        "model",
        "rows",
        "tokens, preferred and other",
        "preference accuracy (higher is better, 0.5 is chance)",
        "loss of answers (lower is better)",
    ]
    assert table["rows"] == [
        ["student", "64 and 64", "70 and 70", "0.500 ± 0.060", "3.900 ± 0.050"],
        ["after DPO", "64", "70 and 70", "0.850 ± 0.060", ""],
    ]


def test_a_figure_that_several_models_have_is_plotted_with_its_errors(facts: dict[str, Any]) -> None:
    curve, accuracy = (draw() for draw in _alignment_pictures(facts))
    assert "Loss of sft over its steps; 3.400 at the end." in curve
    assert "student 0.500 ± 0.060, after DPO 0.850 ± 0.060" in accuracy
    assert "higher is better, 0.5 is chance" in accuracy


def test_answers_to_a_question_stand_side_by_side(facts: dict[str, Any]) -> None:
    (sample,) = facts["samples"]
    assert sample == {
        "prompt": "2 and 2?",
        "texts": {"student": "answer of before_chats", "after DPO": "answer of after"},
    }


def test_two_evaluations_with_the_same_figure_are_two_rows(tmp_path: Path) -> None:
    stages = [_evaluation(tmp_path, "easy", "student", 0.9), _evaluation(tmp_path, "hard", "student", 0.6)]
    found = alignment_facts([*stages, _evaluation(tmp_path, "chats", "student", None, 3.9)])
    assert found is not None
    rows = {row[0]: row[1:] for row in tables(found)[0]["rows"]}
    assert rows == {
        "student": ["64 and 64", "70 and 70", "0.900 ± 0.060", "3.900 ± 0.050"],
        "student (hard)": ["64", "70 and 70", "0.600 ± 0.060", ""],
    }
    assert measured_figures(found["models"])["preference accuracy"].keys() == rows.keys()


def test_the_headline_names_every_training_or_what_was_measured(tmp_path: Path, facts: dict[str, Any]) -> None:
    report = {"models": {}, "alignment": facts}
    assert headline(report) == "Aligned by NeMo-Aligner: sft."
    rewards = [{"stage": "reinforce"}]
    assert headline({"models": {}, "alignment": {**facts, "rewards": rewards}}) == (
        "Aligned by NeMo-Aligner: sft, reinforce."
    )
    assert headline({"models": {}, "alignment": {**facts, "trainings": []}}) == (
        "Measured on chat rows: student, after DPO."
    )


def test_long_curves_are_thinned_out(tmp_path: Path) -> None:
    stage = _stage(tmp_path, "sft", "sft", method="sft", num_steps=5000, first_valid_loss=1.0, valid_loss=1.0)
    rows = [{"step": step, "train/loss": 1.0} for step in range(1, 5001)]
    rows += [{"step": step, "val/loss": 1.0} for step in (0, 2500, 5000)]
    (stage.path / CURVES_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = replace(stage, result={**stage.result, "lengths": {"train": {"rows": 1, "dropped_rows": 0}}})
    found = alignment_facts([stage])
    assert found is not None
    curve = found["curves"]["sft"]
    assert len(curve) == MAX_CURVE_ROWS + 3
    assert [row["step"] for row in curve if row["valid"] is not None] == [0, 2500, 5000]
    assert [row["step"] for row in curve] == sorted(row["step"] for row in curve)


def test_a_training_without_errors_is_shown_without_them(tmp_path: Path) -> None:
    result = {"method": "sft", "num_steps": 2, "first_valid_loss": 3.9, "valid_loss": None}
    lengths = {"train": {"rows": 100, "dropped_rows": 0}}
    found = alignment_facts([_stage(tmp_path, "sft", "sft", **result, lengths=lengths)])
    assert found is not None
    assert tables(found)[0]["rows"] == [["sft", "100", "2", "3.900", ""]]
