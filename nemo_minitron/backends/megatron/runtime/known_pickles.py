"""Read the pickles of Megatron's distributed checkpoints with an allowlist of classes.

A pickle can name any function and have it called. A checkpoint needs only a few dozen classes: those of its index
(`.metadata`, written by torch.distributed.checkpoint), of tensors, and of plain values. The allowlist contains what
Megatron-Core 0.10 to 0.19 and NeMo 2.1 write. Everything else is refused before it is imported.

This module imports only torch and the standard library: NeMo-Aligner's processes load it by its path.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import IO, Any, ClassVar

import torch

MAX_METADATA_JSON_BYTES = 1 << 20
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"
_ZARR = "megatron.core.dist_checkpointing.strategies.zarr"
_CONTENTS = "torch.distributed.checkpoint.metadata"
_SHARDED = "torch.distributed._shard"
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
_ZIP_MAGIC, _LEGACY_MAGIC = b"PK\x03\x04", pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
_ALLOWED: Mapping[str, frozenset[str]] = {
    module: frozenset(names.split())
    for module, names in {
        "builtins": "dict list set frozenset tuple int float bool str complex",
        "collections": "OrderedDict defaultdict",
        "pathlib": "PosixPath PurePosixPath",
        "typing": "Any",
        "_io": "BytesIO",
        "torch": "Size device",
        "torch._utils": "_rebuild_tensor _rebuild_tensor_v2 _rebuild_parameter",
        "torch.nn.parameter": "Parameter",
        "torch.serialization": "_get_layout",
        _CONTENTS: "Metadata MetadataIndex StorageMeta ChunkStorageMetadata TensorStorageMetadata BytesStorageMetadata "
        "TensorProperties _MEM_FORMAT_ENCODING",
        _FILESYSTEM: "_StorageInfo",
        "torch.distributed.checkpoint.planner": "SavePlan WriteItem WriteItemType TensorWriteData BytesIOWriteData",
        f"{_SHARDED}.metadata": "ShardMetadata",
        f"{_SHARDED}.sharded_tensor.metadata": "TensorProperties MEM_FORMAT_ENCODING",
        _MEGATRON: "MCoreMetadata MCoreSavePlan",
        "numpy": "ndarray dtype",
        "numpy.core.multiarray": "_reconstruct scalar",
        "numpy._core.multiarray": "_reconstruct scalar",
        "omegaconf.base": "ContainerMetadata Metadata",
        "omegaconf.dictconfig": "DictConfig",
        "omegaconf.listconfig": "ListConfig",
        "omegaconf.nodes": "AnyNode StringNode IntegerNode FloatNode BooleanNode",
        # fp8 state of Transformer Engine.
        "transformer_engine.common.recipe": "DelayedScaling Format _FormatHelper",
    }.items()
}


def _bytes(value: bytes = b"") -> bytes:
    """Replace `bytes`, which would allocate n bytes for an integer n."""
    return bytes(memoryview(value))


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """Replace `_codecs.encode`, which pickle protocol 2 uses to store bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def _stored_tensor(content: bytes) -> Any:
    """Replace `torch.storage._load_from_bytes`."""
    return load_known(io.BytesIO(content))


_REPLACED: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("builtins", "bytes"): _bytes,
    ("builtins", "bytearray"): lambda value=b"": bytearray(_bytes(value)),
    ("_codecs", "encode"): _latin1,
    ("torch.storage", "_load_from_bytes"): _stored_tensor,
    # Megatron-Core 0.17 and later use this one instead.
    ("megatron.core.safe_globals", "safe_load_from_bytes"): _stored_tensor,
}


_PythonUnpickler: Any = pickle._Unpickler
"""The pure-Python unpickler, whose opcode handlers can be overridden."""


class KnownUnpickler(_PythonUnpickler):  # type: ignore[misc]
    """Unpickler that resolves only allowed names and never modifies classes."""

    def find_class(self, module_name: str, name: str) -> Any:
        """Resolve a name in the pickle.

        Raises:
            UnpicklingError: the name is not on the allowlist.
        """
        if self.proto < 3:
            module_name, name = NAME_MAPPING.get((module_name, name), (module_name, name))
            module_name = IMPORT_MAPPING.get(module_name, module_name)
        if (module_name, name) in _REPLACED:
            return _REPLACED[module_name, name]
        if name in _ALLOWED.get(module_name, ()):
            return getattr(import_module(module_name), name)
        if module_name == "torch" and _is_type_of_numbers(name):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it contains {module_name}.{name}, which no Megatron or NeMo checkpoint contains")

    def load(self) -> Any:
        """Return the unpickled object.

        Raises:
            UnpicklingError: the pickle is damaged or contains a name that is not allowed.
        """
        try:
            return super().load()
        except (pickle.UnpicklingError, MemoryError, OSError):
            raise
        except Exception as error:
            raise pickle.UnpicklingError(f"it is damaged: {type(error).__name__}: {error}"[:300]) from error

    def load_build(self) -> None:
        """Set attributes of an instance; refuse classes and functions, whose attributes affect the whole process."""
        if isinstance(self.stack[-2], type | ModuleType) or callable(self.stack[-2]):
            raise pickle.UnpicklingError("it modifies a class")
        super().load_build()

    def load_setitem(self) -> None:
        """Set a dictionary item; refuse other containers: for a tensor, this would write into its memory."""
        self._require_dictionary(self.stack[-3])
        super().load_setitem()

    def load_setitems(self) -> None:
        """Set several dictionary items; see `load_setitem`."""
        self._require_dictionary(self.metastack[-1][-1])
        super().load_setitems()

    @staticmethod
    def _require_dictionary(filled: Any) -> None:
        if not isinstance(filled, dict):
            raise pickle.UnpicklingError("it sets items of something other than a dictionary")

    def load_binpersid(self) -> None:
        """Load a tensor's storage; before torch 2.10 nothing else checks its size against the file."""
        _require_stored_bytes(self.stack[-1])
        super().load_binpersid()

    dispatch: ClassVar[dict[int, Any]] = {
        **{code: step for code, step in _PythonUnpickler.dispatch.items() if code not in b"\x82\x83\x84ioP"},
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.BINPERSID[0]: load_binpersid,
    }
    """Leaves out the opcodes for extension codes, INST, OBJ and text PERSID, which no current writer emits."""


_bytes_of: ContextVar[Mapping[str, int] | None] = ContextVar("bytes_of", default=None)
"""Storage key -> bytes in the file. None: a format that stores the size with the data."""


def _require_stored_bytes(saved: Any) -> None:
    """Raise UnpicklingError if a tensor declares more elements than the file contains (CVE-2026-24747)."""
    stored = _bytes_of.get()
    if stored is None:
        return
    kind, numbers, key, _, count = saved
    item = 1 if numbers is torch.UntypedStorage else numbers.dtype.itemsize
    if kind != "storage" or not isinstance(count, int) or not 0 <= count * item <= stored.get(str(key).lower(), -1):
        raise pickle.UnpicklingError(f"it contains fewer elements than it declares for the tensor {key!r}"[:200])


def _is_type_of_numbers(name: str) -> bool:
    found = getattr(torch, name, None) if name.isidentifier() else None
    return isinstance(found, torch.dtype | torch.layout | torch.memory_format) or (
        isinstance(found, type) and name.endswith("Storage")
    )


class _KnownPickle(ModuleType):
    """The module `pickle` with a restricted `load`."""

    Unpickler = KnownUnpickler

    def __getattr__(self, name: str) -> Any:
        return getattr(pickle, name)

    @staticmethod
    def load(file: IO[bytes], **options: Any) -> Any:
        """Like `pickle.load`; a checkpoint index may only name files in its own folder."""
        found = KnownUnpickler(file, **options).load()
        if isinstance(getattr(found, "storage_data", None), dict):
            for info in found.storage_data.values():
                name = getattr(info, "relative_path", None)
                if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
                    raise pickle.UnpicklingError(f"it names the file {name!r}, which is not in the same folder")
        return found

    @staticmethod
    def loads(content: bytes, **options: Any) -> Any:
        """Like `pickle.loads`."""
        return _KnownPickle.load(io.BytesIO(content), **options)


_known_pickle = _KnownPickle("known_pickle")
_torch_load = torch.load


def load_known(f: Any, map_location: Any = None, pickle_module: Any = None, **options: Any) -> Any:
    """Replace `torch.load`: read tensors and plain values that torch.save has written.

    Raises:
        UnpicklingError: the file contains something else or has another format.
    """
    token = _bytes_of.set(_stored_bytes(f) if _is_zip(f) else None)
    options["weights_only"] = False
    try:
        return _torch_load(f, map_location=map_location, pickle_module=_known_pickle, **options)
    finally:
        _bytes_of.reset(token)


def _is_zip(f: Any) -> bool:
    """Return whether this is a zip file (torch 1.6 and later) or the legacy format, which is accepted from memory only.

    torch still uses the legacy format for tensors sent between processes and for copies of storages.

    Raises:
        UnpicklingError: the format is neither of the two, or the file is a TorchScript program.
    """
    if isinstance(f, str | os.PathLike):
        with open(f, "rb") as opened:
            return _is_zip(opened)
    start = f.tell()
    found = f.read(len(_LEGACY_MAGIC))
    f.seek(start)
    if isinstance(f, io.BytesIO) and found == _LEGACY_MAGIC:
        return False
    if not found.startswith(_ZIP_MAGIC):
        raise pickle.UnpicklingError("it is not in the format of torch.save")
    records = torch._C.PyTorchFileReader(f).get_all_records()
    f.seek(start)
    if "constants.pkl" in records:
        raise pickle.UnpicklingError("it is a TorchScript program, not a checkpoint")
    return True


class _Part(io.RawIOBase):
    """Read-only view of an open file. torch's own seeks incorrectly from the end; in 2.6 it also reads past the end."""

    def __init__(self, f: Any) -> None:
        super().__init__()
        f.seek(0, os.SEEK_END)
        self._file, self._size, self._at = f, f.tell(), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._at)
        found = self._file.read(max(0, min(len(buffer), self._size - self._at)))
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)


def _stored_bytes(f: Any) -> dict[str, int]:
    """Return storage key -> bytes; for duplicate names, the smaller size. torch ignores case in record names."""
    is_path = isinstance(f, str | os.PathLike)
    start = 0 if is_path else f.tell()
    stored: dict[str, int] = {}
    try:
        with zipfile.ZipFile(f if is_path else io.BufferedReader(_Part(f))) as archive:
            for entry in archive.infolist():
                _, folder, key = (*entry.filename.lower().split("/", 2), "", "")[:3]
                if folder == "data":
                    stored[key] = min(entry.file_size, stored.get(key, entry.file_size))
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise pickle.UnpicklingError(f"it is damaged: {error}"[:300]) from error
    finally:
        if not is_path:
            f.seek(start)
    return stored


def require_known_backend(folder: Path) -> None:
    """Refuse Megatron's other checkpoint formats: zarr files can specify pickle as their codec.

    Raises:
        ValueError: metadata.json names another format or cannot be read.
    """
    file = folder / "metadata.json"
    if file.stat().st_size > MAX_METADATA_JSON_BYTES:
        raise ValueError(f"{file.name} is too large")
    found = json.loads(file.read_text(encoding="utf-8"))
    backends = (found.get("sharded_backend"), found.get("common_backend", "torch")) if isinstance(found, dict) else None
    if backends != ("torch_dist", "torch"):
        raise ValueError(f"{file.name} names the formats {backends}, not torch_dist and torch")


@contextmanager
def only_known_pickles() -> Iterator[None]:
    """Read checkpoints through this module inside the context."""
    filesystem = import_module(_FILESYSTEM)
    before = torch.load, filesystem.pickle
    torch.load, filesystem.pickle = load_known, _known_pickle  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.load, filesystem.pickle = before  # type: ignore[attr-defined]


def read_only_known_pickles() -> None:
    """Restrict `pickle.load` and `torch.load` for the rest of this process, and disable Megatron's zarr format."""
    pickle.load = _KnownPickle.load  # type: ignore[assignment]
    torch.load = load_known
    import_module(_FILESYSTEM).pickle = _known_pickle  # type: ignore[attr-defined]
    sys.modules[_ZARR] = None  # type: ignore[assignment]  # makes its import fail
