"""GGUF file -> Hugging Face checkpoint. The gguf package expands the weights; all else is read and checked here.

transformers has a reader of its own. It is not asked: it initializes tensors that a file lacks at random, skips those
that it does not know, and drops Llama 3.1's rope scaling, all in silence; its versions fill in other keys of the
config, and from 5 on some architectures come back with their weights still packed.
Memory: one tensor in fp32, and what `CheckpointWriter` holds.
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
"""GGUF's key -> that of config.json."""
_EPS_KEYS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
"""llama.cpp's converter writes the second for Nemotron."""
_TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def convert_gguf(file: Path, out_dir: Path, dtype: torch.dtype | None) -> str | None:
    """Dequantize a GGUF model into `out_dir`: weights, config, generation config, tokenizer, chat template.

    Args:
        dtype: torch dtype to write; None writes fp32, which every GGUF type expands into exactly.

    Returns:
        The licence that the file declares, or None.

    Raises:
        CheckpointError: damaged file, or an architecture, rope scaling or tokenizer that is not supported.
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
    """The keys of config.json that the file has a word for."""
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
    """GGUF stores fp32, so 1e-5 comes back as 9.99...e-06 and is written short again."""
    return float(str(np.float32(value)))


def _token_ids(header: Header) -> dict[str, Any]:
    found = {key: header.fields.get(f"tokenizer.ggml.{name}_token_id") for key, name in _TOKENS.items()}
    return {key: value for key, value in found.items() if value is not None}


def _tensor_names(header: Header, shape: ModelShape) -> dict[str, str]:
    """Hugging Face's name -> GGUF's, for every parameter."""
    import gguf

    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, header.architecture.upper()), shape.num_layers)
    return {one.hf: str(names.get_name(one.hf, try_suffixes=(".weight", ".bias"))) for one in parameters(shape)}


def _require_tensors(header: Header, shape: ModelShape, file: Path) -> None:
    """Every parameter is in the file with its dimensions, and nothing else is: checked before anything is loaded."""
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
    return "(none: it is not there)" if dims is None else str(list(dims))


def _write_weights(header: Header, shape: ModelShape, writer: CheckpointWriter) -> None:
    import gguf
    import torch

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(str(header.file)).tensors}
    for hf_name, name in _tensor_names(header, shape).items():
        try:
            values = gguf.quants.dequantize(stored[name].data, stored[name].tensor_type)
            values = np.array(_as_in_torch(values, name, header, shape), dtype=np.float32)
        except Exception as error:  # of the gguf package: the header is sound, but the data may be anything
            raise damaged_gguf(header.file, error) from error
        writer.add(hf_name, torch.from_numpy(values))
    writer.close()


def _as_in_torch(values: NDArray[Any], name: str, header: Header, shape: ModelShape) -> NDArray[Any]:
    """Undo what llama.cpp's converter does to some tensors."""
    if header.architecture == "nemotron" and name.endswith("norm.weight"):
        return values - 1.0
    heads = {"attn_q": shape.num_attention_heads, "attn_k": shape.num_query_groups}.get(name.split(".")[-2])
    if header.architecture != "llama" or heads is None:
        return values
    # It rotates neighbours, transformers halves: row 2i or 2i + 1 of a head becomes row i of a half.
    return values.reshape(heads, -1, 2, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
