"""Conversions for `minitron convert`: a Hugging Face folder to a NeMo checkpoint (folder or .nemo file), and back."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import yaml

from nemo_minitron.backends.alignment.nemo_aligner import convert
from nemo_minitron.backends.alignment.nemo_aligner.environment import aligner_python, has_gpu_kernels
from nemo_minitron.backends.alignment.nemo_aligner.unpack import CONFIG_FILE, model_config, unpacked
from nemo_minitron.errors import CheckpointError
from nemo_minitron.hf.checkpoint import Checkpoint
from nemo_minitron.system.interrupts import StopRequest
from nemo_minitron.system.progress import Progress

TOKENIZER_DIR, SUFFIX = "tokenizer", ".nemo"


def from_hugging_face(
    model: Path, out: Path, work: Path, progress: Progress, stop: StopRequest, *, final: Path | None = None
) -> None:
    """Write a NeMo checkpoint with its tokenizer in the subfolder `tokenizer`, which the config names by its path.

    Args:
        final: path to which the caller moves `out` afterwards; None: it stays there.

    Raises:
        CheckpointError: `out` exists, or the model is damaged.
        ConfigError: NeMo does not support this model.
    """
    _require_new(out)
    built = work / "nemo"
    shape = Checkpoint.open(model).shape
    convert.to_nemo(
        model,
        built,
        work / "border",
        work / "log.txt",
        progress,
        stop,
        seq_len_tokens=min(shape.max_position_embeddings, 4096),
        on_cpu=not (_has_cuda() and has_gpu_kernels(aligner_python())),
    )
    (work / "nemo.tokenizer").rename(built / TOKENIZER_DIR)
    target = out.absolute()
    home = _without_suffix(target)
    config = yaml.safe_load((built / CONFIG_FILE).read_text())
    config["tokenizer"]["type"] = str(_without_suffix(final or target) / TOKENIZER_DIR)
    (built / CONFIG_FILE).write_text(yaml.safe_dump(config))
    if target.suffix == SUFFIX:
        whole = work / target.name
        with tarfile.open(whole, "w") as archive:
            archive.add(built, arcname=".")
        shutil.copytree(built / TOKENIZER_DIR, home / TOKENIZER_DIR, dirs_exist_ok=True)
        shutil.move(whole, target)
    else:
        shutil.move(built, target)


def to_hugging_face(nemo: Path, like: Path, out: Path, work: Path, progress: Progress, stop: StopRequest) -> None:
    """Convert the language model of a NeMo checkpoint, with the config, dtype and tokenizer of `like`.

    Raises:
        CheckpointError: `out` exists, or one of the inputs cannot be read.
    """
    _require_new(out)
    folder = unpacked(nemo, work)
    config = model_config(folder, nemo, Checkpoint.open(like).shape, like.absolute())
    building = work / "hf"
    building.mkdir()
    convert.from_nemo(folder, config, like, building, work / "border", work / "log.txt", progress, stop)
    shutil.move(building, out)


def _require_new(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise CheckpointError("The target already exists.", where=str(out), next_step="Choose a new name.")


def _without_suffix(target: Path) -> Path:
    return target.with_suffix("") if target.suffix == SUFFIX else target


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
