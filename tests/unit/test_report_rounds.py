"""The report of runs with several rounds, several texts or several students."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.artifacts.types import Artifact
from nemo_minitron.report.collect import collect
from nemo_minitron.report.html import render_html
from nemo_minitron.report.markdown import dropped_layers, headline, render_markdown
from tests.support.fake_run import LAYERS, fake_run

TOKENS, WALL_S = 140 * 1024, 350.8


def _again(
    stage: Artifact, name: str, root: Path, inputs: Mapping[str, Any], started: str = "2100", **result: Any
) -> Artifact:
    """Return the same stage with another name and other inputs, which ran at another time."""
    (root / name).mkdir()
    for file in stage.path.iterdir():
        (root / name / file.name).write_bytes(file.read_bytes())
    return replace(
        stage,
        stage=name,
        path=root / name,
        inputs=inputs,
        result={**stage.result, **result},
        provenance={**stage.provenance, "started": started},
    )


def _second_plan(folder: Path, kept_layers: str, num_layers: int) -> None:
    """Write a plan that prunes the 24 layers of the first round further, and leaves 700 neurons."""
    plan = json.loads((folder / "prune_plan.json").read_text())
    source = {**plan["target"], "num_layers": 24}
    plan |= {"source": source, "target": {**source, "num_layers": num_layers, "ffn_hidden_size": 700}}
    plan["num_params"] = {"source": 90, "target": 80}
    plan["keep"] |= {"layers": kept_layers, "ffn": "all"}
    (folder / "prune_plan.json").write_text(json.dumps(plan))


@pytest.fixture
def two_rounds(tmp_path: Path) -> dict[str, Artifact]:
    """Return a run that drops 6 layers, distills, drops the first 4 of the others, and distills again."""
    root = tmp_path / "run"
    stages = fake_run(root, depth=True)
    stages["score_2"] = _again(stages["score"], "score_2", root, {"model": "distill", "data": "data"})
    stages["select_2"] = _again(stages["select"], "select_2", root, {"model": "distill", "scores": "score_2"})
    _second_plan(root / "select_2", "4-23", 20)
    stages["prune_2"] = _again(stages["prune"], "prune_2", root, {"model": "distill", "plan": "select_2"})
    second = {"student": "prune_2", "teacher": "teacher", "data": "data"}
    stages["distill_2"] = _again(stages["distill"], "distill_2", root, second, tokens=5000)
    (root / "distill_2/curves.jsonl").write_text('{"step": 0, "valid_loss": 9.5}\n{"step": 1, "valid_loss": 9.0}\n')
    for name, model in (("evaluate_distilled", "distill_2"), ("export", "distill_2")):
        stages[name] = replace(stages[name], inputs={**stages[name].inputs, "model": model})
    return stages


def test_tokens_and_times_of_all_rounds_are_added(two_rounds: dict[str, Artifact]) -> None:
    facts = collect("t", "r", two_rounds)
    assert facts["rounds"] == ["distill", "distill_2"]
    assert facts["cost"]["distill_tokens"] == TOKENS + 5000
    assert facts["cost"]["distill_wall_s"] == pytest.approx(2 * WALL_S)
    assert f"with {TOKENS + 5000:,} tokens in 11 min 42 s of distillation in 2 rounds" in headline(facts)


def test_what_was_cut_goes_from_the_teacher_to_the_last_student(two_rounds: dict[str, Artifact]) -> None:
    facts = collect("t", "r", two_rounds)
    sizes = {axis["axis"]: (axis["source"], axis["kept"]) for axis in facts["pruning"]["axes"]}
    assert sizes["layers"] == (LAYERS, 20)
    assert sizes["MLP neurons"] == (1536, 700)
    assert dropped_layers(facts["pruning"]) == [0, 1, 2, 3, *range(12, 18)]
    assert facts["pruning"]["kept_scored_layers"] == list(range(4, 24))
    assert facts["pruning"]["num_params"]["target"] == 80
    assert "those of select_2, the last" in render_html(facts, "")


def test_the_curve_is_that_of_the_last_round(two_rounds: dict[str, Artifact]) -> None:
    facts = collect("t", "r", two_rounds)
    assert [row["valid_loss"] for row in facts["curves"]] == [9.5, 9.0]
    assert "Of distill_2, the last of 2 rounds." in render_markdown(facts).replace("\\", "")
    assert "Of distill_2, the last of 2 rounds." in render_html(facts, "")


def test_before_the_last_model_is_measured_the_rounds_so_far_count(two_rounds: dict[str, Artifact]) -> None:
    for name in ("evaluate_distilled", "export", "distill_2"):
        del two_rounds[name]
    facts = collect("t", "r", two_rounds)
    assert facts["rounds"] == ["distill"]
    assert facts["cost"]["distill_tokens"] == TOKENS


def test_other_students_do_not_count(tmp_path: Path) -> None:
    stages = fake_run(tmp_path)
    other = {"student": "prune_random", "teacher": "teacher", "data": "data"}
    stages["distill_random"] = _again(stages["distill"], "distill_random", tmp_path, other, started="2000", tokens=7)
    facts = collect("t", "r", stages)
    assert facts["rounds"] == ["distill"]
    assert facts["cost"]["distill_tokens"] == TOKENS


def test_the_text_is_that_of_the_distillation_not_that_of_the_first_stage(tmp_path: Path) -> None:
    stages = fake_run(tmp_path)
    other = _again(stages["data"], "other", tmp_path, {"tokenizer": "teacher"}, "2000", sources=["asset:other"])
    stages = {"other": other, **stages}
    assert collect("t", "r", stages)["data"]["sources"] == ["asset:benchmark-train-passages"]
    del stages["distill"], stages["evaluate_distilled"], stages["export"]
    assert collect("t", "r", stages)["data"]["sources"] == ["asset:other"], "the first of the recipe"
