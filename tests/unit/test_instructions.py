"""Rules that a program can check: which answers follow them, errors of bad files, and counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.errors import DataError, EnvironmentProblem
from nemo_minitron.evaluation.instructions import InstructionRow, follows, instruction_metrics, read_instructions
from nemo_minitron.hf.source import BUILT_IN

OBEYED = {
    "punctuation:no_comma": "red green blue",
    "change_case:english_lowercase": "cows eat grass and hay all day long",
    "change_case:english_capital": "THE SUN RISES IN THE EAST EVERY MORNING",
    "detectable_format:json_format": '{"name": "Rex", "age": 3}',
    "keywords:existence": "A wave leaves salt on the rocks, and wheels roll by.",
    "startend:quotation": '"A friend stays."',
    "detectable_format:title": "<<The river>>\nIt flows. It sings.",
    "detectable_content:number_placeholders": "[name], [street], [town]",
}
BROKEN = {
    "punctuation:no_comma": "red, green, blue",
    "change_case:english_lowercase": "Cows eat grass and hay all day long",
    "change_case:english_capital": "The sun rises in the east every morning",
    "detectable_format:json_format": "Rex is 3",
    "keywords:existence": "Water moves.",
    "startend:quotation": "A friend stays.",
    "detectable_format:title": "The river flows.",
    "detectable_content:number_placeholders": "[name] only",
}


def _write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("rule", OBEYED)
def test_a_rule_accepts_and_rejects_answers(rule: str) -> None:
    row = next(row for row in read_instructions(BUILT_IN["instructions"], 100) if row.rules == (rule,))
    assert follows(row, OBEYED[rule]) == {"strict": [True], "loose": [True]}
    assert follows(row, BROKEN[rule])["strict"] == [False]


def test_an_empty_answer_follows_no_rule() -> None:
    for row in read_instructions(BUILT_IN["instructions"], 100):
        assert not any(follows(row, "")["loose"]), row


def test_loose_forgives_a_line_before_the_answer() -> None:
    row = InstructionRow("q", ("change_case:english_lowercase",), ({},))
    assert follows(row, "Sure!\nthe cows eat grass and hay") == {"strict": [False], "loose": [True]}


def test_shares_of_prompts_and_of_rules() -> None:
    found = [{"strict": [True, False], "loose": [True, True]}, {"strict": [True], "loose": [True]}]
    assert instruction_metrics(found) == {
        "prompts": 2,
        "prompt_strict": 0.5,
        "rule_strict": pytest.approx(2 / 3),
        "prompt_loose": 1.0,
        "rule_loose": 1.0,
        "prompt_strict_se": pytest.approx(0.125**0.5),
    }


def test_settings_that_a_table_leaves_empty_do_not_count(tmp_path: Path) -> None:
    kwargs = {"num_words": 3, "relation": "at least", "keywords": None}
    file = _write(
        tmp_path / "rows.jsonl",
        {"prompt": "q", "instruction_id_list": ["length_constraints:number_words"], "kwargs": [kwargs]},
    )
    (row,) = read_instructions(file, 5)
    assert row.settings == ({"num_words": 3, "relation": "at least"},)
    assert follows(row, "one two")["strict"] == [False]
    assert follows(row, "one two three")["strict"] == [True]


@pytest.mark.parametrize(
    ("row", "output"),
    [
        ({"prompt": "q"}, "no prompt with rules"),
        ({"prompt": "q", "instruction_id_list": ["punctuation:no_coma"], "kwargs": [{}]}, "unknown rule"),
        ({"prompt": "q", "instruction_id_list": ["punctuation:no_comma"], "kwargs": []}, "1 rules and 0 kwargs"),
        (
            {"prompt": "q", "instruction_id_list": ["length_constraints:number_words"], "kwargs": [{"num_words": 3}]},
            "lacks relation",
        ),
    ],
)
def test_a_bad_row_is_named(row: dict[str, Any], output: str, tmp_path: Path) -> None:
    good = {"prompt": "q", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    with pytest.raises(DataError, match=output) as error:
        read_instructions(_write(tmp_path / "rows.jsonl", good, row), 5)
    assert "rows.jsonl:2" in str(error.value)


def test_a_setting_out_of_range_is_named() -> None:
    row = InstructionRow("q", ("length_constraints:number_words",), ({"num_words": 3, "relation": "about"},))
    with pytest.raises(DataError, match="do not fit"):
        follows(row, "x")


def test_a_rule_that_needs_nltks_model_reports_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    row = InstructionRow(
        "q", ("change_case:capital_word_frequency",), ({"capital_relation": "at least", "capital_frequency": 1},)
    )
    with pytest.raises(EnvironmentProblem, match="nltk"):
        follows(row, "ONE two")
