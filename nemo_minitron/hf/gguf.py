"""GGUF file -> Hugging Face checkpoint, through transformers' own reader."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_minitron.errors import CheckpointError
from nemo_minitron.families import parameters, read_shape
from nemo_minitron.hf.checkpoint import CheckpointWriter


def convert_gguf(file: Path, out_dir: Path, dtype: Any) -> str | None:
    """Dequantize a GGUF model into `out_dir`: weights, config, tokenizer, chat template.

    Args:
        dtype: torch dtype to write; None writes fp32, which every GGUF type expands into exactly.

    Returns:
        The licence that the file declares, or None.

    Raises:
        CheckpointError: damaged file, or an architecture that is not supported.
    """
    license_id = _read_header(file)
    model = _load_model(file)
    config = {key: value for key, value in json.loads(model.config.to_json_string()).items() if key[0] != "_"}
    config["architectures"] = [type(model).__name__]
    shape = read_shape(config, where=str(file))
    state = model.state_dict()
    writer = CheckpointWriter(out_dir, config, dtype=dtype)
    for parameter in parameters(shape):
        writer.add(parameter.hf, state[parameter.hf])
    writer.close()
    if model.generation_config is not None:
        model.generation_config.save_pretrained(out_dir)
    _save_tokenizer(file, out_dir)
    return license_id


def _read_header(file: Path) -> str | None:
    """Check that the whole file is there; return its licence."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(str(file))
        last = max(tensor.data_offset + tensor.n_bytes for tensor in reader.tensors)
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise _damaged(file, error) from error
    if last > file.stat().st_size:
        raise _damaged(file, f"{file.stat().st_size:,} bytes of at least {int(last):,}")
    field = reader.get_field("general.license")
    return str(field.contents()) if field else None


def _load_model(file: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with _quiet():
            return AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    except (ValueError, KeyError, IndexError, RuntimeError, OSError) as error:
        raise _damaged(file, error) from error


def _save_tokenizer(file: Path, out_dir: Path) -> None:
    from transformers import AutoTokenizer

    with _quiet(), tempfile.TemporaryDirectory() as scratch:
        # The slow-tokenizer file that transformers would save beside it is the whole GGUF again.
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        tokenizer.save_pretrained(scratch)
        for saved in Path(scratch).iterdir():
            if saved.name != "tokenizer.model":
                shutil.copyfile(saved, out_dir / saved.name)


def _damaged(file: Path, why: object) -> CheckpointError:
    return CheckpointError(
        f"The GGUF file cannot be read: {why}",
        where=str(file),
        next_step="Download it again (assets: `minitron assets fetch NAME` checks the sha256).",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers prints a bar and hints that mean nothing here."""
    from transformers.utils import logging as hf_logging

    verbosity = hf_logging.get_verbosity()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    import transformers.modeling_gguf_pytorch_utils as gguf_utils

    bar = gguf_utils.tqdm
    gguf_utils.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        gguf_utils.tqdm = bar
        hf_logging.enable_progress_bar()
        hf_logging.set_verbosity(verbosity)
