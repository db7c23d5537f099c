"""GGUF file -> Hugging Face checkpoint. transformers reads the weights; what it leaves out is added and checked here.

transformers initializes tensors that a GGUF file lacks at random, skips those that it does not know, and
drops Llama 3.1's rope scaling, all in silence. None of that may pass.
Memory: about twice the model in fp32.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from nemo_minitron.errors import CheckpointError
from nemo_minitron.families import ModelShape, explicit_config, parameters, read_shape, tensor_shape
from nemo_minitron.hf.checkpoint import CheckpointWriter
from nemo_minitron.hf.gguf_header import FROM_FOLDER, ROPE_FACTORS, Header, damaged_gguf, read_header, require_model
from nemo_minitron.hf.gguf_rope import rope_config
from nemo_minitron.hf.gguf_tokenizer import save_tokenizer

_EPS_KEYS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
"""llama.cpp's converter writes the second for Nemotron, which transformers does not read."""


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
    require_model(header)
    config_object = _load_config(file, header)
    config = explicit_config(_config(config_object), where=str(file))
    shape = read_shape(config, where=str(file))
    _require_tensors(header, shape, file)
    save_tokenizer(header.fields, file, out_dir)
    model = _load_model(file, config_object)
    state = model.state_dict()
    writer = CheckpointWriter(out_dir, config, dtype=dtype)
    for parameter in parameters(shape):
        writer.add(parameter.hf, state[parameter.hf])
    writer.close()
    if model.generation_config is not None:
        model.generation_config.save_pretrained(out_dir)
    license_id = header.fields.get("general.license")
    return str(license_id) if license_id else None


def _load_config(file: Path, header: Header) -> Any:
    from transformers import AutoConfig

    extra = _left_out_by_transformers(header)
    with _reading(file):
        return AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name, trust_remote_code=False, **extra)


def _load_model(file: Path, config: Any) -> Any:
    """The model in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    with _reading(file):
        return loader.from_pretrained(
            str(file.parent), gguf_file=file.name, config=config, dtype=torch.float32, trust_remote_code=False
        )


def _left_out_by_transformers(header: Header) -> dict[str, Any]:
    """Keys of config.json that transformers does not read from GGUF."""
    extra: dict[str, Any] = rope_config(header)
    head_dim = header.number("attention.key_length")
    if head_dim is not None and header.architecture != "qwen2":
        extra["head_dim"] = int(head_dim)
    found = [value for key in _EPS_KEYS if (value := header.number(key)) is not None]
    if not found:
        raise CheckpointError(
            f"The GGUF file has no key {header.architecture}.{_EPS_KEYS[0]}.",
            where=str(header.file),
            next_step=FROM_FOLDER,
        )
    extra["norm_eps" if header.architecture == "nemotron" else "rms_norm_eps"] = found[0]
    return extra


def _config(config_object: Any) -> dict[str, Any]:
    """config.json; GGUF stores fp32, so 1e-5 comes back as 9.99...e-06 and is written short again."""
    config = {key: value for key, value in json.loads(config_object.to_json_string()).items() if key[0] != "_"}
    config.pop("architectures", None)  # found by model_type
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
                next_step=FROM_FOLDER,
            )


def _dims(dims: tuple[int, ...] | None) -> str:
    return "(none: it is not there)" if dims is None else str(list(dims))


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
    except Exception as error:  # the file is sound, but its keys may hold anything
        raise damaged_gguf(file, error) from error
    finally:
        vars(gguf_utils)["tqdm"] = bar
        logger.setLevel(level)
