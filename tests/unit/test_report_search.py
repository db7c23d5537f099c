"""Tests of the report section on a search: sentence, table, figures, and no section without a search."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.report.collect import collect
from nemo_minitron.report.html import render_html
from nemo_minitron.report.markdown import render_markdown
from nemo_minitron.report.search import ladder, notes, pareto, search_table, sentence
from tests.support.fake_run import fake_run

HOSTILE = "<b>c</b> $x$ | & `y`"


@pytest.fixture
def search(tmp_path: Path) -> dict[str, Any]:
    """Return search.json as part of report.json."""
    return dict(collect("t", "r", fake_run(tmp_path, search=True))["search"])


def _candidate(search: dict[str, Any], name: str) -> dict[str, Any]:
    return next(dict(candidate) for candidate in search["candidates"] if candidate["name"] == name)


def _texts(svg: str) -> list[str]:
    return [text.text or "" for text in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


# --- facts --------------------------------------------------------------------------------------


def test_the_report_contains_the_search_unchanged(tmp_path: Path) -> None:
    stages = fake_run(tmp_path, search=True)
    facts = collect("t", "r", stages)
    assert facts["search"] == json.loads((stages["search"].path / "search.json").read_text())


def test_of_two_searches_the_first_in_the_plan_is_reported(tmp_path: Path) -> None:
    early, late = (fake_run(tmp_path / name, search=True)["search"] for name in ("early", "late"))
    late.provenance["started"] = "2030"  # type: ignore[index]
    facts = json.loads((late.path / "search.json").read_text())
    (late.path / "search.json").write_text(json.dumps({**facts, "winner": "c05"}))
    assert collect("t", "r", {"second": late, "first": early})["search"]["winner"] == "c05"


def test_a_run_without_a_search_has_no_such_section(tmp_path: Path) -> None:
    facts = collect("t", "r", fake_run(tmp_path))
    assert facts["search"] is None
    assert "Search" not in render_markdown(facts)
    page = render_html(facts, "")
    assert "<h2>Search" not in page
    assert "search-pareto" not in page


# --- texts --------------------------------------------------------------------------------------


def test_the_sentence_has_winner_training_and_rank_correlation(search: dict[str, Any]) -> None:
    beginning = "c03 wins: loss 4.01 after 40 steps; 6 candidates, 2 rungs"
    assert sentence(search) == f"{beginning}; zero-shot order and final order agree, Kendall tau 0.73."
    assert sentence({**search, "rank_correlation": None}) == f"{beginning}."
    assert "do not agree, Kendall tau -0.20" in sentence({**search, "rank_correlation": -0.2})


def test_only_constraints_that_were_set_are_listed(search: dict[str, Any]) -> None:
    requested, columns, front = notes(search)
    assert requested == "Constraints: 94.0M parameters within 5 %; at most 0.5 GiB of memory."
    assert "1 sequence of 4,096 tokens" in columns
    assert front.endswith(": c06, c02, c03.")
    none = dict.fromkeys(search["constraints"]) | {"context_tokens": 512, "batch_size": 8}
    assert notes({**search, "constraints": none})[0].startswith(
        "Memory: weights and the KV cache of 8 sequences of 512"
    )
    every = {**none, "num_params_min": 1e6, "num_params_max": 2e9, "max_memory_gib": 3, "max_decode_ms": 2.5}
    assert notes({**search, "constraints": every})[0] == (
        "Constraints: at least 1.0M parameters; at most 2.00B parameters; at most 3 GiB of memory; "
        "at most 2.5 ms for a generated token."
    )


def test_rows_are_sorted_by_rank_and_have_the_steps_of_each_loss(search: dict[str, Any]) -> None:
    header, rows = search_table(search)
    by_name = {row[1]: dict(zip(header, row, strict=True)) for row in rows}
    assert [row[0] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert by_name["c03"]["parameters"] == "93.9M"
    assert by_name["c04"]["heads/groups"] == "6/3"
    assert [(by_name[name]["steps"], by_name[name]["final loss"]) for name in ("c03", "c06")] == [
        ("40", "4.012"),
        ("10", "5.096"),
    ]


def test_speed_has_a_column_only_if_it_was_measured(search: dict[str, Any]) -> None:
    assert "tokens/s" not in search_table(search)[0]
    search["candidates"][0]["generate_tokens_per_s"] = 41.23
    header, rows = search_table(search)
    assert [row[header.index("tokens/s")] for row in rows] == ["41.2", "", "", "", "", ""]


def test_a_name_cannot_become_markup_or_break_the_table(tmp_path: Path) -> None:
    facts = collect("t", "r", fake_run(tmp_path, search=True))
    facts["search"]["candidates"][0]["name"] = facts["search"]["winner"] = HOSTILE
    page, text = render_html(facts, ""), render_markdown(facts)
    assert "<b>c</b>" not in page + text
    assert page.count("$x$") >= 4
    assert len(re.findall(r"(?<!\\)\|", next(line for line in text.splitlines() if line.startswith("| **1**")))) == 13


# --- figures ------------------------------------------------------------------------------------


def test_the_page_shows_the_table_and_both_figures(tmp_path: Path) -> None:
    page = render_html(collect("t", "r", fake_run(tmp_path, search=True)), "")
    section = page.split("<h2>Search: which shape</h2>")[1].split("</section>")[0]
    assert section.count("<svg") == 2
    assert section.count('<tr class="winner">') == 1
    # These candidates were dropped after the first rung.
    assert section.count('<tr class="whole">') == 3
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert not re.search(r"#0101[0-9a-f]{2}", page)


def test_figures_name_winner_and_front(search: dict[str, Any]) -> None:
    texts = _texts(pareto(search))
    assert {"c03", "c02", "c06", "winner", "Pareto front", "10 steps", "40 steps", "million parameters"} <= set(texts)
    texts = _texts(ladder(search))
    assert {"c03", "0", "10", "40"} <= set(texts)


def test_the_figures_have_alternative_texts(search: dict[str, Any]) -> None:
    assert 'aria-label="Loss over parameters of 6 candidates; on the front: c06, c02, c03; winner: c03."' in pareto(
        search
    )
    assert "5.19 after 0 steps, 4.40 after 10 steps, 4.01 after 40 steps" in ladder(search)


@pytest.mark.parametrize("rungs", [0, 1])
def test_a_search_of_few_rungs_or_one_candidate_is_drawn_too(search: dict[str, Any], rungs: int) -> None:
    only = {**_candidate(search, "c03"), "losses": [4.4][:rungs], "num_params": 2e9}
    small = {**search, "candidates": [only], "rungs": search["rungs"][:rungs], "rank_correlation": None}
    assert "billion parameters" in _texts(pareto(small))
    assert "c03" in _texts(ladder(small))
    assert sentence(small).endswith(("untrained; 1 candidate, 0 rungs.", "after 10 steps; 1 candidate, 1 rung."))


def test_of_crowded_points_not_all_are_named_but_the_winner_is(search: dict[str, Any]) -> None:
    one = _candidate(search, "c03")
    crowd = [{**one, "name": f"a-long-name-{number}", "rank": number} for number in range(1, 30)]
    texts = _texts(ladder({**search, "candidates": crowd, "winner": "a-long-name-1"}))
    assert "a-long-name-1" in texts
    assert sum(text.startswith("a-long-name") for text in texts) < 10


@pytest.mark.parametrize(("facts", "outcome"), [({}, "too slow"), ({"diverged": True}, "diverged")])
def test_a_candidate_that_was_not_trained_has_no_loss_and_no_point(
    facts: dict[str, bool], outcome: str, search: dict[str, Any]
) -> None:
    slow = {**_candidate(search, "c03"), "name": "slow", "zero_shot_loss": None, "losses": [None]}
    slow |= {"rank": 99, "num_params": 1, "generate_tokens_per_s": 3.0, **facts}
    found = {**search, "candidates": [*search["candidates"], slow]}
    _, rows = search_table(found)
    assert rows[-1][1] == "slow"
    assert rows[-1][-3:] == ["", "", outcome]
    for figure in (pareto(found), ladder(found)):
        assert "slow" not in _texts(figure)
    assert "slow" not in " ".join(notes(found))
