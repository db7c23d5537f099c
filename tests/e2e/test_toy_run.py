"""The toy recipe from end to end, and what happens when it is run again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from nemo_minitron.artifacts.store import Store
from tests.conftest import TOY, Cli
from tests.support.tiny_models import load_transformers


def test_every_stage_is_published_with_hashes_and_provenance(toy_run: Path) -> None:
    store = Store(toy_run / "toy/width")
    for stage in ("teacher", "data", "score", "select", "prune", "distill", "evaluate_distilled", "export", "report"):
        manifest = store.manifest(stage)
        assert manifest is not None, stage
        assert manifest.files
        assert all(len(facts["sha256"]) == 64 for facts in manifest.files.values())
        assert {"versions", "command", "wall_s", "started"} <= manifest.provenance.keys()
        if stage in ("score", "distill", "evaluate_distilled"):
            assert manifest.provenance["session"] == {"device": "cpu", "megatron_layers": "torch"}
        else:
            assert "session" not in manifest.provenance
        assert "session" not in manifest.result
        store.verify(stage, manifest, "all")


def test_the_report_shows_what_pruning_lost_and_distillation_recovered(toy_run: Path) -> None:
    report = json.loads((toy_run / "toy/width/report.json").read_text())
    loss = {label: model["bits_per_byte"] for label, model in report["models"].items()}
    assert loss["teacher"] < loss["distilled"] < loss["pruned"] < loss["random"]
    assert report["recovered_share"] == pytest.approx(
        (loss["pruned"] - loss["distilled"]) / (loss["pruned"] - loss["teacher"])
    )
    sizes = {label: model["num_params"] for label, model in report["models"].items()}
    # 512*56 embeddings + 4 layers of q 64x56, k and v 32x56, o 56x64, three MLP matrices 112x56, two norms; final norm.
    assert sizes["distilled"] == 512 * 56 + 4 * (2 * 64 * 56 + 2 * 32 * 56 + 3 * 112 * 56 + 2 * 56) + 56
    assert sizes["pruned"] == sizes["random"] == sizes["distilled"] < sizes["teacher"]


def test_the_report_shows_how_much_of_the_text_was_read(toy_run: Path) -> None:
    folder = toy_run / "toy/width"
    (source,) = json.loads((folder / "data/data.json").read_text())["train"]
    (use,) = json.loads((folder / "report.json").read_text())["data_used"]
    assert use.pop("stage") == "distill"
    assert json.loads((folder / "distill/data_used.json").read_text()) == [use]
    assert (use["source"], use["tokens"]) == (source["source"], 30 * 8 * 128)
    assert use["epochs"] == 30 * 8 * 128 / source["num_tokens"]
    assert f"| {use['tokens']:,} | {use['epochs']:.2f} |" in (folder / "report.md").read_text()
    assert "Training text" in (folder / "report.html").read_text()


def test_text_that_would_be_repeated_too_often_is_reported_in_advance(
    toy_run: Path, minitron: Cli, tmp_path: Path
) -> None:
    """Up to 4 epochs give no warning, more do. There is no warning before the tokens are counted."""
    (source,) = json.loads((toy_run / "toy/width/data/data.json").read_text())["train"]
    four_epochs = 4 * source["num_tokens"] // (8 * 128)
    for steps, command, is_warned in (
        (four_epochs, "plan", False),
        (four_epochs + 1, "plan", True),
        (four_epochs + 1, "check", True),
    ):
        change = (f"stages.distill.num_steps={steps}", f"execution.run_root={toy_run}")
        code, output = minitron(command, TOY, *change)
        assert code == 0
        assert (f"stages.distill: {source['source']} will be read 4.0 times" in output) == is_warned, output
    code, output = minitron("check", TOY, f"stages.distill.num_steps={10 * steps}", f"execution.run_root={tmp_path}")
    assert code == 0
    assert "will be read" not in output


def test_the_html_report_needs_nothing_from_elsewhere(toy_run: Path) -> None:
    page = (toy_run / "toy/width/report.html").read_text()
    assert page.count("<svg") >= 5
    for outside in ("<script", "<link", 'src="http', "@import", "url(http"):
        assert outside not in page


def test_the_export_loads_in_transformers_and_has_the_students_logits(toy_run: Path) -> None:
    from transformers import AutoTokenizer

    folder = toy_run / "toy/width/export"
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("The hound of the").input_ids])
    with torch.no_grad():
        exported = load_transformers(folder, torch.bfloat16)(ids).logits
        student = load_transformers(toy_run / "toy/width/distill", torch.bfloat16)(ids).logits
    assert torch.equal(exported, student)
    config = json.loads((folder / "config.json").read_text())
    assert config["head_dim"] == 16 != config["hidden_size"] // config["num_attention_heads"]
    card = (folder / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "bits per byte" in card


def test_a_second_run_has_nothing_to_do(toy_run: Path, minitron: Cli) -> None:
    code, output = minitron("run", TOY, f"execution.run_root={toy_run}")
    assert code == 0
    assert "distill" not in output


def test_another_size_reuses_import_and_score_and_plan_shows_why(toy_run: Path, minitron: Cli, tmp_path: Path) -> None:
    shutil.copytree(toy_run, tmp_path / "runs")
    change = ["stages.select.target.ffn_hidden_size=96", f"execution.run_root={tmp_path / 'runs'}"]
    code, output = minitron("plan", TOY, *change, "--json")
    assert code == 0
    stages = {stage["name"]: stage for stage in json.loads(output)["stages"]}
    for name in ("teacher", "data", "check_teacher", "score", "evaluate_teacher"):
        assert stages[name]["status"] == "finished", name
    assert stages["select"]["status"] == "changed"
    assert stages["select"]["reason"] == "target.ffn_hidden_size: 112 -> 96"
    assert stages["prune"]["reason"] == "because select changes"

    code, output = minitron("run", TOY, *change)
    assert code == 2
    assert "target.ffn_hidden_size: 112 -> 96" in output
    assert all(choice in output for choice in ("--rerun changed", "name=NEW_NAME", "--accept-drift"))

    root = tmp_path / "runs/toy/width"
    before = {name: (root / name / "manifest.json").stat().st_mtime_ns for name in ("teacher", "score", "data")}
    code, output = minitron("run", TOY, *change, "--rerun", "select", "--until", "prune")
    assert code == 0, output
    assert {name: (root / name / "manifest.json").stat().st_mtime_ns for name in before} == before
    assert json.loads((root / "prune/config.json").read_text())["intermediate_size"] == 96
    assert (root / ".superseded/select-1/manifest.json").is_file()


def test_accepted_drift_continues_with_the_old_output(toy_run: Path, minitron: Cli, tmp_path: Path) -> None:
    shutil.copytree(toy_run, tmp_path / "runs")
    # One of the changed stages depends on another; each has a change of its own.
    change = ["stages.score.num_samples=16", "stages.select.seed=5", f"execution.run_root={tmp_path / 'runs'}"]
    assert minitron("run", TOY, *change)[0] == 2
    code, output = minitron("run", TOY, *change, "--accept-drift")
    assert code == 0, output
    assert "(score)" not in output
    assert "(select)" not in output, "what is accepted is not made again"
    code, output = minitron("plan", TOY, *change, "--json")
    score = next(stage for stage in json.loads(output)["stages"] if stage["name"] == "score")
    assert (score["status"], score["reason"]) == ("finished", "drift accepted: the recipe has changed since then")


def test_status_and_report_describe_the_run(toy_run: Path, minitron: Cli) -> None:
    code, output = minitron("status", TOY, f"execution.run_root={toy_run}", "--json", "--verify")
    assert code == 0
    assert all(stage["status"] == "finished" for stage in json.loads(output)["stages"].values())
    code, output = minitron("report", TOY, f"execution.run_root={toy_run}")
    assert code == 0
    assert str(toy_run / "toy/width/report.html") in output.replace("\n", "")


def test_an_existing_checkpoint_is_adopted_in_place(toy_run: Path, minitron: Cli, tmp_path: Path) -> None:
    teacher = toy_run / "toy/width/teacher"
    adopt = ["~stages.teacher", f"+stages.teacher={{kind: adopt, path: '{teacher}'}}", "name=adopted"]
    code, output = minitron("run", TOY, *adopt, f"execution.run_root={tmp_path}", "--until", "check_teacher")
    assert code == 0, output
    published = tmp_path / "adopted/teacher"
    assert [file.name for file in published.iterdir()] == ["manifest.json"]
    assert json.loads((published / "manifest.json").read_text())["result"]["num_params"] == 229952
