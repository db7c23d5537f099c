"""The report: what is computed, and that data never becomes markup."""

from __future__ import annotations

from typing import Any

import pytest
from markupsafe import escape

from nemo_minitron.report.collect import comparison
from nemo_minitron.report.html import render_html
from nemo_minitron.report.markdown import headline, millions, render_markdown, table
from nemo_minitron.report.model_card import render_card

HOSTILE = "<script>alert('x')</script> & \"quotes\" | $(touch pwned) {{ 7*7 }}"


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
        "pruning": None,
        "curves": [],
        "speed": None,
        "data": {"sources": [HOSTILE], "train_num_tokens": 10, "valid_num_tokens": 2},
        "cost": {
            "stages": [{"stage": "distill", "kind": "distill", "wall_s": 60.0}],
            "total_wall_s": 60.0,
            "distill_tokens": 1000,
            "distill_wall_s": 60.0,
        },
        "samples": [{"prompt": HOSTILE, "texts": {"teacher": HOSTILE}}],
        "lineage": [],
    }


def test_data_is_shown_and_never_becomes_markup(report: dict[str, Any]) -> None:
    page = render_html(report, None, None, HOSTILE)
    assert "<script" not in page
    assert str(escape("<script>alert('x')</script>")) in page
    assert "{{ 7*7 }}" in page
    assert "49" not in page.split("</style>")[1].split("<svg")[0]


def test_markdown_cells_cannot_break_their_table() -> None:
    assert table(["a"], [["x|y\nz"]]).splitlines()[-1] == "| x\\|y z |"


def test_the_best_student_is_marked_by_the_direction_of_the_figure(report: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in report["comparison"]}
    assert rows["bits per byte"]["best"] == "distilled"
    # In these made-up numbers accuracy rises with the loss; the teacher never competes.
    assert rows["piqa (acc_norm)"]["best"] == "pruned"
    assert rows["piqa (acc_norm)"]["text"]["pruned"] == "0.500 ± 0.050"
    assert rows["parameters"]["best"] is None


def test_the_headline_tells_sizes_share_and_cost(report: dict[str, Any]) -> None:
    assert "80% of the quality lost in pruning won back with 1,000 tokens in 1.0 minutes" in headline(report)
    assert "won back" not in headline({**report, "recovered_share": None})
    assert headline({**report, "models": {}}).startswith("The run has not measured")
    assert "| bits per byte | 1.000 | 1.200 | 2.000 |" in render_markdown(report)


def test_sizes_are_written_as_people_say_them() -> None:
    assert millions(134_515_008) == "134.5M"
    assert millions(8_030_261_248) == "8.03B"


def test_the_card_carries_the_licence_and_its_conditions() -> None:
    facts = {"num_params": 50, "shape": {"num_layers": 2}}
    teacher = {"num_params": 100, "license": "llama3.1", "source": "hf:meta-llama/Llama-3.1-8B", "shape": {}}
    card = render_card("small", facts=facts, teacher=teacher, model={}, metrics=[])
    assert card.startswith("---\nlicense: llama3.1\n")
    assert "base_model: meta-llama/Llama-3.1-8B" in card
    assert "Built with Llama" in card
    unknown = render_card("small", facts=facts, teacher={**teacher, "license": None}, model={}, metrics=[])
    assert "license: other" in unknown
