"""Checkpoints from other people: nothing in them is run, and valid contents are read."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import shutil
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint import FileSystemReader, metadata
from torch.distributed.checkpoint import filesystem as torch_filesystem

from nemo_minitron.artifacts.manifest import file_facts
from nemo_minitron.backends.megatron.data import index_cache
from nemo_minitron.backends.megatron.distillation import distill
from nemo_minitron.backends.megatron.runtime import known_pickles
from nemo_minitron.backends.megatron.runtime.known_pickles import load_known, only_known_pickles, require_known_backend
from nemo_minitron.backends.megatron.runtime.session import open_session
from nemo_minitron.backends.megatron.training import loop as training
from nemo_minitron.backends.megatron.training.checkpoint import checkpoints
from nemo_minitron.errors import CheckpointError
from nemo_minitron.schema.execution import Parallel
from nemo_minitron.stages.train.params import TrainStage
from nemo_minitron.system.files import sealed
from nemo_minitron.system.progress import Progress
from tests.support.tiny_data import tiny_data_dir
from tests.support.tiny_models import tiny_model_dir

PARAMS = TrainStage(
    kind="train",
    num_steps=2,
    global_batch_size=2,
    seq_len_tokens=16,
    lr=1e-3,
    precision="fp32",
    valid_num_tokens=32,
    save_interval_steps=1,
    keep_checkpoints=1,
)


class Marker:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path, function: Callable[..., Any] = os.mkdir) -> None:
        self.call = (function, (str(file),))

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a model, data, and the work folder of a training."""
    root = tmp_path_factory.mktemp("trained")
    folders = {"model": tiny_model_dir(root / "model", "llama_gqa_tied"), "data": tiny_data_dir(root / "data")}
    folders["work"] = root / "work"
    folders["work"].mkdir()
    _train(folders, folders["work"])
    return folders


def _train(folders: dict[str, Path], work: Path) -> None:
    with open_session(Parallel(), device="cpu", threads=1) as session:
        job = distill.prepare_training(PARAMS, folders["model"], folders["data"], work, session)
        training.run(job, work, Progress(silent=True))


def _seal(checkpoint: Path) -> None:
    """Write valid checksums, as an attacker would."""
    rest = [file for file in checkpoint.iterdir() if file.name != "training.json"]
    files = {file.name: facts for file, facts in file_facts(rest).items()}
    facts = {"step": 2, "good_losses": [], "distributed_optimizer": False, "files": files}
    (checkpoint / "training.json").write_text(json.dumps(sealed(facts)))


def _zarr(checkpoint: Path, marker: Path) -> None:
    (checkpoint / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')


def _contents_name_another_file(checkpoint: Path, marker: Path) -> None:
    found = pickle.loads((checkpoint / ".metadata").read_bytes())
    info = next(iter(found.storage_data.values()))
    info.relative_path = "../../other.distcp"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(found))


def _contents(checkpoint: Path, marker: Path) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Marker(marker)))


def _contents_with_a_marker(checkpoint: Path, marker: Path) -> None:
    found = pickle.loads((checkpoint / ".metadata").read_bytes())
    found.planner_data = Marker(marker)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(found))


def _common(checkpoint: Path, marker: Path) -> None:
    torch.save({"optimizer": Marker(marker)}, checkpoint / "common.pt")


def _common_of_old(checkpoint: Path, marker: Path) -> None:
    torch.save({"optimizer": Marker(marker)}, checkpoint / "common.pt", _use_new_zipfile_serialization=False)


def _common_among_the_tensors(checkpoint: Path, marker: Path) -> None:
    found = pickle.loads((checkpoint / ".metadata").read_bytes())
    common = [(index, info) for index, info in found.storage_data.items() if index.fqn.startswith("common_state/")]
    if not common:
        pytest.skip("before Megatron-Core 0.19 common.pt holds it")
    [(index, info)], stream = common, io.BytesIO()
    torch.save([{"optimizer": Marker(marker)}], stream)
    file = checkpoint / info.relative_path
    offset = file.stat().st_size
    with file.open("ab") as opened:
        opened.write(stream.getvalue())
    found.storage_data[index] = replace(info, offset=offset, length=len(stream.getvalue()))
    (checkpoint / ".metadata").write_bytes(pickle.dumps(found))


@pytest.mark.parametrize(
    "prepare",
    [
        _contents,
        _contents_with_a_marker,
        _contents_name_another_file,
        _common,
        _common_of_old,
        _common_among_the_tensors,
        _zarr,
    ],
)
def test_a_prepared_training_checkpoint_runs_nothing(
    prepare: Callable[[Path, Path], None], trained: dict[str, Path], tmp_path: Path
) -> None:
    work = tmp_path / "work"
    shutil.copytree(trained["work"], work)
    newest = checkpoints(work / "checkpoints")[-1]
    prepare(newest, tmp_path / "marker")
    _seal(newest)
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        _train(trained, work)
    assert caught.value.where == str(newest)
    assert not (tmp_path / "marker").exists()


def _optimizer(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    # Since Megatron-Core 0.19 there is no common.pt, but one that is there is read.
    common = dist_checkpointing.load_common_state_dict(str(checkpoint))
    for group in _groups(common):
        change(group)
    torch.save(common, checkpoint / "common.pt")


def _groups(state: Any) -> list[dict[str, Any]]:
    """Check every place where a version of Megatron keeps them."""
    if not isinstance(state, dict):
        return []
    return [group for key, value in state.items() for group in (value if key == "param_groups" else _groups(value))]


GROUPS: list[Callable[[dict[str, Any]], object]] = [
    lambda group: group.pop("wd_mult"),
    lambda group: group.update(wd_mult=7.0),
    lambda group: group.update(lr_mult=["x"]),
    lambda group: group.clear(),
]


@pytest.mark.parametrize("change", GROUPS, ids=range(len(GROUPS)))
def test_the_state_of_another_optimizer_is_reported_without_a_traceback(
    change: Callable[[dict[str, Any]], object], trained: dict[str, Path], tmp_path: Path
) -> None:
    work = tmp_path / "work"
    shutil.copytree(trained["work"], work)
    newest = checkpoints(work / "checkpoints")[-1]
    _optimizer(newest, change)
    _seal(newest)
    with suppress(CheckpointError):  # old versions of Megatron-Core ignore the groups
        _train(trained, work)


@pytest.mark.parametrize("more", [{"good_losses": True}, {"good_losses": ["x"]}, {"step": None}, {"files": []}])
def test_odd_facts_of_a_checkpoint_are_reported_without_a_traceback(
    more: dict[str, Any], trained: dict[str, Path], tmp_path: Path
) -> None:
    work = tmp_path / "work"
    shutil.copytree(trained["work"], work)
    newest = checkpoints(work / "checkpoints")[-1]
    facts = json.loads((newest / "training.json").read_text())
    facts.pop("sha256")
    (newest / "training.json").write_text(json.dumps(sealed({**facts, **more})))
    with pytest.raises(CheckpointError):
        _train(trained, work)


def test_a_file_without_a_checksum_is_not_read(trained: dict[str, Path], tmp_path: Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(trained["work"], work)
    newest = checkpoints(work / "checkpoints")[-1]
    facts = json.loads((newest / "training.json").read_text())
    facts.pop("sha256")
    del facts["files"][".metadata"]
    (newest / "training.json").write_text(json.dumps(sealed(facts)))
    with pytest.raises(CheckpointError, match=r"has no checksum of \.metadata"):
        _train(trained, work)


def test_a_training_resumes_from_an_intact_checkpoint(trained: dict[str, Path], tmp_path: Path) -> None:
    """Read tensors from parts of files."""
    work = tmp_path / "work"
    shutil.copytree(trained["work"], work)
    (work / "curves.jsonl").unlink()
    _train(trained, work)
    rows = (work / "curves.jsonl").read_text()
    assert "valid_loss" in rows, "it was saved before it was validated"
    assert "train_loss" not in rows, "no step was done again"


def test_a_sound_checkpoint_is_read(trained: dict[str, Path]) -> None:
    newest = checkpoints(trained["work"] / "checkpoints")[-1]
    require_known_backend(newest)
    before = torch.load
    with only_known_pickles():
        found = FileSystemReader(newest).read_metadata()
        assert {"optimizer"} <= dist_checkpointing.load_common_state_dict(str(newest)).keys()
    assert isinstance(found, metadata.Metadata)
    assert torch.load is before
    assert torch_filesystem.pickle is pickle


_VALUES = [
    {"a": [1, 2.5, None, True, "x", b"bytes", (1,), {2}, frozenset({3}), 1j, bytearray(b"y")]},
    OrderedDict(a=torch.arange(6).reshape(2, 3)[:, 1]),
    defaultdict(dict, {0: {"exp_avg": torch.zeros(2, dtype=torch.bfloat16)}}),
    torch.nn.Parameter(torch.ones(2)),
    [torch.float32, torch.Size([1, 2]), torch.device("cpu"), torch.strided],
    np.random.RandomState(0).get_state(),
    np.float64(1.5),
    io.BytesIO(b"fp8"),
    PurePosixPath("a/b"),
]


@pytest.mark.parametrize("value", _VALUES, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_checkpoints_hold_is_read(value: Any, protocol: int) -> None:
    stream = io.BytesIO()
    torch.save({"value": value}, stream, pickle_protocol=protocol)
    stream.seek(0)
    found = load_known(stream)["value"]
    assert type(found) is type(value)
    if not isinstance(value, io.BytesIO):
        assert repr(found) == repr(value)


_HOSTILE: list[tuple[str, bytes]] = [
    ("a function", b"cposix\nsystem\n(S'true'\ntR."),
    ("by protocol 4", pickle.dumps(Marker(Path("/nonexistent/x")), protocol=4)),
    ("eval", b"c__builtin__\neval\n(S'1'\ntR."),
    ("getattr", b"cbuiltins\ngetattr\n(S'a'\nS'b'\ntR."),
    ("a dotted name", b"\x80\x04\x8c\x05torch\x8c\x0aos.system.x\x93."),
    ("a name inside an allowed module", b"ctorch.serialization\nload\n(S'x'\ntR."),
    ("torch.load", b"ctorch\nload\n(S'x'\ntR."),
    ("a million bytes", b"c__builtin__\nbytearray\n(I1000000000000\ntR."),
    ("an extension code", b"\x80\x02\x82\x01."),
    ("an old instance", b"(iposix\nsystem\n."),
    ("an attribute of a class", b"\x80\x02ccollections\nOrderedDict\n(N}(U\x01aK\x01utb."),
    ("another codec", b"c_codecs\nencode\n(S'x'\nS'zip'\ntR."),
    ("nothing", b""),
    ("an unknown code", b"\xff"),
    ("an empty stack", b"."),
    ("a mark alone", b"(R."),
]


@pytest.mark.parametrize("content", [content for _, content in _HOSTILE], ids=[name for name, _ in _HOSTILE])
def test_anything_else_is_refused(content: bytes) -> None:
    with pytest.raises(pickle.UnpicklingError):
        known_pickles._KnownPickle.loads(content)


def test_a_program_in_place_of_tensors_is_refused(tmp_path: Path) -> None:
    program = tmp_path / "common.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), program)
    with pytest.raises(pickle.UnpicklingError, match="TorchScript"):
        load_known(program)


def _short_of_numbers(folder: Path, more: str = "") -> Path:
    """A tensor of 16 MB, of which the file contains four numbers: before 2.10, torch reads memory behind them."""
    whole, short = folder / "whole.pt", folder / "short.pt"
    torch.save({"a": torch.zeros(4 << 20)}, whole)
    with zipfile.ZipFile(whole) as read, zipfile.ZipFile(short, "w") as out:
        for name in read.namelist():
            out.writestr(name, bytes(16) if name.endswith("data/0") else read.read(name))
        if more:
            out.writestr(more, bytes(16 << 20))
    return short


@pytest.mark.parametrize("more", ["", "whole/data/x/data/0", "whole/DATA/0"])
@pytest.mark.parametrize("in_memory", [False, True])
def test_a_tensor_has_no_more_numbers_than_its_file(more: str, in_memory: bool, tmp_path: Path) -> None:
    """CVE-2026-24747."""
    file = _short_of_numbers(tmp_path, more)
    with pytest.raises(pickle.UnpicklingError, match="fewer elements than it declares"):
        load_known(io.BytesIO(file.read_bytes()) if in_memory else file)


@pytest.mark.parametrize("steps", [b"K\x00K\x01s", b"(K\x00K\x01u"], ids=["SETITEM", "SETITEMS"])
def test_only_dictionaries_are_filled(steps: bytes) -> None:
    """This is the other half of CVE-2026-24747."""
    with pytest.raises(pickle.UnpicklingError, match="other than a dictionary"):
        known_pickles._KnownPickle.loads(b"\x80\x02ctorch\nSize\n)R" + steps + b".")
    assert known_pickles._KnownPickle.loads(b"\x80\x02}" + steps + b".") == {0: 1}


def test_an_index_of_a_dataset_that_numpy_would_unpickle_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    folder.mkdir()
    np.save(folder / "a.npy", np.arange(3))
    index_cache.mark_complete(folder)
    index_cache.drop_unless_complete(folder)
    assert folder.is_dir()
    (folder / "a.npy").write_bytes(pickle.dumps(Marker(tmp_path / "marker")))
    index_cache.write_whole(folder / index_cache.MARK, json.dumps(sealed(index_cache._files(folder))))
    index_cache.drop_unless_complete(folder)
    assert not folder.exists()


def test_tensors_that_processes_send_each_other_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.arange(4.0).reshape(2, 2)
    sent = pickle.dumps({"a": tensor})
    assert torch.equal(known_pickles._KnownPickle.loads(sent)["a"], tensor)
    monkeypatch.setattr(torch, "load", load_known)
    assert torch.equal(pickle.loads(sent)["a"], tensor)
    assert torch.equal(copy.deepcopy({"a": tensor})["a"], tensor)


def test_the_old_format_in_memory_runs_nothing(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save({"a": Marker(tmp_path / "marker")}, stream, _use_new_zipfile_serialization=False)
    stream.seek(0)
    with pytest.raises(pickle.UnpicklingError, match="mkdir"):
        load_known(stream)
    assert not (tmp_path / "marker").exists()
