"""A search from grid to report, killed and resumed; and a chain of two prunings."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from nemo_minitron.backends.megatron.training import loop
from nemo_minitron.report.search import search_table
from tests.conftest import REPO, Cli

SEARCH, CHAIN = REPO / "recipes/toy/search.yaml", REPO / "recipes/toy/chain.yaml"
THIRD, FOURTH = "search_l3_h64_f144", "search_l4_h48_f144"


def _result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())["result"]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return (run folder, output of the second command) of a search that was killed in its fourth candidate."""
    root = tmp_path_factory.mktemp("search")
    run = root / "toy/search"
    command = [sys.executable, "-m", "nemo_minitron", "run", str(SEARCH), f"execution.run_root={root}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = root / "log"
    with log.open("w") as output:
        first = subprocess.Popen(command, cwd=REPO, env=environment, stdout=output, stderr=output)
    deadline = time.monotonic() + 240
    while not (run / f".work/{FOURTH}/pruned").is_dir():
        assert first.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert (run / THIRD / "manifest.json").is_file()
    assert not (run / FOURTH).exists()
    again = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=400)
    assert again.returncode == 0, again.stderr
    return run, again.stdout + again.stderr


def test_a_killed_search_continues_with_its_current_candidate(resumed: tuple[Path, str]) -> None:
    _, output = resumed
    assert f"{FOURTH} (candidate)" in output
    assert THIRD not in output
    assert "score (score)" not in output


def test_every_candidate_is_cut_from_one_set_of_scores_and_the_best_continue(resumed: tuple[Path, str]) -> None:
    run, _ = resumed
    search = json.loads((run / "search/search.json").read_text())
    assert [rung["num_candidates"] for rung in search["rungs"]] == [7, 3]
    candidates = search["candidates"]
    assert [found["rank"] for found in candidates] == list(range(1, 8))
    assert [len(found["losses"]) for found in candidates] == [2, 2, 2, 1, 1, 1, 1]
    last = [found["losses"][-1] for found in candidates]
    assert last[:3] == sorted(last[:3])
    assert last[3:] == sorted(last[3:])
    first_rung = sorted(candidates, key=lambda found: found["losses"][0])
    assert {found["name"] for found in first_rung[:3]} == {found["name"] for found in candidates[:3]}
    for found in candidates:
        result = _result(run / f"search_{found['name']}")
        assert (result["num_params"], result["losses"][0]) == (found["num_params"], found["losses"][0])
        assert result["zero_shot_loss"] == found["zero_shot_loss"] > found["losses"][-1]
        plan = json.loads((run / f"search_{found['name']}/prune_plan.json").read_text())
        assert plan["target"]["ffn_hidden_size"] == found["ffn_hidden_size"]


def test_the_winner_is_what_is_pruned_and_distilled(resumed: tuple[Path, str]) -> None:
    run, _ = resumed
    best = json.loads((run / "search/search.json").read_text())["candidates"][0]
    for stage in ("select", "select_random"):
        target = json.loads((run / stage / "prune_plan.json").read_text())["target"]
        assert target == {key: best[key] for key in target}
    assert _result(run / "distill")["num_params"] == best["num_params"]
    report = (run / "report.md").read_text()
    assert f"{best['num_params']:,}" in report


def test_the_plan_of_a_finished_search_has_the_students_sizes(
    resumed: tuple[Path, str], minitron: Cli, tmp_path: Path
) -> None:
    run, _ = resumed
    code, output = minitron("plan", SEARCH, f"execution.run_root={run.parents[1]}", "--json")
    assert code == 0, output
    plan = json.loads(output)
    best = json.loads((run / "search/search.json").read_text())["candidates"][0]
    assert plan["student"]["num_params"] == best["num_params"]
    assert len(plan["candidates"]) == 7
    assert {stage["status"] for stage in plan["stages"]} == {"finished"}
    code, output = minitron("plan", SEARCH, f"execution.run_root={tmp_path}", "--json")
    assert json.loads(output)["student"] is None, "before the search nobody knows"


def test_a_candidate_that_diverges_is_ranked_last(
    minitron: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    step = loop.train_step

    def diverging(job: loop.Job, *args: Any) -> tuple[dict[str, float], str | None]:
        row, stop_reason = step(job, *args)
        return ({**row, "train_loss": math.nan} if job.shape.hidden_size == 48 else row), stop_reason

    monkeypatch.setattr(loop, "train_step", diverging)
    keys = [
        f"execution.run_root={tmp_path}",
        "stages.search.grid={num_layers: [], hidden_size: [48, 56], ffn_hidden_size: [112, 144]}",
        "stages.search.constraints.num_params=null",
        "stages.search.rungs=[{num_steps: 1, keep: 3}, {num_steps: 1}]",
        "stages.search.retraining={warmup_steps: 0, lr_schedule: constant}",
    ]
    code, output = minitron("run", SEARCH, *keys, "--until", "search")
    assert code == 0, output
    assert "search_h48_f112: loss nan" in output
    found = json.loads((tmp_path / "toy/search/search/search.json").read_text())
    assert found["winner"].startswith("h56")
    # The third place of the second rung goes to one that diverged in the first; it is not trained again.
    assert [len(one["losses"]) for one in found["candidates"]] == [2, 2, 2, 1]
    assert [one["losses"][-1] is None for one in found["candidates"]] == [False, False, True, True]
    assert [row[-1] for row in search_table(found)[1]][2:] == ["diverged", "diverged"]


def test_a_chain_prunes_what_it_distilled(minitron: Cli, tmp_path: Path) -> None:
    code, output = minitron("plan", CHAIN, f"execution.run_root={tmp_path}", "--json")
    planned = json.loads(output)["student"]["num_params"]
    code, output = minitron("run", CHAIN, f"execution.run_root={tmp_path}")
    assert code == 0, output
    run = tmp_path / "toy/chain"
    sizes = [
        _result(run / stage)["num_params"] for stage in ("teacher", "distill", "distill_2", "export", "prune_random")
    ]
    assert sizes[0] > sizes[1] > sizes[2] == sizes[3] == sizes[4] == planned
    second = _result(run / "distill_2")
    assert second["final_valid_kl"] < second["initial_valid_kl"]
    plan = json.loads((run / "select_2/prune_plan.json").read_text())
    assert plan["source"]["ffn_hidden_size"] == 144, "the second plan is for the first round's student"


@pytest.mark.slow
def test_the_winner_beats_the_median_candidate_after_full_distillation(
    resumed: tuple[Path, str], minitron: Cli, tmp_path: Path
) -> None:
    run, _ = resumed
    candidates = json.loads((run / "search/search.json").read_text())["candidates"]
    losses = {}
    for found in candidates:
        sizes = [f"stages.select.target.{key}={found[key]}" for key in ("num_layers", "hidden_size", "ffn_hidden_size")]
        scored = ["stages.score.layer_metrics=[lm_loss]", "stages.score.depth_samples=16"]
        keys = [f"name={found['name']}", "stages.select.layer_metric=lm_loss", *scored, *sizes]
        code, output = minitron(
            "run", REPO / "recipes/toy/width.yaml", f"execution.run_root={tmp_path}", *keys, "--until", "distill"
        )
        assert code == 0, output
        losses[found["name"]] = _result(tmp_path / found["name"] / "distill")["final_valid_loss"]
    print("final losses, best of the search first:", {name: round(loss, 4) for name, loss in losses.items()})
    assert losses[candidates[0]["name"]] < median(losses.values())
