"""Random NeMo archives, training checkpoints and pickles are read, or an error describes the problem."""

from __future__ import annotations

import io
import json
import pickle
import random
import shutil
import struct
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

from nemo_minitron.backends.alignment.nemo_aligner.unpack import unpacked
from nemo_minitron.backends.megatron.runtime.known_pickles import (
    _KnownPickle,
    load_known,
    require_known_backend,
)
from nemo_minitron.backends.megatron.runtime.session import Session, open_session
from nemo_minitron.backends.megatron.training.integrity import find_damage, write_facts
from nemo_minitron.errors import CheckpointError, MinitronError
from nemo_minitron.schema.execution import Parallel
from tests.support.examples import budget

MOST_S = 10.0
_CUTS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4)
_END = st.floats(0, 1)
_OPCODES = bytes(ord(code) if isinstance(code, str) else code for code in "(.0123FIJKLMNPQRSUVXabcdeghijlopqrstu}]")


def _damaged(content: bytes, changes: list[tuple[float, int]], end: float) -> bytes:
    changed = bytearray(content)
    for where, value in changes:
        changed[int(where * len(changed))] = value
    return bytes(changed) if end > 0.5 else bytes(changed[: int(2 * end * len(changed))])


# --- .nemo ---------------------------------------------------------------------------------------

_NAMES = st.sampled_from(
    ["model_config.yaml", "./a", "a/b", "../x", "/x", "a/../../x", "", ".", "a\0b", "é" * 60, "x" * 300]
)
_MEMBERS = st.lists(
    st.tuples(
        _NAMES,
        st.sampled_from([*b"0125634789LKxgSV", 0, 255]),
        st.sampled_from(["", "/etc/passwd", "../..", "a", "model_config.yaml"]),
        st.one_of(st.integers(0, 4), st.sampled_from([2**33 - 1, 2**62, 512])),
        st.binary(max_size=20),
    ),
    max_size=5,
)


@given(members=_MEMBERS, changes=_CUTS, end=_END)
@budget(40)
def test_an_archive_is_unpacked_inside_its_folder_or_refused(
    members: list[tuple[str, int, str, int, bytes]], changes: list[tuple[float, int]], end: float
) -> None:
    content = b""
    for name, kind, target, size, body in members:
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.size = bytes([kind]), target, size
        try:
            content += info.tobuf(tarfile.GNU_FORMAT) + body.ljust(512, b"\0")
        except ValueError:  # a name that no archive can hold
            continue
    content += bytes(1024)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "work").mkdir()
        nemo = root / "x.nemo"
        nemo.write_bytes(_damaged(content, changes, end))
        started = time.monotonic()
        with suppress(MinitronError):
            unpacked(nemo, root / "work")
        assert time.monotonic() - started < MOST_S
        assert sorted(path.name for path in root.iterdir()) == ["work", "x.nemo"]
        assert not [path for path in (root / "work").rglob("*") if path.is_symlink()]


# --- pickles -------------------------------------------------------------------------------------


def _table_of_contents() -> bytes:
    index = metadata.MetadataIndex("weight", torch.Size([0]), 0)
    properties = metadata.TensorProperties(torch.float32)
    chunk = metadata.ChunkStorageMetadata(torch.Size([0]), torch.Size([2]))
    tensor = metadata.TensorStorageMetadata(properties, torch.Size([2]), [chunk])
    info = _StorageInfo("__0_0.distcp", 0, 10)
    return pickle.dumps(metadata.Metadata({"weight": tensor}, {}, {index: info}))


def _common() -> bytes:
    stream = io.BytesIO()
    torch.save({"optimizer": {"step": torch.tensor([1.0]), "lr": 1e-3}}, stream)
    return stream.getvalue()


_CONTENTS, _COMMON = _table_of_contents(), _common()


@given(changes=_CUTS, end=_END)
@budget(150)
def test_a_damaged_table_of_contents_is_read_or_refused(changes: list[tuple[float, int]], end: float) -> None:
    started = time.monotonic()
    with suppress(pickle.UnpicklingError, MemoryError):
        _KnownPickle.loads(_damaged(_CONTENTS, changes, end))
    assert time.monotonic() - started < MOST_S


@given(changes=_CUTS, end=_END)
@budget(60)
def test_damaged_common_values_are_read_or_refused(changes: list[tuple[float, int]], end: float) -> None:
    started = time.monotonic()
    with suppress(Exception):  # torch raises errors of all types; `Checkpoints` converts them
        load_known(io.BytesIO(_damaged(_COMMON, changes, end)))
    assert time.monotonic() - started < MOST_S


_ARGUMENTS = st.one_of(
    st.integers(0, 255).map(lambda number: bytes([number])),
    st.sampled_from([b"\n", b"1\n", b"cos\nsystem\n", b"cbuiltins\ndict\n", b"\x8c\x02os\x8c\x06system\x93"]),
    st.integers(0, 2**32 - 1).map(lambda number: struct.pack("<I", number)),
)


@given(parts=st.lists(st.one_of(st.sampled_from([bytes([code]) for code in _OPCODES]), _ARGUMENTS), max_size=30))
@budget(150)
def test_a_program_of_any_steps_of_a_pickle_is_harmless(parts: list[bytes]) -> None:
    try:
        found = _KnownPickle.loads(b"".join(parts) + b".")
    except (pickle.UnpicklingError, MemoryError):
        return
    assert not callable(found) or isinstance(found, type)


# --- training checkpoints ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with open_session(Parallel(), device="cpu", threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, session: Session) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / ".metadata").write_bytes(_CONTENTS)
    (folder / "common.pt").write_bytes(_COMMON)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    write_facts(folder, {"step": 1, "good_losses": []}, {}, session)
    return folder


@given(
    name=st.sampled_from([".metadata", "common.pt", "metadata.json", "training.json"]),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=3),
    end=_END,
    added=st.booleans(),
)
@budget(60)
def test_a_damaged_checkpoint_is_noticed(
    name: str, changes: list[tuple[float, int]], end: float, added: bool, checkpoint: Path, session: Session
) -> None:
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "step_00000001"
        shutil.copytree(checkpoint, folder)
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(_damaged(before, changes, end))
        if added:
            (folder / f"{random.Random(end).random()}.distcp").write_bytes(b"x")
        try:
            found = find_damage(folder, session)
        except CheckpointError:  # one file has no checksum
            return
        assert not added or found is not None
        assert (found is None) == ((folder / name).read_bytes() == before) or _same_facts(name, before, folder)


def _same_facts(name: str, before: bytes, folder: Path) -> bool:
    """White space in a list of checksums has no meaning."""
    return name == "training.json" and json.loads(before) == json.loads((folder / name).read_bytes())


@given(
    content=st.one_of(st.binary(max_size=40), st.sampled_from([b"[]", b"null", b'{"sharded_backend": 1}', b"[" * 3000]))
)
@budget(40)
def test_the_names_of_formats_are_known_or_refused(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as root:
        (Path(root) / "metadata.json").write_bytes(content)
        with pytest.raises((ValueError, RecursionError)):
            require_known_backend(Path(root))
