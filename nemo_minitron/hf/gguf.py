"""Conversion of GGUF files to Hugging Face checkpoints. The gguf package dequantizes the weights.

The GGUF reader of transformers is not used. Without any warning, it initializes missing tensors at random, skips
unknown ones and drops Llama 3.1's rope scaling. Its versions also fill in different config keys, and from version 5 on
the weights of some architectures stay quantized.
Memory: one tensor in fp32 plus the buffer of `CheckpointWriter`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.errors import CheckpointError
from nemo_minitron.families import ModelShape, explicit_config, parameters, read_shape, tensor_shape
from nemo_minitron.hf.checkpoint import CheckpointWriter
from nemo_minitron.hf.gguf_header import FROM_FOLDER, ROPE_FACTORS, Header, damaged_gguf, read_header, require_model
from nemo_minitron.hf.gguf_rope import rope_config
from nemo_minitron.hf.gguf_tokenizer import save_tokenizer
from nemo_minitron.hf.json_file import write_json

if TYPE_CHECKING:
    import torch

_SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_OPTIONAL = {
    "context_length": "max_position_embeddings",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
}
"""GGUF key -> config.json key, for keys that a file may lack; `_SIZES` are required."""
_EPS_KEYS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
"""GGUF keys of the normalization epsilon; llama.cpp's converter writes the second one for Nemotron."""
_TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def convert_gguf(file: Path, out_dir: Path, dtype: torch.dtype | None) -> str | None:
    """Convert a GGUF model into a model folder: weights, config, generation config, tokenizer, chat template.

    Args:
        dtype: torch dtype to write; None writes fp32, which represents every GGUF type exactly.

    Returns:
        The license that the file declares, or None.

    Raises:
        CheckpointError: the file is damaged, or its architecture, rope scaling or tokenizer is not supported.
    """
    header = read_header(file)
    require_model(header)
    tokens = _token_ids(header)
    config = explicit_config({**_config(header), **tokens}, where=str(file))
    shape = read_shape(config, where=str(file))
    _require_tensors(header, shape, file)
    save_tokenizer(header.fields, file, out_dir)
    _write_weights(header, shape, CheckpointWriter(out_dir, config, dtype=dtype))
    write_json(out_dir / "generation_config.json", tokens)
    license_id = header.fields.get("general.license")
    return str(license_id) if license_id else None


def _config(header: Header) -> dict[str, Any]:
    """Return the config.json keys that the header of the file determines."""
    config: dict[str, Any] = {"model_type": header.architecture, **rope_config(header)}
    for key, name in {**_SIZES, **_OPTIONAL}.items():
        value = header.number(key)
        if value is not None:
            config[name] = int(value) if value.is_integer() else value
        elif key in _SIZES:
            raise _missing(header, key)
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    theta = header.number("rope.freq_base")
    if theta is not None:
        config["rope_theta"] = _short(theta)
    eps = [value for key in _EPS_KEYS if (value := header.number(key)) is not None]
    if not eps:
        raise _missing(header, _EPS_KEYS[0])
    config["norm_eps" if header.architecture == "nemotron" else "rms_norm_eps"] = _short(eps[0])
    config["vocab_size"] = header.of_architecture("vocab_size") or len(header.fields.get("tokenizer.ggml.tokens", ()))
    return {**config, "tie_word_embeddings": "output.weight" not in header.tensors}


def _missing(header: Header, key: str) -> CheckpointError:
    return CheckpointError(
        f"The GGUF file has no key {header.architecture}.{key}.", where=str(header.file), next_step=FROM_FOLDER
    )


def _short(value: float) -> float:
    """Round an fp32 value to its shortest decimal form: GGUF stores fp32, so 1e-5 is read as 9.99...e-06."""
    return float(str(np.float32(value)))


def _token_ids(header: Header) -> dict[str, Any]:
    found = {key: header.fields.get(f"tokenizer.ggml.{name}_token_id") for key, name in _TOKENS.items()}
    return {key: value for key, value in found.items() if value is not None}


def _tensor_names(header: Header, shape: ModelShape) -> dict[str, str]:
    """Return Hugging Face name -> GGUF name of every parameter."""
    import gguf

    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, header.architecture.upper()), shape.num_layers)
    return {one.hf: str(names.get_name(one.hf, try_suffixes=(".weight", ".bias"))) for one in parameters(shape)}


def _require_tensors(header: Header, shape: ModelShape, file: Path) -> None:
    """Check, before anything is loaded, that the file contains exactly the parameters with their dimensions."""
    names = _tensor_names(header, shape)
    expected = {names[parameter.hf]: tensor_shape(shape, parameter.row) for parameter in parameters(shape)}
    found = {name: dims for name, dims in header.tensors.items() if name != ROPE_FACTORS}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"Tensor {name} of the GGUF file has shape {_dims(found.get(name))}; "
                f"a model of its architecture and sizes has {_dims(expected.get(name))}.",
                where=str(file),
                next_step=FROM_FOLDER,
            )


def _dims(dims: tuple[int, ...] | None) -> str:
    return "(none: no such tensor)" if dims is None else str(list(dims))


def _write_weights(header: Header, shape: ModelShape, writer: CheckpointWriter) -> None:
    import gguf
    import torch

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(str(header.file)).tensors}
    for hf_name, name in _tensor_names(header, shape).items():
        try:
            values = gguf.quants.dequantize(stored[name].data, stored[name].tensor_type)
            values = np.array(_as_in_torch(values, name, header, shape), dtype=np.float32)
        except MemoryError:
            raise
        except Exception as error:  # any error of the gguf package: the header is valid, but the data may be damaged
            raise damaged_gguf(header.file, error) from error
        writer.add(hf_name, torch.from_numpy(values))
    writer.close()


def _as_in_torch(values: NDArray[Any], name: str, header: Header, shape: ModelShape) -> NDArray[Any]:
    """Undo the changes of llama.cpp's converter to norms (Nemotron) and to query and key weights (Llama)."""
    if header.architecture == "nemotron" and name.endswith("norm.weight"):
        return values - 1.0
    heads = {"attn_q": shape.num_attention_heads, "attn_k": shape.num_query_groups}.get(name.split(".")[-2])
    if header.architecture != "llama" or heads is None:
        return values
    # llama.cpp rotates adjacent rows, transformers the two halves of a head: row 2i or 2i + 1 becomes row i of a half.
    return values.reshape(heads, -1, 2, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
