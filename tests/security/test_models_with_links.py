"""Models and data from other people: links to private files, code beside a tokenizer, contents under a false name."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from nemo_minitron import assets
from nemo_minitron.bundle.places import _model_files, links_out
from nemo_minitron.errors import CheckpointError, EnvironmentProblem
from nemo_minitron.hf.checkpoint import Checkpoint
from nemo_minitron.hf.license import read_license
from nemo_minitron.hf.side_files import copy_side_files
from nemo_minitron.hf.source import resolve_path
from nemo_minitron.hf.tokenizer import load_tokenizer
from nemo_minitron.schema.execution import Execution
from nemo_minitron.stages.adopt.params import AdoptStage
from nemo_minitron.stages.adopt.run import adopt
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.kind import Source
from nemo_minitron.stages.typed_inputs import NoInputs
from nemo_minitron.system.progress import Progress
from tests.support.tiny_models import tiny_model_dir


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("model"), "llama_gqa_tied", num_hidden_layers=1)


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "model")
    shutil.copyfile(Path(assets.BUILT_IN["toy-llama"]) / "tokenizer.json", tmp_path / "model/tokenizer.json")
    return tmp_path / "model"


@pytest.fixture
def private(tmp_path: Path) -> Path:
    file = tmp_path / "private"
    file.write_text("license: secret\n")
    return file


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer_x.json", "NOTICE.txt", "chat_template.jinja", "vocab.json"])
@pytest.mark.parametrize("relative", [True, False])
def test_a_private_file_does_not_become_part_of_an_export(
    name: str, relative: bool, model: Path, private: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Path("../private") if relative else private
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(target)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(CheckpointError, match=f"{name} is a link to {target}, outside") as caught:
        copy_side_files(model, out)
    assert "export MINITRON_TRUSTED_FOLDERS=" in str(caught.value)
    assert not (out / name).exists()
    monkeypatch.setenv("MINITRON_TRUSTED_FOLDERS", str(model))
    copy_side_files(model, out)
    assert (out / name).read_text() == private.read_text()


def test_templates_behind_a_link_to_a_folder_are_not_copied(model: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/x.jinja").write_text("secret")
    (model / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="is reached through a link"):
        copy_side_files(model, tmp_path / "out")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_weights_and_tokenizers_elsewhere_are_refused(name: str, model: Path, tmp_path: Path) -> None:
    (model / name).rename(tmp_path / name)
    (model / name).symlink_to(tmp_path / name)
    read = Checkpoint.open if name.startswith("model") else load_tokenizer
    with pytest.raises(CheckpointError, match=f"{name} is a link to"):
        read(model)
    with pytest.raises(CheckpointError, match=f"{name} is a link to"):
        _model_files(model)


def test_a_card_elsewhere_is_refused(model: Path, private: Path) -> None:
    (model / "README.md").symlink_to(private)
    with pytest.raises(CheckpointError, match=r"README\.md is a link to"):
        read_license(model)


def test_links_inside_of_the_folder_and_of_the_hubs_cache_are_followed(model: Path, tmp_path: Path) -> None:
    (model / "tokenizer.json").rename(model / "real")
    (model / "tokenizer.json").symlink_to("real")
    copy_side_files(model, tmp_path)
    repository = tmp_path / "hub/models--a--b"
    snapshot = repository / "snapshots/0123"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.copyfile(file, repository / f"blobs/{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    Checkpoint.open(snapshot)
    load_tokenizer(snapshot)
    (tmp_path / "link").symlink_to(snapshot)
    Checkpoint.open(tmp_path / "link")
    other = tmp_path / "hub/models--c--d/blobs"
    other.mkdir(parents=True)
    (other / "9").write_text("private")
    (snapshot / "LICENSE").symlink_to(other / "9")
    with pytest.raises(CheckpointError, match="LICENSE is a link to"):
        copy_side_files(snapshot, tmp_path)


def test_code_beside_a_tokenizer_stays_behind(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    left = ["tokenizer.py", "tokenizer_x.so", "tokenizer_config.json.py", "vocab.pkl", "chat_template.py", "license.py"]
    left += ["tokenizer", "tokenizer.sh", "tokenizer.bin"]
    kept = [
        "tokenizer.model.v3",
        "tokenizer.model",
        "vocab.txt",
        "chat_template.jinja",
        "LICENSE-2.0",
        "Notice",
        "x.tiktoken",
    ]
    for name in (*left, *kept):
        (model / name).write_text("x")
    copy_side_files(model, out)
    assert {file.name for file in out.iterdir()} & {*left, *kept} == set(kept)


# --- data ----------------------------------------------------------------------------------------


def test_links_in_data_are_followed_and_reported(tmp_path: Path, private: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/own.txt").write_text("text")
    (tmp_path / "data/link.txt").symlink_to(private)
    (tmp_path / "data/again.txt").symlink_to("own.txt")
    data = Source("sources.0.source", str(tmp_path / "data"), "text")
    assert [file.name for file in links_out(data, tmp_path)] == ["link.txt"]
    assert links_out(Source("sources.0.source", "asset:toy-text", "text"), tmp_path) == []


# --- checksums -----------------------------------------------------------------------------------


def _adopt(path: Path, sha256: str | None, tmp_path: Path) -> str:
    params = AdoptStage(kind="adopt", path=str(path), sha256=sha256)
    context = StageContext("teacher", "test", tmp_path, tmp_path, Execution(), Progress(silent=True))
    return str(adopt(params, NoInputs(), context)["adopted_path"])


def test_the_checksum_of_a_sharded_model_is_of_all_shards(model: Path, tmp_path: Path) -> None:
    shard, index = model / "model-00001-of-00001.safetensors", model / "model.safetensors.index.json"
    names = list(Checkpoint.open(model).tensors)
    (model / "model.safetensors").rename(shard)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, shard.name)}))
    of_index = hashlib.sha256(index.read_bytes()).hexdigest()
    with pytest.raises(
        CheckpointError, match=r"sha256 of model\.safetensors\.index\.json and all shards is ([0-9a-f]+)"
    ) as caught:
        _adopt(model, of_index, tmp_path)
    shell = (
        os.popen(f"cd {model} && sha256sum model.safetensors.index.json *.safetensors | sha256sum").read().split()[0]
    )
    assert shell in str(caught.value)
    _adopt(model, shell, tmp_path)
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match="sha256"):
        _adopt(model, shell, tmp_path)


def test_zeros_of_the_right_size_are_no_asset(tmp_path: Path) -> None:
    name = "benchmark-train-answers"
    file = assets.ASSETS[name].files["answers.jsonl"]
    (tmp_path / name).mkdir()
    (tmp_path / name / "answers.jsonl").write_bytes(b"\0" * file.size_bytes)
    assert not assets.ASSETS[name].is_here(tmp_path)
    with pytest.raises(EnvironmentProblem, match=r"answers\.jsonl of asset benchmark-train-answers") as caught:
        resolve_path(f"asset:{name}", tmp_path)
    assert f"minitron assets fetch {name}" in str(caught.value)
