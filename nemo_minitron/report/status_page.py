"""Status page of a running run: one self-contained HTML file that reloads itself."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nemo_minitron import __version__
from nemo_minitron.launch.logs import logs_of, tail
from nemo_minitron.report.pages import page_templates
from nemo_minitron.system.disclosure import masked_log, masked_values

LOG_LINES, CURVE_POINTS = 12, 200
WIDTH, HEIGHT, MARGIN = 640, 120, 6
"""Size and margin of a loss curve, in SVG units."""
LOSS_KEYS = ("train_loss", "train/loss", "loss")
"""Loss of a step in the curves of trainings by Megatron-Core, by NeMo-Aligner, and by NeMo-Aligner on rewards."""


def render_status(
    facts: Mapping[str, Any], *, reload_s: float, environment: Mapping[str, str] = MappingProxyType({})
) -> str:
    """Render the page without secrets; the template escapes all texts from logs and recipes.

    Args:
        facts: result of `status_facts`.
        reload_s: seconds after which a browser reloads the page.
        environment: the recipe's `execution.cluster.environment`, whose secrets are masked, too.
    """
    run = Path(facts["run_dir"])
    stages = masked_values(facts["stages"], environment)
    running = [
        {"name": name, **stage, "curve": curve(_losses(run, name)), "log": _last_lines(run, name, environment)}
        for name, stage in stages.items()
        if stage["running"]
    ]
    return (
        page_templates()
        .get_template("status.html.j2")
        .render(
            name=facts["name"],
            stages=stages,
            running=running,
            finished=sum(stage["status"] == "finished" for stage in stages.values()),
            written=time.strftime("%Y-%m-%d %H:%M:%S"),
            reload_s=max(1, round(reload_s)),
            version=__version__,
        )
    )


def curve(losses: Sequence[float]) -> str:
    """Return the points of an SVG polyline, with the highest loss at the top; empty for fewer than two losses."""
    finite = [loss for loss in losses if loss == loss and abs(loss) != float("inf")]
    if len(finite) < 2:
        return ""
    kept = finite[:: -(-len(finite) // CURVE_POINTS)]
    low, high = min(kept), max(kept)
    across = (WIDTH - 2 * MARGIN) / max(1, len(kept) - 1)
    up = (HEIGHT - 2 * MARGIN) / ((high - low) or 1.0)
    return " ".join(f"{MARGIN + i * across:.1f},{MARGIN + (high - loss) * up:.1f}" for i, loss in enumerate(kept))


def _losses(run: Path, stage: str) -> list[float]:
    """Return the losses so far of a running training of Megatron-Core or NeMo-Aligner."""
    work = run / ".work" / stage
    file = next(
        (path for path in (work / "curves.jsonl", work / "training/curves.jsonl") if os.access(path, os.R_OK)), None
    )
    if file is None:
        return []
    out = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # the last line may be incomplete
            continue
        if isinstance(row, dict):
            out += [float(row[key]) for key in LOSS_KEYS if isinstance(row.get(key), float)][:1]
    return out


def _last_lines(run: Path, stage: str, environment: Mapping[str, str]) -> list[str]:
    found = logs_of(run, stage)
    return masked_log(tail(found[-1], LOG_LINES), environment) if found else []
