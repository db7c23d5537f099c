"""Report section on the repair of a pruned model: the recovered error, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_minitron.artifacts.types import Artifact
from nemo_minitron.report import figures
from nemo_minitron.report.text import plain, table

TITLES = {
    "attention_input": "q, k, v",
    "attention_output": "o_proj",
    "mlp_input": "gate, up",
    "mlp_output": "down_proj",
    "head": "lm_head",
}
"""Site -> name of its weights in tables."""
SENTENCE = (
    "Share of the squared error of plain slicing that least squares has removed, on held-out text. A weight that would "
    "have been worse there keeps its sliced values."
)


def compensation_facts(stage: Artifact | None) -> dict[str, Any] | None:
    """Return {stage, mode, layers: [{site: {recovered, error, sliced_error, damping}}]}; None without a repair."""
    if stage is None:
        return None
    layers = json.loads((stage.path / "compensation.json").read_text(encoding="utf-8"))
    return {"stage": stage.stage, "mode": stage.result["mode"], "layers": layers}


def compensation_rows(facts: Mapping[str, Any]) -> list[list[str]]:
    """Return a row for each site: its weights, mean, smallest and largest share, and the layers that stay sliced."""
    rows = []
    for site in sites_of(facts["layers"]):
        found = [layer[site] for layer in facts["layers"] if site in layer]
        shares = [one["recovered"] for one in found]
        sliced = sum(one["damping"] is None for one in found)
        mean = sum(shares) / len(shares)
        numbers = [f"{mean:.0%}", f"{min(shares):.0%}", f"{max(shares):.0%}", str(len(found)), str(sliced)]
        rows.append([TITLES.get(site, site), *numbers])
    return rows


HEADER = ["weights", "mean", "lowest", "highest", "layers", "of these kept sliced"]


def sites_of(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the sites that were repaired in any layer, in the order of the network."""
    return [site for site in TITLES if any(site in layer for layer in layers)]


def compensation_markdown(facts: Mapping[str, Any]) -> str:
    """Return the section of report.md."""
    rows = [[plain(cell) for cell in row] for row in compensation_rows(facts)]
    return f"{SENTENCE}\n\n{table(HEADER, rows)}"


def recovered_by_layer(facts: Mapping[str, Any]) -> str:
    """Plot the recovered share of each layer, a line for each site."""
    layers = facts["layers"]
    lines = {
        TITLES[site]: [(number, layer[site]["recovered"]) for number, layer in enumerate(layers) if site in layer]
        for site in sites_of(layers)
        if site != "head"
    }
    return figures.share_by_layer("compensation", lines, "Error of slicing that the repair has removed, by layer.")
