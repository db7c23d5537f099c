"""The header of a GGUF file: keys, tensors, and whether it describes a model that can be imported."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemo_minitron.errors import CheckpointError, shortened
from nemo_minitron.hf.gguf_parts import refuse_part
from nemo_minitron.hf.gguf_scan import TensorInfo, scan_header

ROPE_FACTORS = "rope_freqs.weight"
ARCHITECTURES = ("llama", "qwen2", "qwen3", "nemotron")
FROM_FOLDER = "Import the model from its Hugging Face folder instead."


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself."""

    file: Path
    fields: Mapping[str, Any]
    """Key -> value."""
    tensors: Mapping[str, tuple[int, ...]]
    """Name -> dimensions, in torch's order."""
    rope_factors: tuple[float, ...] | None
    """Llama 3.1 and later: by how much each rotary frequency is slowed down."""

    @property
    def architecture(self) -> str:
        return str(self.fields.get("general.architecture"))

    def of_architecture(self, key: str) -> Any:
        """A value such as `llama.rope.freq_base`, or None."""
        return self.fields.get(f"{self.architecture}.{key}")

    def number(self, key: str) -> float | None:
        """A number such as `llama.rope.freq_base`, or None.

        Raises:
            CheckpointError: the key has a value of another type, or no finite one.
        """
        value = self.of_architecture(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not np.isfinite(float(value)):
            raise CheckpointError(f"{self.architecture}.{key} = {value!r} is not a number.", where=str(self.file))
        return float(value)


def read_header(file: Path) -> Header:
    """Keys and tensor names; the whole file is there.

    Raises:
        CheckpointError: not a GGUF file, another version, a type that cannot be read, damaged, or cut off.
    """
    from gguf import GGUFReader

    try:
        _require_data(scan_header(file), file)
        reader = GGUFReader(str(file))
        factors = next((t.data for t in reader.tensors if t.name == ROPE_FACTORS), None)
        return Header(
            file=file,
            fields={key: field.contents() for key, field in reader.fields.items()},
            tensors={tensor.name: tuple(map(int, reversed(tensor.shape))) for tensor in reader.tensors},
            rope_factors=None if factors is None else tuple(np.asarray(factors, dtype=np.float64).ravel().tolist()),
        )
    except CheckpointError:
        raise
    # The reader trusts the file: damage shows as whatever goes wrong first.
    except Exception as error:
        raise damaged_gguf(file, error) from error


def _require_data(tensors: Sequence[TensorInfo], file: Path) -> None:
    """The file holds the data of every tensor, in types that can be expanded."""
    size = file.stat().st_size
    blocks = {info.kind: _block(info, file) for info in {info.kind: info for info in tensors}.values()}
    for info in tensors:
        num_values, num_bytes = blocks[info.kind]
        end = info.start + info.num_values // num_values * num_bytes
        if end > size:
            raise damaged_gguf(file, f"{size:,} bytes of at least {end:,}")


def _block(tensor: TensorInfo, file: Path) -> tuple[int, int]:
    """(values, bytes) of a block of the tensor's type."""
    import gguf

    label = f"number {tensor.kind}"
    try:
        kind = gguf.GGMLQuantizationType(tensor.kind)
        label = kind.name
        num_values, num_bytes = gguf.GGML_QUANT_SIZES[kind]
        gguf.quants.dequantize(np.zeros((1, num_bytes), dtype=np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise CheckpointError(
            f"Tensor {tensor.name} has the type {label}, which the installed gguf package cannot expand.",
            where=str(file),
            next_step="Take another quantization of the model (F16, BF16, Q8_0, Q4_K_M), or update the gguf package.",
        ) from error
    return num_values, num_bytes


def require_model(header: Header) -> None:
    """The file holds a whole model of an architecture that is supported.

    Raises:
        CheckpointError: a part of a split file, an adapter, a projector, a vocabulary, or another architecture.
    """
    refuse_part(header.fields, header.file)
    _require_kind(header)
    if header.architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"GGUF architecture {header.architecture} is not supported.",
            where=str(header.file),
            allowed=", ".join(ARCHITECTURES),
        )
    if not header.tensors:
        raise CheckpointError(
            "The GGUF file holds a vocabulary only, and no tensors.",
            where=str(header.file),
            next_step="Give the file that holds the model's weights.",
        )
    if header.number("expert_count"):
        raise CheckpointError(
            f"The model is a mixture of {header.number('expert_count'):.0f} experts, which is not supported.",
            where=str(header.file),
        )
    layers = {name.split(".")[1] for name in header.tensors if name.startswith("blk.")}
    if header.of_architecture("block_count") != len(layers):
        raise damaged_gguf(
            header.file, f"block_count is {header.of_architecture('block_count')}, there are {len(layers)} blocks"
        )


def _require_kind(header: Header) -> None:
    kind = header.fields.get("general.type", "model")
    if kind == "adapter" or any(name.endswith((".lora_a", ".lora_b")) for name in header.tensors):
        raise CheckpointError(
            "The GGUF file holds an adapter (LoRA), and no model.",
            where=str(header.file),
            next_step="Merge it with its base model first (llama.cpp: llama-export-lora), or give the merged model.",
        )
    if kind == "mmproj" or header.architecture == "clip":
        raise CheckpointError(
            "The GGUF file holds the projector of a multimodal model, and no language model.",
            where=str(header.file),
            next_step="Give the file of the language model beside it.",
        )
    if kind != "model":
        raise CheckpointError(f"The GGUF file is of type {kind!r}.", where=str(header.file), allowed="model")


def damaged_gguf(file: Path, why: object) -> CheckpointError:
    """The error for a GGUF file that is cut off, or whose contents contradict each other."""
    return CheckpointError(
        f"The GGUF file cannot be read: {shortened(why)}",
        where=str(file),
        next_step="Compare its size and sha256 with the source's, and download it again if they differ.",
    )
