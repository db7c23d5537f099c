"""Tests of bundles: their content, use without the original files, and refused input."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import tarfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_minitron.api import load_recipe
from nemo_minitron.bundle.archive import write_archive
from nemo_minitron.bundle.collect import collect
from nemo_minitron.bundle.items import Item, sorted_items
from nemo_minitron.errors import ConfigError, EnvironmentProblem, MinitronError, PlanError
from nemo_minitron.hf.checkpoint import Checkpoint
from nemo_minitron.hf.source import hub_copy, resolve_model
from nemo_minitron.plan.shapes import model_shape
from nemo_minitron.system.progress import Progress
from tests.conftest import REPO, TOY, Cli
from tests.support.bundles import bundled, minitron_there, there, unpacked
from tests.support.tiny_gguf import tiny_gguf
from tests.support.tiny_models import tiny_model_dir

SILENT = Progress(silent=True)
ROW = json.dumps({"text": "The hound runs over the moor."}) + "\n"
HOSTILE = ("with space", "$(touch pwned)", "a' ; touch pwned ; '", 'a" b', "back\\slash", "-rf", " ", "ü", "a*b", "#")


def write_recipe(folder: Path, teacher: str, *texts: str, name: str = "mine", **stages: Any) -> Path:
    """Write a recipe that imports a model and reads texts."""
    file = folder / "recipes" / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    sources = [{"source": text} for text in texts]
    content = {
        "teacher": {"kind": "import", "source": teacher},
        "data": {"kind": "tokenize", "sources": sources},
        **stages,
    }
    file.write_text(yaml.safe_dump({"stages": content}, sort_keys=False))
    return file


def sources_of(bundle: Path, recipe: str = "recipes/mine.yaml") -> list[str]:
    stages = yaml.safe_load((bundle / recipe).read_text())["stages"]
    return [stages["teacher"]["source"], *(source["source"] for source in stages["data"]["sources"])]


def files_in(bundle: Path, folder: str) -> list[str]:
    return sorted(str(file.relative_to(bundle)) for file in (bundle / folder).rglob("*") if file.is_file())


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to an empty working folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


# --- a bundle works without the original files ----------------------------------------------------


def test_a_toy_bundle_is_checked_and_planned_where_it_was_unpacked(tmp_path: Path, minitron: Cli) -> None:
    out = tmp_path / "toy.tar"
    code, output = minitron("bundle", TOY, "--no-wheels", "--out", out)
    assert code == 0, output
    assert "tar xf toy.tar && toy/install.sh" in output
    bundle = unpacked(out, tmp_path / "there")
    installed = there(bundle.parent, "toy/install.sh")
    assert installed.returncode == 0, installed.stderr
    assert "ok toy/width: 16 stages" in installed.stdout
    assert "minitron run recipes/toy/width.yaml" in installed.stdout
    planned = json.loads(minitron_there(bundle, "plan", "recipes/toy/width.yaml", "--json"))
    here = minitron("plan", TOY, "--json", f"execution.run_root={tmp_path}")[1]
    assert planned["problems"] == []
    assert planned["stages"] == json.loads(here)["stages"]


def test_the_recipe_of_a_bundle_can_be_overridden_and_references_follow(tmp_path: Path) -> None:
    bundle = bundled(tmp_path, TOY, "stages.distill.num_steps=20", "stages.select.target.ffn_hidden_size=96")
    stages = yaml.safe_load((bundle / "recipes/toy/width.yaml").read_text())["stages"]
    assert (stages["distill"]["num_steps"], stages["select"]["target"]["ffn_hidden_size"]) == (20, 96)
    changes = ["stages.select.target.ffn_hidden_size=80", "+eval=offline_tasks", "cluster=slurm"]
    recipe = load_recipe(bundle / "recipes/toy/width.yaml", changes)
    assert recipe.stages["select_random"].target.ffn_hidden_size == 80  # type: ignore[union-attr]
    assert recipe.stages["evaluate_pruned"].tasks_limit == 100  # type: ignore[union-attr]
    assert recipe.execution.cluster is not None


def test_files_keep_their_relative_paths_and_others_get_a_folder(work: Path, tmp_path: Path) -> None:
    model, elsewhere = tiny_model_dir(tmp_path / "models", "llama_mha"), tmp_path / "texts of others"
    (model / "pytorch_model.bin").write_bytes(b"pickled")
    (work / "data").mkdir()
    elsewhere.mkdir()
    for name in HOSTILE:
        (work / "data" / f"{name}.jsonl").write_text(ROW)
    for file in (elsewhere / "b.jsonl", elsewhere / "a.jsonl", elsewhere / "not text.md", tmp_path / "up.txt"):
        file.write_text(ROW)
    (work / "data" / "link.txt").symlink_to(tmp_path / "up.txt")
    (tmp_path / "parts/b/c").mkdir(parents=True)
    (tmp_path / "parts/b/c/1.jsonl").write_text(ROW)
    braces = "../parts/{a,b/c}/{1,2}.jsonl"
    texts = ("./data/*.jsonl", "data/link.txt", f"{elsewhere}/*.jsonl", "../up.txt", str(elsewhere), braces)
    bundle = bundled(tmp_path, write_recipe(work, str(model), *texts))
    shutil.rmtree(work), shutil.rmtree(elsewhere), shutil.rmtree(model), shutil.rmtree(tmp_path / "parts")
    (tmp_path / "up.txt").unlink()

    assert sources_of(bundle) == [
        f"outside/1/{model.name}",
        "./data/*.jsonl",
        "data/link.txt",
        "outside/2/*.jsonl",
        "outside/3/up.txt",
        f"outside/4/{elsewhere.name}",
        "outside/5/{a,b/c}/{1,2}.jsonl",
    ]
    assert files_in(bundle, "data") == sorted([*(f"data/{name}.jsonl" for name in HOSTILE), "data/link.txt"])
    assert not (bundle / "data/link.txt").is_symlink()
    assert files_in(bundle, "outside/5") == ["outside/5/b/c/1.jsonl"]
    assert files_in(bundle, "outside/2") == ["outside/2/a.jsonl", "outside/2/b.jsonl"]
    assert f"outside/1/{model.name}/model.safetensors" in files_in(bundle, "outside/1")
    assert not list(bundle.rglob("*.bin"))
    verified = there(bundle, "./install.sh", "--verify")
    assert verified.returncode == 0, verified.stderr
    minitron_there(bundle, "check", "recipes/mine.yaml")
    assert not list(bundle.rglob("pwned"))


def test_a_path_from_another_key_is_written_out(work: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A text.")
    recipe = write_recipe(work, "asset:toy-llama", "${execution.run_root}/a.txt")
    bundle = bundled(tmp_path, recipe, f"execution.run_root={tmp_path}")
    assert sources_of(bundle)[1] == "outside/1/a.txt"


def test_a_gguf_file_and_its_asset_are_packed(work: Path, tmp_path: Path) -> None:
    model = tiny_model_dir(tmp_path / "models", "llama_gqa_tied")
    file = tiny_gguf(model, tmp_path / "tiny.gguf")
    (tmp_path / "kept/tiny").mkdir(parents=True)
    shutil.copyfile(file, tmp_path / "kept/tiny/tiny.gguf")
    for source, member in ((str(file), "outside/1/tiny.gguf"), ("asset:tiny", "assets/tiny/tiny.gguf")):
        recipe = write_recipe(work, source, "asset:toy-text")
        bundle = bundled(tmp_path, recipe, f"execution.assets_dir={tmp_path}/kept")
        assert (bundle / member).read_bytes() == file.read_bytes()
        minitron_there(bundle, "check", "recipes/mine.yaml")
        shutil.rmtree(tmp_path / "there")
        (tmp_path / "my bundle.tar").unlink()


@pytest.mark.parametrize("revision", [None, "v1/tuned"])
def test_a_model_of_the_hub_is_found_without_the_hub(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str | None
) -> None:
    import huggingface_hub.constants as hub_constants

    cache = tmp_path / "cache/models--org--tiny"
    snapshot = cache / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    tiny_model_dir(tmp_path / "models", "llama_mha").rename(snapshot)
    ref = cache / "refs" / (revision or "main")
    ref.parent.mkdir(parents=True)
    ref.write_text("a" * 40)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(cache.parent))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    change = [] if revision is None else [f"stages.teacher.revision={revision}"]
    bundle = bundled(tmp_path, write_recipe(work, "hf:org/tiny", "asset:toy-text"), *change)
    shutil.rmtree(cache)

    assert sources_of(bundle)[0] == "hf:org/tiny"
    copy = hub_copy("org/tiny", revision, bundle / "assets")
    assert resolve_model("hf:org/tiny", bundle / "assets", revision) == copy
    minitron_there(bundle, "check", "recipes/mine.yaml")
    monkeypatch.chdir(bundle)
    recipe = load_recipe(Path("recipes/mine.yaml"), [])
    assert model_shape(recipe, "teacher") == Checkpoint.open(copy).shape


def test_results_of_one_recipe_that_another_needs_are_not_missing(work: Path, tmp_path: Path) -> None:
    export = "runs/mine/export"
    first = write_recipe(work, "asset:toy-llama", "asset:toy-text")
    second = write_recipe(
        work, "asset:toy-llama", "asset:toy-text", name="next", student={"kind": "adopt", "path": export}
    )
    with pytest.raises(PlanError, match="there is no such file or folder"):
        collect([second], [], SILENT)
    assert len(collect([first, second], [], SILENT).recipes) == 2
    tiny_model_dir(work, "llama_mha").rename(work / "model")
    (work / "runs/mine").mkdir(parents=True)
    (work / "model").rename(work / export)
    assert not [item for item in collect([first, second], [], SILENT).items if item.what == "model"]
    members = {item.member for item in collect([second], [], SILENT).items}
    assert f"{export}/model.safetensors" in members


def test_recipes_that_need_nemo_aligner_are_recognized() -> None:
    assert not collect([TOY], [], SILENT).needs_aligner
    assert collect([TOY.with_name("aligned.yaml")], [], SILENT).needs_aligner


def test_a_package_whose_function_a_stage_calls_is_named() -> None:
    rewards = "[{rule: function, function: 'judges_of_mine.lengths:short'}, {rule: function, function: 'yaml:dump'}]"
    found = collect([TOY.with_name("reinforce.yaml")], [f"stages.reinforce.rewards={rewards}"], SILENT).warnings
    missing = [text.partition("not in the bundle: ")[2].partition(",")[0] for text in found]
    assert missing == ["the module judges_of_mine", "PyYAML"]
    assert all("stages.reinforce calls. Install it on the other machine." in text for text in found)


# --- the file -------------------------------------------------------------------------------------


def test_the_same_content_gives_the_same_bytes_without_user_names(tmp_path: Path) -> None:
    found = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        content = tmp_path / folder / "content"
        content.write_bytes(os.urandom(10) if not found else (tmp_path / "one/content").read_bytes())
        items = [Item("b/c", content, "data"), Item("a", b"text", "recipe"), Item("install.sh", b"#!", "script")]
        found.append(write_archive(tmp_path / folder / "x.tar", items[:: 1 if not found else -1], {}, SILENT))
    assert found[0]["sha256"] == found[1]["sha256"]
    sha256sum = subprocess.run(["sha256sum", tmp_path / "one/x.tar"], capture_output=True, text=True, check=True).stdout
    assert found[0]["sha256"] == sha256sum.split()[0]
    with tarfile.open(tmp_path / "one/x.tar") as tar:
        members = tar.getmembers()
    names = ["x/a", "x/b/c", "x/install.sh", "x/manifest.json", "x/SHA256SUMS"]
    assert [member.name for member in members] == names
    assert [member.mode for member in members] == [0o644, 0o644, 0o755, 0o644, 0o644]
    assert {(member.uid, member.uname, member.mtime, member.isreg()) for member in members} == {
        (0, "", 315532800, True)
    }


def test_a_flipped_byte_and_a_missing_file_are_detected(work: Path, tmp_path: Path) -> None:
    (work / "my text.txt").write_text("A text.")
    bundle = bundled(tmp_path, write_recipe(work, "asset:toy-llama", "my text.txt"))
    assert there(bundle, "./install.sh", "--verify").returncode == 0
    for name in ("my text.txt", "manifest.json", "recipes/mine.yaml"):
        before = (bundle / name).read_bytes()
        (bundle / name).write_bytes(bytes([before[0] ^ 1]) + before[1:])
        for words in (["--verify"], []):
            done = there(bundle, "./install.sh", *words)
            assert done.returncode == 2
            assert name in done.stdout + done.stderr
            assert "are damaged" in done.stderr
        (bundle / name).unlink()
        assert there(bundle, "./install.sh", "--verify").returncode == 2
        (bundle / name).write_bytes(before)
    assert there(bundle, "./install.sh", "--verify").returncode == 0


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("member", ["../x", "/x", "a/../../x", "", ".", "a\nb", "a\x1b[31m"])
def test_a_name_that_leaves_the_folder_or_breaks_a_line_is_refused(member: str) -> None:
    with pytest.raises(ConfigError):
        sorted_items([Item(member, b"", "data")])


def test_an_asset_outside_of_the_assets_is_refused(work: Path, tmp_path: Path) -> None:
    (work / "secret").mkdir()
    (work / "secret/a.txt").write_text("A text.")
    recipe = write_recipe(work, "asset:toy-llama", "asset:../../secret")
    (work / "assets/x").mkdir(parents=True)
    with pytest.raises(ConfigError, match="would be outside of the bundle"):
        bundled(tmp_path, recipe, "execution.assets_dir=assets/x")
    assert not list(tmp_path.glob("*.tar"))


def test_two_files_for_one_name_are_refused_unless_they_are_equal(tmp_path: Path) -> None:
    for name, text in (("a", "1"), ("b", "2"), ("c", "1")):
        (tmp_path / name).write_text(text)
    assert len(sorted_items([Item("x", tmp_path / name, "data") for name in "ac"])) == 1
    with pytest.raises(ConfigError, match="Two different files would have the name x"):
        sorted_items([Item("x", tmp_path / name, "data") for name in "ab"])


def refused(error: type[MinitronError], out: Path, items: list[Item]) -> str:
    with pytest.raises(error) as caught:
        write_archive(out, items, {}, SILENT)
    assert not list(out.parent.glob(".*.partial"))
    return str(caught.value)


def test_nothing_is_overwritten_and_names_are_clear(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_text("mine")
    assert "already exists" in refused(EnvironmentProblem, tmp_path / "x.tar", [])
    assert (tmp_path / "x.tar").read_text() == "mine"
    for name in ("x.tgz", "x", ".tar", "...tar"):
        assert "the file name of a bundle must be NAME.tar" in refused(EnvironmentProblem, tmp_path / name, [])
    assert "There is no folder" in refused(EnvironmentProblem, tmp_path / "no/x.tar", [])


def test_too_little_space_is_an_error_and_a_full_disk_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [Item("x", os.urandom(3_000_000), "data")]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard))
    try:
        message = refused(EnvironmentProblem, tmp_path / "x.tar", items)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "not enough space" in message
    assert not list(tmp_path.iterdir())
    assert os.strerror(errno.EFBIG) in message
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1_000_000))
    assert "it needs 3 MB, and 1 MB are free" in refused(EnvironmentProblem, tmp_path / "x.tar", items)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "gone" in refused(EnvironmentProblem, tmp_path / "x.tar", [Item("x", tmp_path / "gone", "data")])


def test_missing_texts_and_broken_models_are_named(work: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"stages\.data\.sources\.0\.source = data/\*\.txt: matches no file"):
        collect([write_recipe(work, "asset:toy-llama", "data/*.txt")], [], SILENT)
    (work / "data").mkdir()
    (work / "data/a.doc").write_text("x")
    with pytest.raises(PlanError, match="has a known type"):
        collect([write_recipe(work, "asset:toy-llama", "data")], [], SILENT)
    model = tiny_model_dir(tmp_path / "models", "llama_mha")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(MinitronError, match="damaged or cut off"):
        collect([write_recipe(work, str(model), "asset:toy-text")], [], SILENT)


def test_tasks_that_need_the_hub_are_refused() -> None:
    with pytest.raises(PlanError, match=r"stages\.evaluate_pruned\.tasks\.0 = hellaswag") as caught:
        collect([TOY], ["+eval=hub_tasks"], SILENT)
    assert "asset:offline-eval-tasks" in str(caught.value)
    with pytest.raises(PlanError, match=r"stages\.score\.depth_task\.name = winogrande"):
        collect([TOY], ["stages.score={layer_metrics: [task], depth_task: {name: winogrande}}"], SILENT)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stages.distill.lr=1"], "No recipe is named"),
        ([TOY, "--no-wheels", "--aligner"], "--aligner requests wheels"),
        ([REPO / "recipes/toy/none.yaml", "--no-wheels"], "There is no recipe"),
    ],
)
def test_the_command_reports_the_problem(words: list[object], message: str, tmp_path: Path, minitron: Cli) -> None:
    code, output = minitron("bundle", *words, "--out", tmp_path / "x.tar")
    assert code == 2
    assert message in output
    assert not list(tmp_path.iterdir())
