"""NeMo checkpoints from other people: nothing in an archive, its weights or its config is run."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nemo_minitron.backends.alignment.nemo_aligner import process, unpack
from nemo_minitron.backends.alignment.nemo_aligner.environment import ENTRY
from nemo_minitron.backends.alignment.nemo_aligner.unpack import model_config, unpacked
from nemo_minitron.errors import CheckpointError
from nemo_minitron.hf.checkpoint import Checkpoint
from tests.conftest import Cli
from tests.support.aligner import require_aligner, same_tensors
from tests.support.tiny_models import tiny_model_dir


def test_no_task_of_nemo_loads_any_pickle() -> None:
    environment = process.task_environment(Path("/usr/bin/python3"), 1, on_cpu=True)
    assert not [name for name in environment if "WEIGHTS_ONLY" in name]
    text = (ENTRY / "__main__.py").read_text()
    main, rest = text[text.index("def main(") :].split("def _prepare(")
    assert "read_only_known_pickles()" in rest.split("def ")[0]
    # It runs before a task is imported, in a fork server and in a process for one task.
    assert main.index("_prepare()") < main.index("import_module(")
    assert main.rindex("_prepare()") < main.rindex("_run_file(")


# --- archives ------------------------------------------------------------------------------------


def _archive(file: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(file, "w") as archive:
        for info, content in members:
            info.size = len(content) if info.isreg() else 0
            archive.addfile(info, io.BytesIO(content))
    return file


def _member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "member",
    [
        _member("../up"),
        _member("/tmp/minitron-absolute"),
        _member("a", tarfile.SYMTYPE, "/etc/passwd"),
        _member("a", tarfile.SYMTYPE, "b"),
        _member("a", tarfile.LNKTYPE, "../../private"),
        _member("a", tarfile.CHRTYPE),
        _member("a", tarfile.BLKTYPE),
        _member("a", tarfile.FIFOTYPE),
    ],
    ids=lambda member: f"{member.name} {member.type!r} {member.linkname}",
)
def test_an_archive_writes_nothing_outside_and_holds_no_links(member: tarfile.TarInfo, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    nemo = _archive(tmp_path / "x.nemo", (_member("b"), b"fine"), (member, b"x"))
    if member.name.startswith("/"):  # the leading slash is removed
        unpacked(nemo, work)
    else:
        with pytest.raises(CheckpointError) as caught:
            unpacked(nemo, work)
        assert caught.value.where == str(nemo)
    assert not (tmp_path / "up").exists()
    assert not Path("/tmp/minitron-absolute").exists()
    assert not [path for path in work.rglob("*") if path.is_symlink()]


def test_an_archive_that_grows_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nemo = tmp_path / "x.nemo"
    with gzip.open(nemo, "wb") as out:
        for _ in range(200):
            out.write(bytes(1 << 20))
    with pytest.raises(CheckpointError, match="100 times as large"):
        unpacked(nemo, tmp_path)
    assert (tmp_path / "plain.tar").stat().st_size < 60e6
    (tmp_path / "plain.tar").unlink()
    monkeypatch.setattr(unpack, "MOST_MEMBERS", 3)
    many = _archive(tmp_path / "many.nemo", *[(_member(str(number)), b"") for number in range(4)])
    with pytest.raises(CheckpointError, match="more than 3 files"):
        unpacked(many, tmp_path)


def test_a_member_that_claims_more_than_there_is_is_refused(tmp_path: Path) -> None:
    info = _member("model_weights/x")
    info.size = 1 << 45
    nemo = tmp_path / "x.nemo"
    nemo.write_bytes(info.tobuf() + bytes(1024))
    with pytest.raises(CheckpointError):
        unpacked(nemo, tmp_path)


def test_a_packed_archive_is_read(tmp_path: Path) -> None:
    plain = _archive(tmp_path / "plain", (_member("./model_config.yaml"), b"num_layers: 1\n"))
    nemo = tmp_path / "x.nemo"
    nemo.write_bytes(gzip.compress(plain.read_bytes()))
    assert (unpacked(nemo, tmp_path) / "model_config.yaml").read_text() == "num_layers: 1\n"


def test_a_folder_with_links_out_of_it_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "nemo"
    folder.mkdir()
    (tmp_path / "private").write_text("x")
    (folder / "model_config.yaml").symlink_to(tmp_path / "private")
    with pytest.raises(CheckpointError, match=r"model_config\.yaml is a link to"):
        unpacked(folder, tmp_path)


# --- configs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("model"), "llama_gqa_tied", num_hidden_layers=1)


def _config(like: Path, tmp_path: Path, **keys: Any) -> dict[str, Any]:
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(keys))
    return model_config(tmp_path, tmp_path, Checkpoint.open(like).shape, like)


def test_a_config_cannot_name_classes_code_files_or_variables(like: Path, tmp_path: Path) -> None:
    hostile = {
        "_target_": "os.system",
        "target": "os.system",
        "cls": "os.system",
        "params": {"command": "true"},
        "tokenizer": {"type": "/evil", "trust_remote_code": True, "library": "huggingface"},
        "restore_from_path": "/evil.nemo",
        "dist_ckpt_format": "zarr",
        "activation": "${oc.env:HOME}",
        "optim": {"_target_": "os.system"},
        "precision": [1],
        "transformer_engine": False,
    }
    found = _config(like, tmp_path, **hostile)
    assert found["transformer_engine"] is False
    assert found["dist_ckpt_format"] == "torch_dist"
    assert found["tokenizer"]["type"] == str(like)
    assert "trust_remote_code" not in found["tokenizer"]
    left = {"_target_", "target", "cls", "params", "restore_from_path", "activation", "optim", "precision"}
    assert not left & found.keys()


@pytest.mark.parametrize(
    ("key", "value"), [("num_layers", 10**9), ("hidden_size", "x"), ("override_vocab_size", 10**12), ("kv_channels", 7)]
)
def test_a_config_of_another_shape_is_refused_before_anything_is_built(
    key: str, value: object, like: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=f"{key} = "):
        _config(like, tmp_path, **{key: value})


@pytest.mark.parametrize("text", ["", "- 1", "a: [", "!!python/object/apply:os.system [a]", "\0", "[" * 100_000, "x"])
def test_a_damaged_config_is_an_error(text: str, like: Path, tmp_path: Path) -> None:
    (tmp_path / "model_config.yaml").write_text(text)
    with pytest.raises(CheckpointError):
        model_config(tmp_path, tmp_path, Checkpoint.open(like).shape, like)


# --- weights, in NeMo's own environment ----------------------------------------------------------


class _Marker:
    def __init__(self, file: Path) -> None:
        self.file = str(file)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.file,)


def _contents(nemo: Path, marker: Path) -> None:
    (nemo / "model_weights/.metadata").write_bytes(pickle.dumps(_Marker(marker)))


def _common(nemo: Path, marker: Path) -> None:
    torch.save({"state_dict": _Marker(marker)}, nemo / "model_weights/common.pt")


def _target(nemo: Path, marker: Path) -> None:
    config = yaml.safe_load((nemo / "model_config.yaml").read_text())
    config |= {"_target_": "os.mkdir", "path": str(marker)}
    (nemo / "model_config.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.slow
def test_a_hostile_checkpoint_runs_nothing_and_a_good_one_is_converted(
    like: Path, tmp_path: Path, minitron: Cli
) -> None:
    require_aligner()
    good = tmp_path / "good"
    code, output = minitron("convert", like, good)
    assert code == 0, output
    attacks: list[tuple[Callable[[Path, Path], None], int]] = [(_contents, 2), (_common, 2), (_target, 0)]
    for number, (attack, expected) in enumerate(attacks):
        nemo, marker = tmp_path / f"{number}.nemo", tmp_path / f"marker{number}"
        prepared = tmp_path / f"prepared{number}"
        shutil.copytree(good, prepared)
        attack(prepared, marker)
        with tarfile.open(nemo, "w") as archive:
            archive.add(prepared, arcname=".")
        code, output = minitron("convert", nemo, tmp_path / f"out{number}", "--like", like)
        assert code == expected, output
        assert "which no Megatron or NeMo checkpoint contains" in output or expected == 0
        assert not marker.exists()
    assert same_tensors(tmp_path / "out2", like)
