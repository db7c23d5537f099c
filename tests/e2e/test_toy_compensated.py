"""Ranking by reconstruction, pruning and repair through the command line: layouts, faults, report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemo_minitron import api
from nemo_minitron.pruning.search import kendall_tau
from tests.conftest import REPO, Cli

RECIPE = REPO / "recipes/toy/compensated.yaml"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run_root of one finished run."""
    root = tmp_path_factory.mktemp("compensation")
    api.run(api.load_recipe(RECIPE, [f"execution.run_root={root}"]), quiet=True)
    return root


def test_the_repair_recovers_much_of_the_loss_without_training(root: Path) -> None:
    report = json.loads((root / "toy/compensated/report.json").read_text())
    loss = {label: model["bits_per_byte"] for label, model in report["models"].items()}
    assert loss["teacher"] < loss["distilled"] < loss["compensated"] < loss["pruned"]
    assert (loss["pruned"] - loss["compensated"]) / (loss["pruned"] - loss["teacher"]) > 0.4


def test_the_report_shows_each_layer(root: Path) -> None:
    run = root / "toy/compensated"
    assert "What least squares won back" in (run / "report.html").read_text()
    assert "| down_proj |" in (run / "report.md").read_text()
    facts = json.loads((run / "compensate/compensation.json").read_text())
    assert len(facts) == 4
    assert all(site["error"] <= site["sliced_error"] for layer in facts for site in layer.values())


def test_a_tensor_parallel_layout_gives_the_same_model(root: Path, tmp_path: Path) -> None:
    """Its processes count as data parallel, each with whole layers."""
    shutil.copytree(root / "toy/compensated", tmp_path / "toy/compensated")
    shutil.rmtree(tmp_path / "toy/compensated/compensate")
    options = [f"execution.run_root={tmp_path}", "execution.parallel.tp=2"]
    api.run(api.load_recipe(RECIPE, options), until="compensate", quiet=True)
    one, two = (load_file(str(folder / "toy/compensated/compensate/model.safetensors")) for folder in (root, tmp_path))
    for name, tensor in one.items():
        # The checkpoint is bf16: a difference in the last digit of a sum may round to its neighbor.
        torch.testing.assert_close(two[name], tensor, rtol=2**-7, atol=1e-4 * float(tensor.abs().max()))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("stages.compensate.num_samples=4", "512 calibration tokens (num_samples * seq_len_tokens) are too few"),
        ("stages.compensate.inputs.heldout=data", "the same as inputs.data"),
        ("stages.compensate.dampings=[0.0]", "stages.compensate.dampings"),
        ("stages.score.width_axes=[heads]", "axis hidden is not scored"),
        ("stages.score.num_samples=4", "stages.score: 512 calibration tokens"),
        ("stages.score.swap_to={hidden_size: 72}", "stages.score.swap_to.hidden_size = 72: above 64"),
        ("stages.score.swap_to={num_attention_heads: 3}", "swap_to.num_attention_heads = 3: not a multiple of the 2"),
    ],
)
def test_impossible_keys_are_refused(option: str, message: str, minitron: Cli) -> None:
    code, output = minitron("check", RECIPE, option)
    assert code == 2
    assert message in output


def test_a_one_shot_repair_of_merged_heads_is_refused(minitron: Cli) -> None:
    keys = ("stages.select.head_merge=mean", "stages.select.target.num_attention_heads=2")
    for options, refused in (
        (("stages.compensate.mode=one_shot",), True),
        (("stages.compensate.mode=one_shot", "stages.compensate.sites=[mlp_output]"), False),
        (("stages.compensate.mode=sequential",), False),
    ):
        _, output = minitron("check", RECIPE, *keys, *options)
        assert ("stages.compensate: the plan merges heads" in output) == refused, output


def test_a_repair_that_would_change_nothing_is_refused(minitron: Cli) -> None:
    """A one-shot repair changes weights whose inputs were cut; the inputs of all have drifted in a sequential one."""
    one_shot = "stages.compensate.mode=one_shot"
    heads = "stages.compensate.sites=[attention_output]"
    for options, refused in (
        ((one_shot, heads), "Allowed: attention_input, mlp_input, mlp_output"),
        ((heads,), ""),
        ((one_shot, heads, "stages.select.target.num_attention_heads=2"), ""),
        ((one_shot, "stages.compensate.sites=[attention_output,mlp_output]"), ""),
    ):
        code, output = minitron("check", RECIPE, *options)
        assert ("the repair would change nothing" in output) == bool(refused), output
        assert refused in output
        assert code == (2 if refused else 0)


@pytest.mark.slow
def test_two_processes_rank_like_one(root: Path, minitron: Cli, tmp_path: Path) -> None:
    options = (f"execution.run_root={tmp_path}", "execution.parallel.dp=2", "--until=score")
    code, output = minitron("run", RECIPE, *options)
    assert code == 0, output
    one, two = (load_file(place / "toy/compensated/score/scores.safetensors") for place in (root, tmp_path))
    assert one.keys() == two.keys()
    for name, ranks in one.items():
        assert kendall_tau(ranks.flatten().tolist(), two[name].flatten().tolist()) > 0.99


@pytest.mark.slow
def test_the_candidates_of_a_search_are_repaired_before_they_are_trained(minitron: Cli, tmp_path: Path) -> None:
    keys = "{num_samples: 64, seq_len_tokens: 128, heldout_tokens: 2048}"
    zero_shot = []
    for name, repair in (("sliced", "null"), ("repaired", keys)):
        options = [f"name={name}", f"execution.run_root={tmp_path}", f"stages.search.compensation={repair}"]
        code, output = minitron("run", REPO / "recipes/toy/search.yaml", *options, "--until=search")
        assert code == 0, output
        found = json.loads((tmp_path / name / "search/search.json").read_text())["candidates"]
        zero_shot.append({candidate["name"]: candidate["zero_shot_loss"] for candidate in found})
    sliced, repaired = zero_shot
    assert all(repaired[candidate] < loss for candidate, loss in sliced.items())


def test_a_search_repairs_in_data_parallel_layouts_only(minitron: Cli) -> None:
    recipe = REPO / "recipes/toy/search.yaml"
    code, output = minitron("check", recipe, "stages.search.compensation={}", "execution.parallel.tp=2")
    assert code == 2
    assert "stages.search.compensation: needs a layout with tp = pp = cp = 1" in output
