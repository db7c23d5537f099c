"""Header of a GGUF file: its keys and tensors, and the check that it describes a model that can be imported."""

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
    """Contents of the header of a GGUF file."""

    file: Path
    fields: Mapping[str, Any]
    """Key -> value."""
    tensors: Mapping[str, tuple[int, ...]]
    """Name -> dimensions in torch's order."""
    rope_factors: tuple[float, ...] | None
    """Divisor of each rotary frequency (Llama 3.1 and later)."""

    @property
    def architecture(self) -> str:
        return str(self.fields.get("general.architecture"))

    def of_architecture(self, key: str) -> Any:
        """Return the value of an architecture's key such as `llama.rope.freq_base`, or None."""
        return self.fields.get(f"{self.architecture}.{key}")

    def number(self, key: str) -> float | None:
        """Return the number of an architecture's key such as `llama.rope.freq_base`, or None.

        Raises:
            CheckpointError: the value is not a finite number.
        """
        value = self.of_architecture(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not np.isfinite(float(value)):
            raise CheckpointError(f"{self.architecture}.{key} = {value!r} is not a number.", where=str(self.file))
        return float(value)


def read_header(file: Path) -> Header:
    """Read the header, and check that the file contains the data of all tensors.

    Raises:
        CheckpointError: the file is not a GGUF file, has an unsupported version or type, is damaged or truncated.
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
    # The reader does not validate the file, so damage can cause any exception.
    except Exception as error:
        raise damaged_gguf(file, error) from error


def _require_data(tensors: Sequence[TensorInfo], file: Path) -> None:
    """Check that the file contains the data of every tensor, in types that can be dequantized."""
    size = file.stat().st_size
    blocks = {info.kind: _block(info, file) for info in {info.kind: info for info in tensors}.values()}
    for info in tensors:
        num_values, num_bytes = blocks[info.kind]
        end = info.start + info.num_values // num_values * num_bytes
        if end > size:
            raise damaged_gguf(file, f"it has {size:,} bytes and needs at least {end:,}")


def _block(tensor: TensorInfo, file: Path) -> tuple[int, int]:
    """Return the number of values and of bytes in a block of the tensor's type."""
    import gguf

    label = f"number {tensor.kind}"
    try:
        kind = gguf.GGMLQuantizationType(tensor.kind)
        label = kind.name
        num_values, num_bytes = gguf.GGML_QUANT_SIZES[kind]
        gguf.quants.dequantize(np.zeros((1, num_bytes), dtype=np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise CheckpointError(
            f"Tensor {tensor.name} has the type {label}, which the installed gguf package cannot dequantize.",
            where=str(file),
            next_step="Use another quantization of the model (F16, BF16, Q8_0, Q4_K_M), or update the gguf package.",
        ) from error
    return num_values, num_bytes


def require_model(header: Header) -> None:
    """Check that the file contains a complete model of a supported architecture.

    Raises:
        CheckpointError: the file is a part of a split file, an adapter, a projector or a vocabulary, or its
            architecture is not supported.
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
            "The GGUF file contains only a vocabulary and no tensors.",
            where=str(header.file),
            next_step="Use the file that contains the model's weights.",
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
            "The GGUF file contains an adapter (LoRA), but no model.",
            where=str(header.file),
            next_step="Merge it with its base model first (llama.cpp: llama-export-lora), and use the merged model.",
        )
    if kind == "mmproj" or header.architecture == "clip":
        raise CheckpointError(
            "The GGUF file contains the projector of a multimodal model, but no language model.",
            where=str(header.file),
            next_step="Use the file of the language model.",
        )
    if kind != "model":
        raise CheckpointError(f"The GGUF file is of type {kind!r}.", where=str(header.file), allowed="model")


def damaged_gguf(file: Path, why: object) -> CheckpointError:
    """Return the error for a GGUF file that is truncated or inconsistent."""
    return CheckpointError(
        f"The GGUF file cannot be read: {shortened(why)}",
        where=str(file),
        next_step="Compare its size and sha256 with those of the source, and download it again if they differ.",
    )
