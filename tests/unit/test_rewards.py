"""Rewards that a program computes, and the process that computes them for a server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.errors import ConfigError, DataError
from nemo_minitron.evaluation.rewards import Answer, make_rules, rewards
from nemo_minitron.processes.same_code import START
from nemo_minitron.schema.rewards import RewardRule, rule_problems


def value(answer: str, row: dict[str, Any] | None = None, num_tokens: int = 0, **keys: Any) -> float:
    rules = [RewardRule(**keys)]
    (found,) = rewards(rules, make_rules(rules), [Answer("Q", answer, num_tokens, row or {})])
    return found


@pytest.mark.parametrize(
    ("answer", "expected"), [("so it is 1,200.", 1.0), ("1200.0", 1.0), ("#### 7 of 1200", 0.0), ("none", 0.0)]
)
def test_the_final_number_must_be_that_of_the_reference(answer: str, expected: float) -> None:
    assert value(answer, {"reference": "2 * 600 = 1200 #### 1200"}, rule="final_number") == expected


@pytest.mark.parametrize(
    ("answer", "expected"), [("", 0.0), ("ab", 0.5), ("abcd", 1.0), ("abcdef", 0.5), ("a" * 9, 0.0)]
)
def test_length_has_its_maximum_at_the_target(answer: str, expected: float) -> None:
    assert value(answer, rule="length", unit="characters", target=4) == expected


def test_length_counts_words_and_tokens() -> None:
    assert value("two words", rule="length", target=2) == 1.0
    assert value("two words", num_tokens=3, rule="length", unit="tokens", target=4) == 0.75


def test_a_word_must_be_whole_and_a_pattern_found() -> None:
    assert value("The Hound!", rule="contains", text="hound") == 1.0
    assert value("Hounds", rule="contains", text="hound") == 0.0
    assert value("x-y", rule="matches", pattern=r"^\w-\w$") == 1.0


def test_instructions_give_the_share_of_followed_rules() -> None:
    pytest.importorskip("lm_eval")
    names = ["punctuation:no_comma", "change_case:english_lowercase"]
    row = {"instruction_id_list": names, "kwargs": [{}, {}]}
    assert value("No comma here and a capital", row, rule="instructions") == 0.5
    with pytest.raises(DataError, match="instruction_id_list"):
        value("x", rule="instructions")


def test_rewards_are_mixed_with_their_weights() -> None:
    rules = [RewardRule(rule="contains", text="a", weight=2.0), RewardRule(rule="length", target=1, weight=-0.5)]
    assert rewards(rules, make_rules(rules), [Answer("Q", "a", 1)]) == [1.5]


def test_a_function_of_a_user_is_imported_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def count(prompt, answer, row):\n    return answer.count(row['reference'])\n"
        "def bad(*_):\n    return float('nan')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert value("banana", {"reference": "an"}, rule="function", function="my_rewards:count") == 2.0
    with pytest.raises(DataError, match="nan"):
        value("x", rule="function", function="my_rewards:bad")
    with pytest.raises(ConfigError, match="cannot be imported"):
        value("x", rule="function", function="my_rewards:missing")


def test_missing_and_invalid_keys_are_problems() -> None:
    rules = [
        RewardRule(rule="length"),
        RewardRule(rule="matches", pattern="("),
        RewardRule(rule="random", weight=0.0),
    ]
    problems = list(rule_problems("rewards", rules))
    assert [problem.split(":")[0].split(" ")[0] for problem in problems] == [
        "rewards.0.target",
        "rewards.1.pattern",
        "rewards.2.weight",
    ]


def test_the_process_answers_line_by_line_and_reports_errors(tmp_path: Path) -> None:
    (tmp_path / "loud.py").write_text(
        "def reward(prompt, answer, row):\n    print('noise')\n    return {'good': 1.0}[answer]\n"
    )
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps([{"rule": "function", "function": "loud:reward"}]))
    requests = [[{"answer": answer, "num_tokens": 1, "row": {"text": "Q"}}] for answer in ("good", "evil", "good")]
    done = subprocess.run(
        [sys.executable, str(START), "rewards", str(rules)],
        input="".join(json.dumps(request) + "\n" for request in requests),
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(tmp_path)},
    )
    responses = [json.loads(line) for line in done.stdout.splitlines()]
    assert [response.get("rewards") for response in responses] == [[1.0], None, [1.0]]
    assert "KeyError" in responses[1]["error"]
