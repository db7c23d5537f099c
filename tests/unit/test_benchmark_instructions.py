"""Questions of benchmarks with a rule of IFEval, from which an asset is made."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_minitron.data.benchmark_pairs import instructions


def request(question: str) -> dict[str, Any]:
    return {"doc": {"query": f"Question: {question}\nAnswer:", "choices": ["a roof", "a river"], "gold": 0}}


def test_every_question_gets_a_rule_that_can_be_checked() -> None:
    pytest.importorskip("lm_eval")
    from nemo_minitron.evaluation.instructions import follows, require_checkable, with_rules

    rows = instructions(request(f"What do people number {number} put on houses?") for number in range(40))
    assert len(rows) == 40
    assert {row["completion"] for row in rows} == {"A roof."}
    names = {row["instruction_id_list"][0] for row in rows}
    assert names == {"length_constraints:number_words", "change_case:english_lowercase", "keywords:existence"}
    for row in rows:
        checked = with_rules(row["prompt"], row)
        require_checkable(checked)
        (settings,) = row["kwargs"]
        if "relation" in settings:
            short, long = "word " * (settings["num_words"] - 1), "word " * settings["num_words"]
            good, bad = (long, short) if settings["relation"] == "at least" else (short, long)
        elif "keywords" in settings:
            good, bad = f"A {settings['keywords'][0]}.", "A river."
        else:
            good, bad = "people put a roof on the house.", "People put a roof on the house."
        assert follows(checked, good)["strict"] == [True]
        assert follows(checked, bad)["strict"] == [False]


def test_texts_that_are_no_questions_are_left_out() -> None:
    assert instructions([request("A house has")]) == []
