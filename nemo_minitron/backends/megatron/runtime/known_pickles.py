"""Read the pickles of Megatron's distributed checkpoints, and nothing else that a pickle could hold.

A pickle can name any function and have it called. A checkpoint needs a few dozen classes: those of its table of
contents (`.metadata`, by torch.distributed.checkpoint), of tensors, and of plain values. They are listed here, as found
in files that Megatron-Core 0.10 to 0.19 and NeMo 2.1 have written; anything else is refused before it is imported.

Needs torch alone: NeMo-Aligner's processes load this file by its path.
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

MOST_METADATA_JSON_BYTES = 1 << 20
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"
_ZARR = "megatron.core.dist_checkpointing.strategies.zarr"
_CONTENTS = "torch.distributed.checkpoint.metadata"
_SHARDED = "torch.distributed._shard"
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
_ZIP, _OLD = b"PK\x03\x04", pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
_KNOWN: Mapping[str, frozenset[str]] = {
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
        # What Transformer Engine keeps of fp8.
        "transformer_engine.common.recipe": "DelayedScaling Format _FormatHelper",
    }.items()
}


def _bytes(value: bytes = b"") -> bytes:
    """Stands in for `bytes`, which makes as many bytes as a number says."""
    return bytes(memoryview(value))


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """Stands in for `_codecs.encode`, by which protocol 2 keeps bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def _stored_tensor(content: bytes) -> Any:
    """Stands in for `torch.storage._load_from_bytes`."""
    return load_known(io.BytesIO(content))


_REPLACED: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("builtins", "bytes"): _bytes,
    ("builtins", "bytearray"): lambda value=b"": bytearray(_bytes(value)),
    ("_codecs", "encode"): _latin1,
    ("torch.storage", "_load_from_bytes"): _stored_tensor,
    # Megatron-Core puts this in its place since 0.17.
    ("megatron.core.safe_globals", "safe_load_from_bytes"): _stored_tensor,
}


_Steps: Any = pickle._Unpickler
"""The unpickler in Python, of which single steps can be replaced."""


class KnownUnpickler(_Steps):  # type: ignore[misc]
    """An unpickler that finds only what checkpoints hold, and leaves classes as they are."""

    def find_class(self, module_name: str, name: str) -> Any:
        """Called for everything that a pickle names.

        Raises:
            UnpicklingError: checkpoints do not hold it.
        """
        if self.proto < 3:
            module_name, name = NAME_MAPPING.get((module_name, name), (module_name, name))
            module_name = IMPORT_MAPPING.get(module_name, module_name)
        if (module_name, name) in _REPLACED:
            return _REPLACED[module_name, name]
        if name in _KNOWN.get(module_name, ()):
            return getattr(import_module(module_name), name)
        if module_name == "torch" and _is_type_of_numbers(name):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it holds {module_name}.{name}, which no checkpoint of Megatron or NeMo does")

    def load(self) -> Any:
        """The object.

        Raises:
            UnpicklingError: it is damaged, or holds something unknown.
        """
        try:
            return super().load()
        except (pickle.UnpicklingError, MemoryError, OSError):
            raise
        except Exception as error:
            raise pickle.UnpicklingError(f"it is damaged: {type(error).__name__}: {error}"[:300]) from error

    def load_build(self) -> None:
        """Set attributes of an object; of a class they would change what is used everywhere."""
        if isinstance(self.stack[-2], type | ModuleType) or callable(self.stack[-2]):
            raise pickle.UnpicklingError("it changes a class")
        super().load_build()

    def load_setitem(self) -> None:
        """Fill a dictionary; of a tensor it would write into the memory."""
        self._require_dictionary(self.stack[-3])
        super().load_setitem()

    def load_setitems(self) -> None:
        """The same for several values."""
        self._require_dictionary(self.metastack[-1][-1])
        super().load_setitems()

    @staticmethod
    def _require_dictionary(filled: Any) -> None:
        if not isinstance(filled, dict):
            raise pickle.UnpicklingError("it fills what is no dictionary")

    def load_binpersid(self) -> None:
        """Take a tensor's numbers from the file; before torch 2.10 nothing else looks at how many there are."""
        _require_room(self.stack[-1])
        super().load_binpersid()

    dispatch: ClassVar[dict[int, Any]] = {
        **{code: step for code, step in _Steps.dispatch.items() if code not in b"\x82\x83\x84ioP"},
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.BINPERSID[0]: load_binpersid,
    }
    """Without extension codes, the two old ways to make an object and the old one to name numbers, which nothing has
    written for twenty years."""


_bytes_of: ContextVar[Mapping[str, int] | None] = ContextVar("bytes_of", default=None)
"""Key of a tensor's numbers -> how many bytes the file holds; None: a format that says so itself."""


def _require_room(saved: Any) -> None:
    """Raises UnpicklingError where a tensor's numbers are said to be more than the file holds (CVE-2026-24747)."""
    held = _bytes_of.get()
    if held is None:
        return
    kind, numbers, key, _, count = saved
    item = 1 if numbers is torch.UntypedStorage else numbers.dtype.itemsize
    if kind != "storage" or not isinstance(count, int) or not 0 <= count * item <= held.get(str(key).lower(), -1):
        raise pickle.UnpicklingError(f"it holds fewer numbers than it says of the tensor {key!r}"[:200])


def _is_type_of_numbers(name: str) -> bool:
    found = getattr(torch, name, None) if name.isidentifier() else None
    return isinstance(found, torch.dtype | torch.layout | torch.memory_format) or (
        isinstance(found, type) and name.endswith("Storage")
    )


class _KnownPickle(ModuleType):
    """The module `pickle` with another way to load."""

    Unpickler = KnownUnpickler

    def __getattr__(self, name: str) -> Any:
        return getattr(pickle, name)

    @staticmethod
    def load(file: IO[bytes], **options: Any) -> Any:
        """As `pickle.load`; a checkpoint's table of contents may only name files beside it."""
        found = KnownUnpickler(file, **options).load()
        if isinstance(getattr(found, "storage_data", None), dict):
            for info in found.storage_data.values():
                name = getattr(info, "relative_path", None)
                if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
                    raise pickle.UnpicklingError(f"it names the file {name!r}, which is not beside it")
        return found

    @staticmethod
    def loads(content: bytes, **options: Any) -> Any:
        """As `pickle.loads`."""
        return _KnownPickle.load(io.BytesIO(content), **options)


_known_pickle = _KnownPickle("known_pickle")
_torch_load = torch.load


def load_known(f: Any, map_location: Any = None, pickle_module: Any = None, **options: Any) -> Any:
    """Stands in for `torch.load`; reads what torch.save has written of tensors and plain values.

    Raises:
        UnpicklingError: it holds something else, or it is of another format.
    """
    token = _bytes_of.set(_held(f) if _is_zip(f) else None)
    options["weights_only"] = False
    try:
        return _torch_load(f, map_location=map_location, pickle_module=_known_pickle, **options)
    finally:
        _bytes_of.reset(token)


def _is_zip(f: Any) -> bool:
    """Whether it is a zip file, as torch writes since 1.6, or the older format, which is read from memory only.

    torch itself still uses that one for tensors that processes send each other, and for copies of storages.

    Raises:
        UnpicklingError: neither of them, or a program.
    """
    if isinstance(f, str | os.PathLike):
        with open(f, "rb") as opened:
            return _is_zip(opened)
    start = f.tell()
    found = f.read(len(_OLD))
    f.seek(start)
    if isinstance(f, io.BytesIO) and found == _OLD:
        return False
    if not found.startswith(_ZIP):
        raise pickle.UnpicklingError("it is not in the format of torch.save")
    records = torch._C.PyTorchFileReader(f).get_all_records()
    f.seek(start)
    if "constants.pkl" in records:
        raise pickle.UnpicklingError("it is a TorchScript program, no checkpoint")
    return True


class _Part(io.RawIOBase):
    """An open file to read from. torch's own view of a part of one seeks wrongly from its end; that of 2.6 reads on."""

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


def _held(f: Any) -> dict[str, int]:
    """Key of a record of numbers -> its bytes; of two with one name, the fewer. torch does not tell capitals apart."""
    is_path = isinstance(f, str | os.PathLike)
    start = 0 if is_path else f.tell()
    held: dict[str, int] = {}
    try:
        with zipfile.ZipFile(f if is_path else io.BufferedReader(_Part(f))) as archive:
            for entry in archive.infolist():
                _, folder, key = (*entry.filename.lower().split("/", 2), "", "")[:3]
                if folder == "data":
                    held[key] = min(entry.file_size, held.get(key, entry.file_size))
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise pickle.UnpicklingError(f"it is damaged: {error}"[:300]) from error
    finally:
        if not is_path:
            f.seek(start)
    return held


def require_known_backend(folder: Path) -> None:
    """Refuse a checkpoint in another of Megatron's formats: zarr's files can name a pickle as their compression.

    Raises:
        ValueError: its metadata.json says so, or cannot be read.
    """
    file = folder / "metadata.json"
    if file.stat().st_size > MOST_METADATA_JSON_BYTES:
        raise ValueError(f"{file.name} is too large")
    found = json.loads(file.read_text(encoding="utf-8"))
    backends = (found.get("sharded_backend"), found.get("common_backend", "torch")) if isinstance(found, dict) else None
    if backends != ("torch_dist", "torch"):
        raise ValueError(f"{file.name} names the formats {backends}, not torch_dist and torch")


@contextmanager
def only_known_pickles() -> Iterator[None]:
    """Inside, checkpoints are read by the functions of this file."""
    filesystem = import_module(_FILESYSTEM)
    before = torch.load, filesystem.pickle
    torch.load, filesystem.pickle = load_known, _known_pickle  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.load, filesystem.pickle = before  # type: ignore[attr-defined]


def read_only_known_pickles() -> None:
    """The same for the rest of this process, for `pickle.load` of any file, and without Megatron's zarr format."""
    pickle.load = _KnownPickle.load  # type: ignore[assignment]
    torch.load = load_known
    import_module(_FILESYSTEM).pickle = _known_pickle  # type: ignore[attr-defined]
    sys.modules[_ZARR] = None  # type: ignore[assignment]  # an import of it fails, in Megatron's own words
