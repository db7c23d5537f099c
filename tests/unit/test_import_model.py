"""Import and adopt: the files in the run, and the models that are refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_minitron.errors import CheckpointError, EnvironmentProblem
from nemo_minitron.families import num_params
from nemo_minitron.hf.checkpoint import INDEX_FILE, Checkpoint, read_config
from nemo_minitron.hf.source import HUB_FILES, NOT_FROM_HUB, resolve_model
from nemo_minitron.hf.transformers_versions import network_errors
from nemo_minitron.schema.execution import Execution
from nemo_minitron.stages.adopt.params import AdoptStage
from nemo_minitron.stages.adopt.run import adopt
from nemo_minitron.stages.context import StageContext
from nemo_minitron.stages.import_model.params import ImportStage
from nemo_minitron.stages.import_model.run import import_model
from nemo_minitron.stages.typed_inputs import NoInputs
from nemo_minitron.system.progress import Progress
from tests.support.tiny_gguf import tiny_gguf
from tests.support.tiny_models import load_transformers, tiny_model_dir


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return tiny_model_dir(tmp_path, "llama_gqa_tied")


def _context(tmp_path: Path) -> StageContext:
    out, work = tmp_path / "run" / "out", tmp_path / "run" / "work"
    for folder in (out, work):
        folder.mkdir(parents=True, exist_ok=True)
    execution = Execution(assets_dir=str(tmp_path / "assets"))
    return StageContext("teacher", "toy", out, work, execution, Progress(silent=True))


def _import(tmp_path: Path, source: object, **params: Any) -> tuple[Path, dict[str, Any]]:
    context = _context(tmp_path)
    stage = ImportStage(kind="import", source=str(source), **params)
    return context.out_dir, dict(import_model(stage, NoInputs(), context))


def _adopt(tmp_path: Path, path: object, **params: Any) -> dict[str, Any]:
    return dict(adopt(AdoptStage(kind="adopt", path=str(path), **params), NoInputs(), _context(tmp_path)))


def test_an_imported_folder_is_bit_identical_and_holds_no_links(model_dir: Path, tmp_path: Path) -> None:
    out, _ = _import(tmp_path, model_dir)
    assert {file.name for file in out.iterdir()} == {file.name for file in model_dir.iterdir()}
    for file in out.iterdir():
        assert not file.is_symlink()
        if file.name != "config.json":
            assert file.read_bytes() == (model_dir / file.name).read_bytes()
    # config.json is written as it was interpreted: no value is lost.
    source, written = read_config(model_dir), read_config(out)
    assert {key: written[key] for key in source} == source


def test_import_of_a_symlinked_hub_snapshot_takes_the_files_not_the_links(model_dir: Path, tmp_path: Path) -> None:
    snapshot, blobs = (tmp_path / "models--org--name" / part for part in ("snapshots/0123", "blobs"))
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in model_dir.iterdir():
        shutil.copyfile(file, blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    out, _ = _import(tmp_path, snapshot)
    assert not any(file.is_symlink() for file in out.iterdir())
    assert (out / "model.safetensors").read_bytes() == (model_dir / "model.safetensors").read_bytes()


def _as_transformers_5_writes(folder: Path, **rope: Any) -> None:
    config = {key: value for key, value in read_config(folder).items() if key not in ("rope_theta", "rope_scaling")}
    config |= {
        "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default", **rope},
        "transformers_version": "5.8.1",
    }
    config.pop("head_dim", None)
    config["dtype"] = config.pop("torch_dtype", "float32")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
def test_a_config_of_transformers_5_is_imported_in_words_that_transformers_4_reads_alike(
    dtype: str, model_dir: Path, tmp_path: Path
) -> None:
    ids = torch.arange(3, 83)[None]
    expected = load_transformers(model_dir)(ids).logits
    _as_transformers_5_writes(model_dir)
    assert "rope_theta" not in read_config(model_dir), "transformers 4 reads another base"
    out, _ = _import(tmp_path, model_dir, dtype=dtype, architecture={"rope_theta": 100000.0})
    config = read_config(out)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100000.0
    assert config["torch_dtype"] == config["dtype"] == ("float32" if dtype == "keep" else dtype)
    if dtype == "keep":
        assert torch.equal(load_transformers(out)(ids).logits, expected)
        assert (out / "model.safetensors").read_bytes() == (model_dir / "model.safetensors").read_bytes()


def test_an_only_shard_comes_with_its_index(model_dir: Path, tmp_path: Path) -> None:
    name = "model-00001-of-00001.safetensors"
    (model_dir / "model.safetensors").rename(model_dir / name)
    names = dict.fromkeys(Checkpoint.open(tiny_model_dir(tmp_path / "again", "llama_gqa_tied")).tensors, name)
    (model_dir / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    out, result = _import(tmp_path, model_dir)
    assert result["num_params"] == num_params(Checkpoint.open(out).shape)


def test_messages_name_the_folder_that_was_given_not_the_one_that_is_being_written(
    model_dir: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model_dir / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, model_dir / "model.safetensors", metadata={"format": "pt"})
    for dtype in ("keep", "bfloat16"):
        with pytest.raises(CheckpointError, match="ties the embeddings") as caught:
            _import(tmp_path, model_dir, dtype=dtype)
        assert caught.value.where == str(model_dir / "model.safetensors")
    with pytest.raises(CheckpointError, match="Wrong architecture") as caught:
        _import(tmp_path, model_dir, architecture={"hidden_size": 1})
    assert caught.value.where == str(model_dir / "config.json")


def test_named_chat_templates_reach_the_run(model_dir: Path, tmp_path: Path) -> None:
    (model_dir / "additional_chat_templates").mkdir()
    (model_dir / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    out, _ = _import(tmp_path, model_dir)
    assert (out / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ tools }}"
    adopted = _adopt(tmp_path, model_dir)["adopted_files"]
    assert str(model_dir / "additional_chat_templates" / "tool_use.jinja") in adopted


def test_import_converts_to_the_requested_dtype(model_dir: Path, tmp_path: Path) -> None:
    out, result = _import(tmp_path, model_dir, dtype="bfloat16")
    source, imported = Checkpoint.open(model_dir), Checkpoint.open(out)
    assert result["dtype"] == imported.dtype == imported.config["dtype"] == "bfloat16"
    name = "model.layers.3.mlp.down_proj.weight"
    assert torch.equal(imported.read(name), source.read(name).to(torch.bfloat16))
    assert load_transformers(out, torch.bfloat16).dtype == torch.bfloat16


def test_requesting_the_stored_dtype_changes_nothing(model_dir: Path, tmp_path: Path) -> None:
    out, _ = _import(tmp_path, model_dir, dtype="float32")
    assert (out / "model.safetensors").read_bytes() == (model_dir / "model.safetensors").read_bytes()


def test_a_stored_head_of_a_tied_model_is_dropped_on_conversion(model_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model_dir / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, model_dir / "model.safetensors", metadata={"format": "pt"})
    out, result = _import(tmp_path, model_dir, dtype="bfloat16")
    assert "lm_head.weight" not in Checkpoint.open(out).tensors
    assert result["num_params"] == num_params(Checkpoint.open(out).shape)


def test_the_result_describes_what_was_imported(model_dir: Path, tmp_path: Path) -> None:
    (model_dir / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\n")
    _, result = _import(tmp_path, model_dir)
    shape = Checkpoint.open(model_dir).shape
    assert result["license"] == "apache-2.0"
    assert result["source"] == str(model_dir)
    assert (result["architecture"], result["dtype"]) == ("LlamaForCausalLM", "float32")
    assert result["num_params"] == num_params(shape)
    assert result["num_params_non_embedding"] == num_params(shape, embeddings=False)
    assert result["shape"]["kv_channels"] == 8


def test_the_license_of_the_recipe_takes_precedence(model_dir: Path, tmp_path: Path) -> None:
    (model_dir / "README.md").write_text("---\nlicense: other\n---\n")
    assert _import(tmp_path, model_dir, license="mit")[1]["license"] == "mit"


@pytest.mark.parametrize("card", ["no header", "---\nlicense: [broken\n---\n", "---\n- a list\n---\n", "---\n"])
def test_a_model_card_without_a_licence_gives_none(card: str, model_dir: Path, tmp_path: Path) -> None:
    (model_dir / "README.md").write_text(card)
    assert _import(tmp_path, model_dir)[1]["license"] is None


def test_a_gguf_file_becomes_a_folder_that_transformers_loads(model_dir: Path, tmp_path: Path) -> None:
    asset = tmp_path / "assets" / "tiny"
    asset.mkdir(parents=True)
    tiny_gguf(model_dir, asset / "tiny.gguf")
    out, result = _import(tmp_path, "asset:tiny", architecture={"tie_word_embeddings": True, "head_dim": 8})
    ids = torch.arange(40)[None]
    assert torch.equal(load_transformers(out)(ids).logits, load_transformers(model_dir)(ids).logits)
    assert (result["license"], result["dtype"]) == ("mit", "float32")
    assert "lm_head.weight" not in Checkpoint.open(out).tensors


def test_a_wrong_architecture_is_refused_with_every_key_that_differs(model_dir: Path, tmp_path: Path) -> None:
    expected = {"hidden_size": 96, "num_hidden_layers": 4, "rope_theta": 1e4, "rms_norm_eps": 1e-6}
    with pytest.raises(CheckpointError, match="Wrong architecture") as caught:
        _import(tmp_path, model_dir, architecture=expected)
    assert "hidden_size = 64 (recipe: 96)" in caught.value.what
    assert "rope_theta = 100000.0 (recipe: 10000.0)" in caught.value.what
    assert "num_hidden_layers" not in caught.value.what
    assert "rms_norm_eps" not in caught.value.what
    assert list((tmp_path / "run" / "out").iterdir()) == []


def test_an_expected_key_that_config_json_leaves_out_counts_with_transformers_default(
    model_dir: Path, tmp_path: Path
) -> None:
    config = read_config(model_dir)
    for key in ("head_dim", "rms_norm_eps"):
        config.pop(key)
    (model_dir / "config.json").write_text(json.dumps(config))
    _import(tmp_path, model_dir, architecture={"head_dim": 8, "rms_norm_eps": 1e-6, "hidden_act": "silu"})
    with pytest.raises(CheckpointError, match=r"head_dim = 8 \(recipe: 16\)"):
        _import(tmp_path, model_dir, architecture={"head_dim": 16})


def test_a_truncated_folder_leaves_nothing_behind(model_dir: Path, tmp_path: Path) -> None:
    weights = model_dir / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged or cut off"):
        _import(tmp_path, model_dir)
    assert list((tmp_path / "run" / "out").iterdir()) == []


def _several_ggufs(tmp_path: Path) -> str:
    folder = tmp_path / "ggufs"
    folder.mkdir()
    for name in ("a.gguf", "b.gguf"):
        (folder / name).write_bytes(b"GGUF")
    return str(folder)


def _some_file(tmp_path: Path) -> str:
    (tmp_path / "model.pth").write_bytes(b"x")
    return str(tmp_path / "model.pth")


def _pickle_folder(tmp_path: Path) -> str:
    folder = tiny_model_dir(tmp_path / "pickle", "llama_mha")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return str(folder)


@pytest.mark.parametrize(
    ("make_source", "message"),
    [
        (lambda _: "/no/such/model", "/no/such/model does not exist"),
        (_some_file, "is not a .gguf file"),
        (_several_ggufs, "contains 2 .gguf files"),
        (_pickle_folder, r"There are pickled weights \(\*.bin\), which are not supported"),
        (lambda tmp_path: str(tmp_path), "There is no config.json"),
    ],
    ids=["missing", "another kind of file", "several ggufs", "only pickles", "empty folder"],
)
def test_sources_that_are_no_model_are_refused(make_source: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        _import(tmp_path, make_source(tmp_path))
    assert caught.value.allowed or caught.value.next_step


def test_the_error_for_a_missing_asset_tells_how_to_fetch_it(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="minitron assets fetch smollm2"):
        _import(tmp_path, "asset:smollm2")


def test_an_unreachable_hub_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as hub_constants

    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="someone/model could not be fetched from the Hugging Face hub"):
        _import(tmp_path, "hf:someone/model")
    with pytest.raises(CheckpointError, match="could not be fetched"):
        _import(tmp_path, "hf:not a name!!")


def test_a_download_that_breaks_off_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    errors: list[Exception] = [ConnectionResetError("reset"), *(kind("cut off") for kind in network_errors())]
    for error in errors:
        monkeypatch.setattr(huggingface_hub, "snapshot_download", _raising(error))
        with pytest.raises(CheckpointError, match="could not be fetched"):
            resolve_model("hf:a/b", tmp_path, None)


def _raising(error: Exception) -> Callable[..., str]:
    def download(*_: Any, **__: Any) -> str:
        raise error

    return download


def test_no_pickles_and_no_second_copies_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    requested: dict[str, Any] = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kw: requested.update(kw) or str(tmp_path))
    assert resolve_model("hf:a/b", tmp_path, "v1.0") == tmp_path
    assert requested["revision"] == "v1.0"
    repository = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
        "tokenizer.model.v3",
        "qwen.tiktoken",
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
        "LICENSE",
        "LICENCE.md",
        "USE_POLICY.md",
        "pytorch_model.bin",
        "consolidated.safetensors",
        "original/consolidated.00.pth",
        "original/params.json",
        "modeling_custom.py",
        "model.pkl",
    ]
    taken = list(filter_repo_objects(repository, allow_patterns=HUB_FILES, ignore_patterns=NOT_FROM_HUB))
    assert taken == repository[:11]
    assert requested["allow_patterns"] == list(HUB_FILES)
    assert requested["ignore_patterns"] == list(NOT_FROM_HUB)


def test_a_hub_model_is_linked_not_copied_where_the_disk_allows_it(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(model_dir))
    out, _ = _import(tmp_path, "hf:a/b")
    assert (out / "model.safetensors").samefile(model_dir / "model.safetensors")
    assert not (out / "config.json").samefile(model_dir / "config.json")


def test_an_adopted_folder_stays_where_it_is(model_dir: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256((model_dir / "model.safetensors").read_bytes()).hexdigest()
    result = _adopt(tmp_path, model_dir, sha256=digest)
    assert result["adopted_path"] == str(model_dir)
    assert result["num_params"] == num_params(Checkpoint.open(model_dir).shape)
    assert list((tmp_path / "run" / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["/no/such/model", "hf:someone/model"])
def test_adopting_something_other_than_a_folder_points_to_import(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist") as caught:
        _adopt(tmp_path, name)
    assert "kind import" in (caught.value.next_step or "")


def test_adoption_is_refused_for_other_weights_and_incomplete_folders(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="sha256 is"):
        _adopt(tmp_path, model_dir, sha256="0" * 64)
    shutil.rmtree(model_dir)
    with pytest.raises(CheckpointError, match="does not exist"):
        _adopt(tmp_path, model_dir)
    model_dir.mkdir()
    with pytest.raises(CheckpointError, match=r"There is no config.json"):
        _adopt(tmp_path, model_dir)
