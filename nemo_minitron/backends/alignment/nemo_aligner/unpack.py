"""Safe reading of NeMo checkpoints of unknown origin: bounded unpacking, and a filter for the config."""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml

from nemo_minitron.backends.alignment.nemo_aligner.model_config import WITHOUT_FUSED_KERNELS, nemo_model_config
from nemo_minitron.errors import CheckpointError
from nemo_minitron.families import ModelShape
from nemo_minitron.hf.links import require_inside

CONFIG_FILE = "model_config.yaml"
MOST_MEMBERS, MOST_CONFIG_BYTES, MOST_VALUE_CHARACTERS = 100_000, 1 << 18, 200
MOST_BRACKETS = 1000
"""Maximum number of brackets in a config; the YAML reader needs seconds and more for deep nesting."""
MOST_TIMES_AS_LARGE = 100
"""Maximum ratio of the unpacked to the packed size of a .nemo file; weights hardly compress."""
MOST_EXTRA_ROWS = 1 << 16
"""Maximum number of rows that NeMo may add to a vocabulary as padding for tensor parallelism."""
_SHAPE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
_OURS = ("tokenizer", "dist_ckpt_format", *_SHAPE)
MOST_READ_BYTES = 1 << 26
_DAMAGED = (OSError, tarfile.TarError, zlib.error, EOFError, ValueError, LookupError, ArithmeticError, RecursionError)
_GZIP = b"\x1f\x8b"
_BLOCK_BYTES = 1 << 20


def unpacked(nemo: Path, work: Path) -> Path:
    """Return the folder of a checkpoint; an archive is unpacked below `work`.

    Raises:
        CheckpointError: it is damaged or too large, or it contains links, devices or paths that lead out of it.
    """
    if nemo.is_dir():
        for path in nemo.rglob("*"):
            require_inside(path, nemo)
        return nemo
    folder = work / "unpacked"
    with (
        _archive_errors(nemo),
        _plain_tar(nemo, work) as plain,
        plain.open("rb") as file,
        tarfile.open(fileobj=_Clipped(file), mode="r:") as archive,  # type: ignore[call-overload]
    ):
        members = list(_members(archive, nemo))
        needed = sum(member.size for member in members)
        if needed > shutil.disk_usage(work).free:
            raise _refused(nemo, f"Unpacked, its {needed / 1e6:,.0f} MB do not fit on the disk of {work.parent}.")
        archive.extractall(folder, members=members, filter="data")
    return folder


class _Clipped:
    """A file that never reads more than it has: tarfile requests as many bytes as a header claims."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._size = file, os.fstat(file.fileno()).st_size
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._file.tell())
        return self._file.read(min(left if size < 0 else size, left, MOST_READ_BYTES))


def model_config(folder: Path, nemo: Path, shape: ModelShape, tokenizer: Path) -> dict[str, Any]:
    """Return the safe part of a checkpoint's config: plain values of keys that this package writes itself.

    NeMo instantiates any class that a config names, reads environment variables, and runs code that comes with a
    tokenizer. Therefore it gets only numbers, booleans and short strings, and only for known keys.

    Args:
        folder: the unpacked checkpoint.
        nemo: the checkpoint that the user named, for error messages.
        shape: shape of the Hugging Face model that the weights will be read as.
        tokenizer: Hugging Face tokenizer to use instead of the checkpoint's.

    Raises:
        CheckpointError: there is no config, or it cannot be read.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(f"This is not a NeMo checkpoint: it has no {CONFIG_FILE}.", where=str(nemo))
    if file.stat().st_size > MOST_CONFIG_BYTES:
        raise _refused(nemo, f"{CONFIG_FILE} is larger than {MOST_CONFIG_BYTES / 1e3:.0f} kB.")
    try:
        text = file.read_text(encoding="utf-8")
        if text.count("[") + text.count("{") > MOST_BRACKETS:
            raise ValueError(f"more than {MOST_BRACKETS} brackets")
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _refused(nemo, f"{CONFIG_FILE} cannot be read: {error}"[:500]) from error
    if not isinstance(found, Mapping):
        raise _refused(nemo, f"{CONFIG_FILE} contains no keys.")
    ours = nemo_model_config(shape, tokenizer, seq_len_tokens=1, on_cpu=False, where=str(nemo))
    _require_same_shape(found, ours, nemo)
    known = (ours.keys() | WITHOUT_FUSED_KERNELS.keys()) - set(_OURS)
    taken = {key: found[key] for key in sorted(known) if key in found and _is_plain(found[key])}
    return {**taken, **{key: ours[key] for key in _OURS}}


def _require_same_shape(found: Mapping[str, Any], ours: Mapping[str, Any], nemo: Path) -> None:
    """Refuse a config of another shape: NeMo would build a model of any size before it compares the weights."""
    for key in _SHAPE:
        if found.get(key) is not None and found[key] != ours[key]:
            raise CheckpointError(
                f"The checkpoint has {key} = {found[key]!r}"[:200] + f", and the model of --like has {ours[key]}.",
                where=str(nemo),
                next_step="Give the Hugging Face model of the same shape with --like.",
            )
    most = ours["override_vocab_size"] + MOST_EXTRA_ROWS
    for key in ("override_vocab_size", "make_vocab_size_divisible_by"):
        value = found.get(key)
        if value is not None and not (isinstance(value, int) and 0 < value <= most):
            raise _refused(nemo, f"{CONFIG_FILE} has {key} = {value!r}"[:200] + ".")


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= MOST_VALUE_CHARACTERS and "${" not in value
    return value is None or isinstance(value, bool | int | float)


def _members(archive: tarfile.TarFile, nemo: Path) -> Iterator[tarfile.TarInfo]:
    for number, member in enumerate(archive):
        if number == MOST_MEMBERS:
            raise _refused(nemo, f"It contains more than {MOST_MEMBERS:,} files.")
        if not (member.isreg() or member.isdir()) or member.issparse():
            raise _refused(nemo, f"It contains {member.name!r}: a link, a device or a sparse file.")
        yield member


@contextmanager
def _plain_tar(nemo: Path, work: Path) -> Iterator[Path]:
    """Yield the archive without compression, so that the size of the file bounds that of its members."""
    with nemo.open("rb") as file:
        packed = file.read(len(_GZIP)) == _GZIP
    if not packed:
        yield nemo
        return
    plain, most = work / "plain.tar", max(nemo.stat().st_size * MOST_TIMES_AS_LARGE, _BLOCK_BYTES)
    with gzip.open(nemo) as stream, plain.open("xb") as out:
        while block := stream.read(_BLOCK_BYTES):
            if out.tell() > most:
                raise _refused(nemo, f"Unpacked, it is more than {MOST_TIMES_AS_LARGE} times as large as packed.")
            out.write(block)
    yield plain
    plain.unlink()


@contextmanager
def _archive_errors(nemo: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except _DAMAGED as error:
        raise _refused(nemo, f"The .nemo file cannot be read: {error}"[:500]) from error


def _refused(nemo: Path, what: str) -> CheckpointError:
    return CheckpointError(
        what, where=str(nemo), next_step="Check that it is a NeMo checkpoint, and download or copy it again."
    )
