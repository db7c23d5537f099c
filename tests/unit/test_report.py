"""Tests of the report: computed facts, missing stages, escaping of data."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markupsafe import escape

from nemo_minitron.report.collect import collect
from nemo_minitron.report.comparison import comparison, main_metric
from nemo_minitron.report.curves import thin_out
from nemo_minitron.report.figures import plotted_metrics
from nemo_minitron.report.html import pipeline, render_html
from nemo_minitron.report.importance import ffn_map, importance_curve, importance_share
from nemo_minitron.report.markdown import headline, render_markdown
from nemo_minitron.report.render import render
from nemo_minitron.report.text import millions, plain, table
from nemo_minitron.system.duration import duration
from tests.support.fake_run import fake_run

HOSTILE = "<script>alert('x')</script> & \"quotes\" | $(touch pwned)$ {{ 7*7 }}"


def _model(label: str, bits_per_byte: float) -> dict[str, Any]:
    return {
        "label": label,
        "num_params": 100,
        "num_params_non_embedding": 60,
        "bits_per_byte": bits_per_byte,
        "perplexity": 9.5,
        "checkpoint_bytes": 2**20,
        "tasks": {"piqa": {"acc": 0.5, "acc_norm": bits_per_byte / 4, "acc_norm_stderr": 0.05}},
    }


@pytest.fixture
def report() -> dict[str, Any]:
    models = {label: _model(label, bits) for label, bits in (("teacher", 1.0), ("distilled", 1.2), ("pruned", 2.0))}
    return {
        "title": HOSTILE,
        "recipe": HOSTILE,
        "models": models,
        "recovered_share": 0.8,
        "comparison": comparison(models, None),
        "search": None,
        "pruning": None,
        "curves": [],
        "data_used": [{"stage": "distill", "source": HOSTILE, "weight": 2.0, "tokens": 1000, "epochs": 0.5}],
        "speed": None,
        "data": {"sources": [HOSTILE], "train_num_tokens": 10, "valid_num_tokens": 2},
        "cost": {
            "stages": [{"stage": "distill", "kind": "distill", "wall_s": 60.0, "tokens": None}],
            "total_wall_s": 60.0,
            "distill_tokens": 1000,
            "distill_wall_s": 60.0,
        },
        "samples": [{"prompt": HOSTILE, "texts": {"teacher": HOSTILE}}],
        "lineage": [],
    }


@pytest.fixture(scope="module", params=[False, True], ids=["width", "depth"])
def facts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return report.json of a made-up run."""
    return collect("A title", "a/recipe", fake_run(tmp_path_factory.mktemp("run"), depth=request.param))


# --- the page -----------------------------------------------------------------------------------


def test_data_is_shown_and_never_becomes_markup(report: dict[str, Any]) -> None:
    page = render_html(report, HOSTILE)
    assert "<script" not in page
    assert str(escape("<script>alert('x')</script>")) in page
    assert "{{ 7*7 }}" in page
    assert "49" not in page.split("</style>")[1].split("<svg")[0]


def test_names_of_models_and_tasks_are_escaped_in_the_pictures_too(tmp_path: Path) -> None:
    stages = fake_run(tmp_path, student=HOSTILE)
    for stage in stages.values():
        if stage.kind == "evaluate":
            stage.result["tasks"][HOSTILE] = {"acc": 0.5}  # type: ignore[index]
    page = render_html(collect(HOSTILE, HOSTILE, stages), HOSTILE)
    assert "<script" not in page
    assert page.count("$(touch pwned)$") > 10


def test_the_page_is_one_small_file_with_valid_figures(facts: dict[str, Any]) -> None:
    page = render_html(facts, "name: a/recipe")
    assert len(page.encode()) < 3_000_000
    for outside in ("<script", "<link", "src=", "@import", "url(http", "<iframe"):
        assert outside not in page
    # xmlns and links to papers cause no requests; a browser fetches only src, href and url().
    assert set(re.findall(r'href="([^"#][^"]*)"', page)) <= {
        found for found in re.findall(r'href="(data:image/png;base64,[^"]*)"', page)
    }
    pictures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(pictures) >= 8
    for picture in pictures:
        ElementTree.fromstring(picture)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert "mathdefault" not in page


def test_figures_use_only_colors_of_the_page(facts: dict[str, Any]) -> None:
    page = render_html(facts, "")
    assert "var(--distilled)" in page
    assert not re.search(r"#0101[0-9a-f]{2}", page)


@pytest.mark.parametrize("missing", ["score", "select", "distill", "speed", "data", "evaluate_random", "export"])
def test_a_run_without_a_stage_still_has_a_report(missing: str, tmp_path: Path) -> None:
    facts = collect("t", "r", fake_run(tmp_path, leave_out=(missing,)))
    assert render_html(facts, "")
    assert render_markdown(facts)
    if missing == "evaluate_random":
        assert list(facts["models"]) == ["teacher", "distilled", "pruned"]
        assert facts["recovered_share"] is not None


def test_an_unfinished_run_has_a_report(tmp_path: Path) -> None:
    stages = fake_run(tmp_path)
    facts = collect("t", "r", {"teacher": stages["teacher"]})
    assert facts["recovered_share"] is None
    assert headline(facts).startswith("The run has not measured")
    assert "<h2>Lineage" in render_html(facts, "")
    assert render_markdown(facts).startswith("# t\n")


def test_the_three_files_are_written_without_facts_on_the_machine(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    result = render(None, fake_run(tmp_path / "run"), "a/recipe", {}, out)
    assert sorted(file.name for file in out.iterdir()) == ["report.html", "report.json", "report.md"]
    assert result["recovered_share"] == pytest.approx((1.669 - 1.264) / (1.669 - 1.107))
    for file in out.iterdir():
        text = file.read_text(encoding="utf-8")
        assert "secret-host" not in text
        assert "/home/someone" not in text
    assert json.loads((out / "report.json").read_text())["title"] == "a/recipe"


def test_the_pipeline_is_shown_in_the_order_of_the_stages() -> None:
    ran = [("evaluate", 1.0), ("import", 2.0), ("evaluate", 3.0), ("new_kind", 0.5), ("distill", 4.0)]
    steps = pipeline([{"kind": kind, "wall_s": wall_s} for kind, wall_s in ran])
    assert [(step["kind"], step["count"], step["wall_s"]) for step in steps] == [
        ("import", 1, 2.0),
        ("distill", 1, 4.0),
        ("evaluate", 2, 4.0),
        ("new kind", 1, 0.5),
    ]


# --- facts --------------------------------------------------------------------------------------


def test_columns_are_ordered_and_stages_are_listed_as_they_ran(facts: dict[str, Any]) -> None:
    assert list(facts["models"]) == ["teacher", "distilled", "pruned", "random"]
    assert [row["stage"] for row in facts["cost"]["stages"]][:4] == ["teacher", "data", "check_teacher", "score"]
    tokens = {row["stage"]: row["tokens"] for row in facts["cost"]["stages"]}
    assert tokens["score"] == 64 * 256
    assert tokens["distill"] == 140 * 1024
    assert tokens["prune"] is None


def test_pruning_facts_are_those_of_the_student_not_of_the_control(facts: dict[str, Any]) -> None:
    pruning = facts["pruning"]
    assert (pruning["stage"], pruning["method"]) == ("select", "importance")
    cut = {axis["axis"]: (axis["source"], axis["kept"]) for axis in pruning["axes"] if axis["kept"] < axis["source"]}
    if "lm_loss" in pruning["layer_scores"]:
        assert cut == {"layers": (30, 24)}
        assert set(range(30)) - set(pruning["kept_layers"]) == set(range(12, 18))
        assert pruning["ffn_map"] is None
    else:
        assert cut == {"MLP neurons": (1536, 752)}
        shares = {axis["axis"]: axis["importance_share"] for axis in pruning["axes"]}
        assert shares["hidden size"] == pytest.approx(1.0)
        assert 0.7 < shares["MLP neurons"] < 1.0
        assert shares["layers"] is None


def test_ranks_are_not_shown_as_importance(tmp_path: Path) -> None:
    """A plan made from ranks has no importance, and that of another score stage is not its own."""
    stages = fake_run(tmp_path)
    ranks = replace(stages["score"], stage="ranks", kind="score_reconstruction")
    select = replace(stages["select"], inputs={**stages["select"].inputs, "scores": "ranks"})
    report = collect("A title", "a/recipe", {**stages, "ranks": ranks, "select": select})
    pruning = report["pruning"]
    assert [axis["importance_share"] for axis in pruning["axes"]] == [None] * len(pruning["axes"])
    assert not pruning["importance"]
    assert pruning["ffn_map"] is None
    for page in (render_markdown(report), render_html(report, "")):
        assert "MLP neurons" in page
        assert "importance kept" not in page
        assert "Importance in descending order" not in page


def test_importance_kept_by_hand() -> None:
    assert importance_share(np.array([4.0, 1.0, 3.0, 2.0]), "0,2") == pytest.approx(0.7)
    two = np.array([[3.0, 1.0], [1.0, 1.0], [9.0, 1.0]])
    assert importance_share(two, {"0": "0", "2": "1"}) == pytest.approx((0.75 + 0.1) / 2)
    assert importance_share(two, "all") == 1.0


def test_importance_curves_are_sorted_within_each_layer_and_relative_to_its_median() -> None:
    curve = importance_curve(np.array([[1.0, 4.0, 2.0], [10.0, 1.0, 2.0]]), 2)
    assert curve["rank"] == [1, 2, 3]
    assert curve["mean"] == [3.5, 1.0, 0.5]
    assert (curve["low"], curve["high"]) == ([2.0, 1.0, 0.5], [5.0, 1.0, 0.5])
    assert (curve["kept"], curve["size"], curve["num_layers"]) == (2, 3, 2)
    assert len(importance_curve(np.ones(5000), 10)["rank"]) <= 160


def test_the_map_of_neurons_has_means_of_adjacent_ranks() -> None:
    assert ffn_map(np.array([[1.0, 100.0], [10.0, 0.1]])) == [[2.0, 0.0], [1.0, -1.0]]
    assert np.array(ffn_map(np.ones((3, 1000)))).shape == (3, 96)


def test_long_curves_keep_their_ends() -> None:
    rows = [{"step": step} for step in range(1001)]
    thin = thin_out(rows, 11)
    assert [row["step"] for row in thin] == list(range(0, 1001, 100))
    assert thin_out(rows[:3], 11) == rows[:3]


# --- the table ----------------------------------------------------------------------------------


def test_markdown_cells_cannot_break_their_table() -> None:
    assert table(["a"], [["x|y\nz"]]).splitlines()[-1] == "| x\\|y z |"


def test_the_best_student_is_marked_by_the_direction_of_the_figure(report: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in report["comparison"]}
    assert (rows["bits per byte"]["best"], rows["bits per byte"]["worst"]) == ("distilled", "pruned")
    # In these made-up numbers accuracy rises with the loss. The teacher is never marked.
    assert rows["piqa (acc_norm)"]["best"] == "pruned"
    assert rows["piqa (acc_norm)"]["text"]["pruned"] == "0.500 ± 0.050"
    assert rows["parameters"]["best"] is None


def test_a_gap_within_its_error_is_not_marked() -> None:
    models = {label: _model(label, bits) for label, bits in (("teacher", 1.0), ("distilled", 1.2), ("pruned", 1.3))}
    row = next(row for row in comparison(models, None) if row["name"].startswith("piqa"))
    assert (row["best"], row["worst"]) == (None, None)


def test_the_mean_of_the_tasks_needs_every_task() -> None:
    scores = {"piqa": {"acc": 0.5, "acc_stderr": 0.03}, "sciq": {"acc": 0.7, "acc_norm": 0.1, "acc_stderr": 0.04}}
    models = {"teacher": {**_model("teacher", 1.0), "tasks": scores}, "pruned": {**_model("p", 2.0), "tasks": scores}}
    models["distilled"] = {**_model("distilled", 1.5), "tasks": {"piqa": scores["piqa"]}}
    row = next(row for row in comparison(models, None) if row["name"] == "mean of the tasks")
    assert row["text"] == {"teacher": "0.600 ± 0.025", "pruned": "0.600 ± 0.025"}


def test_of_perplexities_the_lowest_is_the_best_and_none_is_in_the_mean() -> None:
    def model(label: str, perplexity: float, acc: float) -> dict[str, Any]:
        tasks = {"wikitext": {"word_perplexity": perplexity}, "piqa": {"acc": acc}, "sciq": {"acc": acc}}
        return {**_model(label, 1.0), "tasks": tasks, "tasks_lower_is_better": {"wikitext": ["word_perplexity"]}}

    models = {"distilled": model("distilled", 20.0, 0.6), "pruned": model("pruned", 900.0, 0.5)}
    rows = {row["name"]: row for row in comparison(models, None)}
    assert rows["wikitext (word_perplexity)"]["best"] == "distilled"
    assert rows["mean of the tasks"]["text"] == {"distilled": "0.600", "pruned": "0.500"}
    assert list(plotted_metrics(models)) == ["piqa", "sciq"]


def test_a_task_is_compared_by_a_metric_that_all_have() -> None:
    models = {"a": {"tasks": {"sciq": {"acc": 0.1, "acc_norm": 0.2}, "x": {"exact_match,strict": 1.0}}}}
    assert main_metric("sciq", models) == "acc"
    assert main_metric("x", models) == "exact_match,strict"
    both = {"a": {"tasks": {"t": {"acc": 0.1, "acc_norm": 0.2}}}, "b": {"tasks": {"t": {"acc": 0.1}}}}
    assert main_metric("t", both) == "acc"
    assert main_metric("t", {"a": both["a"]}) == "acc_norm"


def test_a_group_without_a_score_has_no_row_and_leaves_the_mean() -> None:
    scores = {"piqa": {"acc": 0.5}, "sciq": {"acc": 0.7}, "a_group": {}}
    models = {label: {**_model(label, 1.0), "tasks": scores} for label in ("teacher", "distilled")}
    rows = {row["name"]: row["text"] for row in comparison(models, None)}
    assert not [name for name in rows if "a_group" in name]
    assert rows["mean of the tasks"] == {"teacher": "0.600", "distilled": "0.600"}
    assert list(plotted_metrics(models)) == ["piqa", "sciq"]


# --- texts --------------------------------------------------------------------------------------


def test_the_headline_has_sizes_share_and_cost(report: dict[str, Any]) -> None:
    assert "recovered 80% of the quality lost in pruning with 1,000 tokens in 1 min 0 s of distillation." in headline(
        report
    )
    assert "recovered" not in headline({**report, "recovered_share": None})
    assert "lost another 20%" in headline({**report, "recovered_share": -0.2})
    assert headline({**report, "models": {}}).startswith("The run has not measured")
    assert "| bits per byte | 1.000 | **1.200** | 2.000 |" in render_markdown(report)


def test_sizes_and_times_are_readable() -> None:
    assert millions(229_952) == "230K"
    assert millions(134_515_008) == "134.5M"
    assert millions(8_030_261_248) == "8.03B"
    assert [duration(seconds) for seconds in (0.2, 59.6, 347, 7500, 1_814_400)] == [
        "< 1 s",
        "1 min 0 s",
        "5 min 47 s",
        "2 h 5 min",
        "21 d 0 h",
    ]


def test_data_in_markdown_is_one_line_without_markup() -> None:
    assert plain("a *b*\n<c> `d`") == "a \\*b\\* \\<c\\> \\`d\\`"
