"""Write a tiny Hugging Face folder as the GGUF file that llama.cpp's converter would make of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from nemo_minitron.families import read_shape


def tiny_gguf(
    model_dir: Path,
    file: Path,
    *,
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    leave_out: tuple[str, ...] = (),
    pre: str = "gpt-2",
    rope_factors: list[float] | None = None,
    without: tuple[str, ...] = (),
    **fields: Any,
) -> Path:
    """Write the GGUF file of a folder.

    Args:
        quantization: type of the matrices; norms and biases stay fp32.
        leave_out: Hugging Face names of tensors that are not written.
        pre: tokenizer.ggml.pre.
        without: keys that are not written.
        fields: further keys, or other values of keys, with `__` for a dot.
    """
    config = json.loads((model_dir / "config.json").read_text())
    writer = gguf.GGUFWriter(str(file), arch := _architecture(config))
    _sizes(writer, config)
    _tokenizer(writer, model_dir, pre)
    for key in without:
        del writer.kv_data[0][key]
    _fields(writer, fields)
    _tensors(writer, model_dir, config, arch, quantization, leave_out)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", np.array(rope_factors, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _architecture(config: dict[str, Any]) -> str:
    # llama.cpp has no architecture of its own for Mistral.
    return "llama" if config["model_type"] == "mistral" else str(config["model_type"])


def _fields(writer: gguf.GGUFWriter, fields: dict[str, Any]) -> None:
    add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
    for key, value in fields.items():
        name = key.replace("__", ".")
        writer.kv_data[0].pop(name, None)
        add[type(value)](name, value)


def _sizes(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    shape = read_shape(config)
    writer.add_license("mit")
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.ffn_hidden_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_query_groups)
    writer.add_key_length(shape.kv_channels)
    writer.add_rope_dimension_count(int(shape.kv_channels * shape.rotary_fraction))
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_vocab_size(shape.vocab_size)


def _tokenizer(writer: gguf.GGUFWriter, model_dir: Path, pre: str) -> None:
    document = json.loads((model_dir / "tokenizer.json").read_text())
    vocab = {**document["model"]["vocab"], **{token["content"]: token["id"] for token in document["added_tokens"]}}
    size = json.loads((model_dir / "config.json").read_text())["vocab_size"]
    tokens = {index: token for token, index in vocab.items()}
    special = {token["content"] for token in document["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([tokens.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_types(
        [5 if index not in tokens else 3 if tokens[index] in special else 1 for index in range(size)]
    )
    writer.add_token_merges([" ".join(merge) for merge in document["model"]["merges"]])
    writer.add_bos_token_id(vocab["<|im_start|>"])
    writer.add_eos_token_id(vocab["<|im_end|>"])
    writer.add_pad_token_id(vocab["<|endoftext|>"])
    writer.add_chat_template((model_dir / "chat_template.jinja").read_text())


def _tensors(
    writer: gguf.GGUFWriter,
    model_dir: Path,
    config: dict[str, Any],
    arch: str,
    quantization: gguf.GGMLQuantizationType,
    leave_out: tuple[str, ...],
) -> None:
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), 16)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in load_file(model_dir / "model.safetensors").items():
        if name in leave_out:
            continue
        part = name.split(".")[-2]
        values = tensor.float().numpy()
        if arch == "llama" and part in heads:
            values = _interleaved(values, heads[part])
        if arch == "nemotron" and name.endswith("norm.weight"):
            values = values + 1.0
        stored = gguf.quants.quantize(values, quantization) if tensor.dim() == 2 else values
        raw = quantization if tensor.dim() == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(str(names.get_name(name, try_suffixes=(".weight", ".bias"))), stored, raw_dtype=raw)


def _interleaved(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """llama.cpp rotates neighbours, transformers halves: row i of a half becomes row 2i or 2i + 1."""
    halves = torch.from_numpy(weight).unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2).contiguous().numpy()
