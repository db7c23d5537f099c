"""GGUF file -> Hugging Face checkpoint. transformers reads the weights; what it leaves out is added and checked here.

transformers initializes tensors that a GGUF file lacks at random, skips those that it does not know, and
drops Llama 3.1's rope scaling, all in silence. None of that may pass.
Memory: about twice the model in fp32.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemo_minitron.errors import CheckpointError
from nemo_minitron.families import ModelShape, parameters, read_shape, tensor_shape
from nemo_minitron.families.hf_config import FAMILIES
from nemo_minitron.hf.checkpoint import CheckpointWriter
from nemo_minitron.hf.gguf_scan import require_sound_header
from nemo_minitron.hf.gguf_tokenizer import save_tokenizer

ROPE_FACTORS = "rope_freqs.weight"
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
ARCHITECTURES = ("llama", "qwen2", "qwen3", "nemotron")


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself."""

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


def convert_gguf(file: Path, out_dir: Path, dtype: Any) -> str | None:
    """Dequantize a GGUF model into `out_dir`: weights, config, generation config, tokenizer, chat template.

    Args:
        dtype: torch dtype to write; None writes fp32, which every GGUF type expands into exactly.

    Returns:
        The licence that the file declares, or None.

    Raises:
        CheckpointError: damaged file, or an architecture, rope scaling or tokenizer that is not supported.
    """
    header = read_header(file)
    _refuse_unsupported(header, file)
    config_object = _load_config(file, header)
    config = _config(config_object)
    shape = read_shape(config, where=str(file))
    _require_tensors(header, shape, file)
    model = _load_model(file, config_object)
    state = model.state_dict()
    writer = CheckpointWriter(out_dir, config, dtype=dtype)
    for parameter in parameters(shape):
        writer.add(parameter.hf, state[parameter.hf])
    writer.close()
    if model.generation_config is not None:
        model.generation_config.save_pretrained(out_dir)
    save_tokenizer(header.fields, file, out_dir)
    license_id = header.fields.get("general.license")
    return str(license_id) if license_id else None


def read_header(file: Path) -> Header:
    """Keys and tensor names; the whole file is there.

    Raises:
        CheckpointError: not a GGUF file, damaged, or cut off.
    """
    from gguf import GGUFReader

    try:
        require_sound_header(file)
        reader = GGUFReader(str(file))
        end = max(tensor.data_offset + tensor.n_bytes for tensor in reader.tensors)
        factors = next((t.data for t in reader.tensors if t.name == ROPE_FACTORS), None)
        header = Header(
            fields={key: field.contents() for key, field in reader.fields.items()},
            tensors={tensor.name: tuple(map(int, reversed(tensor.shape))) for tensor in reader.tensors},
            rope_factors=None if factors is None else tuple(np.asarray(factors, dtype=np.float64).tolist()),
        )
    # The reader trusts the file: damage shows as whatever goes wrong first.
    except Exception as error:
        raise _damaged(file, error) from error
    if end > file.stat().st_size:
        raise _damaged(file, f"{file.stat().st_size:,} bytes of at least {int(end):,}")
    return header


def _refuse_unsupported(header: Header, file: Path) -> None:
    if header.architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"GGUF architecture {header.architecture} is not supported.",
            where=str(file),
            allowed=", ".join(ARCHITECTURES),
        )
    scaling = header.of_architecture("rope.scaling.type")
    if scaling not in (None, "none"):
        raise CheckpointError(
            f"Rope scaling {scaling!r} is not supported.", where=str(file), allowed="none, or Llama 3.1's"
        )
    layers = {name.split(".")[1] for name in header.tensors if name.startswith("blk.")}
    if header.of_architecture("block_count") != len(layers):
        raise _damaged(file, f"block_count is {header.of_architecture('block_count')}, there are {len(layers)} blocks")


def _load_config(file: Path, header: Header) -> Any:
    from transformers import AutoConfig

    with _reading(file):
        return AutoConfig.from_pretrained(
            str(file.parent), gguf_file=file.name, **_left_out_by_transformers(header, file)
        )


def _load_model(file: Path, config: Any) -> Any:
    """The model in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    with _reading(file):
        return loader.from_pretrained(str(file.parent), gguf_file=file.name, config=config, dtype=torch.float32)


def _left_out_by_transformers(header: Header, file: Path) -> dict[str, Any]:
    """Keys of config.json that transformers does not read from GGUF."""
    extra: dict[str, Any] = {}
    head_dim = header.of_architecture("attention.key_length")
    if head_dim is not None and header.architecture != "qwen2":
        extra["head_dim"] = int(head_dim)
    if header.rope_factors is not None:
        extra["rope_scaling"] = _llama3_rope(header, header.rope_factors, file)
    if header.architecture == "nemotron" and head_dim is not None:
        extra["partial_rotary_factor"] = header.of_architecture("rope.dimension_count") / head_dim
    return extra


def _llama3_rope(header: Header, factors: tuple[float, ...], file: Path) -> dict[str, Any]:
    """The rope_scaling whose factors these are.

    Raises:
        CheckpointError: no Llama 3.1 scaling gives these factors.
    """
    theta, factor = float(header.of_architecture("rope.freq_base") or 10000.0), max(factors)
    if not np.allclose(factors, llama3_factors(len(factors), theta, factor), rtol=1e-4):
        raise CheckpointError(
            "The rope scaling factors are not Llama 3.1's.",
            where=f"{file}, tensor {ROPE_FACTORS}",
            next_step="Import the model from its Hugging Face folder instead.",
        )
    return {**LLAMA3_ROPE, "factor": factor}


def llama3_factors(num_frequencies: int, theta: float, factor: float) -> list[float]:
    """By how much Llama 3.1 slows each rotary frequency down (Llama 3.1's published code).

    Wavelengths below 8192 / 4 tokens stay, those above 8192 / 1 are stretched by `factor`, in between is blended.
    """
    original = float(LLAMA3_ROPE["original_max_position_embeddings"])  # type: ignore[arg-type]
    out = []
    for index in range(num_frequencies):
        wavelength = 2 * math.pi * theta ** (index / num_frequencies)
        smooth = min(max((original / wavelength - 1.0) / (4.0 - 1.0), 0.0), 1.0)
        out.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return out


def _config(config_object: Any) -> dict[str, Any]:
    """config.json; GGUF stores fp32, so 1e-5 comes back as 9.99...e-06 and is written short again."""
    config = {key: value for key, value in json.loads(config_object.to_json_string()).items() if key[0] != "_"}
    config["architectures"] = [name for name, family in FAMILIES.items() if family == config["model_type"]]
    for key, value in config.items():
        if isinstance(value, float):
            config[key] = float(str(np.float32(value)))
    return config


def _require_tensors(header: Header, shape: ModelShape, file: Path) -> None:
    """Every parameter is in the file with its dimensions, and nothing else is: checked before anything is loaded."""
    import gguf

    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, header.architecture.upper()), shape.num_layers)
    expected = {
        str(names.get_name(parameter.hf, try_suffixes=(".weight", ".bias"))): tensor_shape(shape, parameter.row)
        for parameter in parameters(shape)
    }
    found = {name: dims for name, dims in header.tensors.items() if name != ROPE_FACTORS}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"Tensor {name} of the GGUF file has shape {_dims(found.get(name))}; "
                f"a model of its architecture and sizes has {_dims(expected.get(name))}.",
                where=str(file),
                next_step="Download the file again, or import the model from its Hugging Face folder.",
            )


def _dims(dims: tuple[int, ...] | None) -> str:
    return "(none: it is not there)" if dims is None else str(list(dims))


def _damaged(file: Path, why: object) -> CheckpointError:
    return CheckpointError(
        f"The GGUF file cannot be read: {why}",
        where=str(file),
        next_step="Download it again (assets: `minitron assets fetch NAME` checks the sha256).",
    )


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Let transformers read the file; it prints a bar and hints that mean nothing here."""
    import transformers.modeling_gguf_pytorch_utils as gguf_utils

    logger = logging.getLogger("transformers")
    level, bar = logger.level, vars(gguf_utils)["tqdm"]
    logger.setLevel(logging.ERROR)
    vars(gguf_utils)["tqdm"] = lambda items, **_: items
    try:
        yield
    except Exception as error:  # as in read_header
        raise _damaged(file, error) from error
    finally:
        vars(gguf_utils)["tqdm"] = bar
        logger.setLevel(level)
