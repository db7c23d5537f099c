"""Conversion of weights: Hugging Face checkpoint <-> files with whole tensors under Megatron's names."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from nemo_minitron.families import ModelShape, Parameter, parameters
from nemo_minitron.hf.checkpoint import Checkpoint, CheckpointWriter, copy_side_files


def write_megatron_tensors(model_dir: Path, out: Path) -> ModelShape:
    """Write one safetensors file for each tensor of the Megatron model; only one tensor is in memory at a time."""
    from safetensors.torch import save_file

    from nemo_minitron.backends.megatron.runtime.layout import fuse

    checkpoint = Checkpoint.open(model_dir)
    out.mkdir(parents=True, exist_ok=True)
    for number, (name, group) in enumerate(_by_megatron_name(checkpoint.shape)):
        parts = {parameter.row.part: checkpoint.read(parameter.hf) for parameter in group}
        whole = parts[None] if None in parts else fuse({str(part): t for part, t in parts.items()}, checkpoint.shape)
        save_file({name: whole.contiguous()}, str(out / f"{number:05d}.safetensors"))
    return checkpoint.shape


def read_megatron_tensors(folder: Path, like: Path, out: Path) -> None:
    """Write a Hugging Face checkpoint from such files, with the config, tokenizer and tensor names of `like`."""
    from safetensors import safe_open

    from nemo_minitron.backends.megatron.runtime.layout import split

    source = Checkpoint.open(like)
    shape = source.shape
    files: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as tensors:
            files.update(dict.fromkeys(tensors.keys(), file))
    writer = CheckpointWriter(out, source.config)
    for parameter in parameters(shape):
        name = parameter.megatron
        with safe_open(str(files[name]), framework="pt") as tensors:
            whole = tensors.get_tensor(name)
        part = whole if parameter.row.part is None else split(whole, parameter.row.part, shape)
        if "vocab" in parameter.row.axes:
            part = part[: shape.vocab_size]  # Megatron's padding
        writer.add(parameter.hf, part.contiguous())
    writer.close()
    copy_side_files(like, out)


def _by_megatron_name(shape: ModelShape) -> Iterator[tuple[str, list[Parameter]]]:
    ordered = sorted(parameters(shape), key=lambda parameter: parameter.megatron)
    for name, group in groupby(ordered, key=lambda parameter: parameter.megatron):
        yield name, list(group)
