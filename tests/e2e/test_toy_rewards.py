"""The toy model trained on rewards by REINFORCE and by PPO: a rule with a known optimum, against a random reward."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.api import load_recipe
from nemo_minitron.execution.runner import RunOptions, run_recipe
from tests.conftest import REPO
from tests.support.aligner import require_aligner

pytestmark = pytest.mark.slow

BEFORE = ("teacher", "chat_data", "sft")
RANDOM = "[{rule: random}]"


def run(kind: str, root: Path, before: Path | None, *overrides: str) -> Path:
    """Run a recipe up to its training on rewards, after the stages of an earlier run; return the run's folder."""
    require_aligner()
    recipe = load_recipe(REPO / f"recipes/toy/{kind}.yaml", [f"execution.run_root={root}", *overrides])
    for stage in BEFORE if before else ():
        shutil.copytree(before / stage, root / recipe.name / stage)
    run_recipe(recipe, RunOptions(until=kind.partition("_")[0]), quiet=True)
    return root / recipe.name


def result(folder: Path, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / kind / "manifest.json").read_text())["result"]
    return found


@pytest.fixture(scope="module")
def reinforce(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run("reinforce", tmp_path_factory.mktemp("reinforce"), None)


def standard_errors(one: dict[str, float], other: dict[str, float]) -> float:
    """Return the difference of two mean rewards in standard errors."""
    return (one["reward"] - other["reward"]) / math.hypot(one["reward_se"], other["reward_se"])


def of_the_rule(answers: Path, target: int = 2) -> dict[str, float]:
    """Return mean and standard error of the rule's reward of the last validation, also after another reward."""
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    texts = [row["answer"].removesuffix("<|im_end|>") for row in last]
    values = [max(0.0, 1 - abs(len(text) - target) / target) for text in texts]
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return {"reward": mean, "reward_se": spread / math.sqrt(len(values))}


@pytest.mark.parametrize("kind", ["reinforce", "ppo"])
def test_the_held_out_reward_rises_over_the_start_and_over_a_random_reward(
    kind: str, reinforce: Path, tmp_path: Path
) -> None:
    trained = reinforce if kind == "reinforce" else run(kind, tmp_path / "trained", reinforce)
    control = run(kind, tmp_path / "control", reinforce, f"stages.{kind}.rewards={RANDOM}")
    found = result(trained, kind)
    assert standard_errors(found["end"], found["start"]) >= 3
    own, other = (of_the_rule(folder / kind / "answers.jsonl") for folder in (trained, control))
    assert own["reward"] == pytest.approx(found["end"]["reward"], abs=1e-6)
    assert standard_errors(own, other) >= 3
    assert 0.0 < found["end"]["kl_nats_per_token"] < 5.0
    assert found["start"]["kl_nats_per_token"] == 0.0


def test_the_reward_of_a_trained_reward_model_rises_on_held_out_prompts(reinforce: Path, tmp_path: Path) -> None:
    found = result(run("reinforce_model", tmp_path, reinforce), "reinforce")
    assert standard_errors(found["end"], found["start"]) >= 3
    assert 0.0 < found["end"]["kl_nats_per_token"] < 5.0


def test_the_published_model_is_a_hugging_face_model_with_other_weights(reinforce: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(reinforce / "reinforce", local_files_only=True)
    before, after = (load_file(reinforce / stage / "model.safetensors") for stage in ("sft", "reinforce"))
    assert before.keys() == after.keys()
    assert any((before[name] != after[name]).any() for name in before)


def test_curves_and_answers_are_published(reinforce: Path) -> None:
    rows = [json.loads(line) for line in (reinforce / "reinforce/curves.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "reward" in row]
    assert [row["step"] for row in trained] == list(range(1, 17))
    keys = {"reward", "kl_nats_per_token", "log_prob_per_token", "answer_tokens", "ended", "loss", "grad_norm", "lr"}
    assert all(keys <= row.keys() for row in trained)
    assert [row["step"] for row in rows if "valid_reward" in row] == [0, 8, 16]
    answers = [json.loads(line) for line in (reinforce / "reinforce/answers.jsonl").read_text().splitlines()]
    assert {row["step"] for row in answers} == {0, 8, 16}
    assert len(answers) == 3 * 96
