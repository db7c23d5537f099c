"""Error messages for folders that are not readable models: what the folder contains, and how to convert it."""

from __future__ import annotations

import json
from pathlib import Path

from nemo_minitron.errors import CheckpointError

_WEIGHTS, _INDEX, _CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_OTHER_FORMATS = {"*.h5": "TensorFlow's", "*.msgpack": "Flax's", "*.onnx": "ONNX", "*.npz": "NumPy's"}
_CONVERT = (
    "Convert the weights to safetensors first: if you trust the files, load the model with transformers "
    "and call save_pretrained(FOLDER)."
)
_MERGE = (
    "Merge the adapter with its base model first (peft: PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload()"
    ".save_pretrained(FOLDER)), and use that folder."
)


def no_config(path: Path) -> CheckpointError:
    """Return the error for a folder without config.json."""
    what, next_step = _adapter(path) or _without_config(path)
    return CheckpointError(what, where=str(path), next_step=next_step)


def no_weights(path: Path) -> CheckpointError:
    """Return the error for a folder with config.json but without model.safetensors and without its index."""
    what, next_step = (
        _adapter(path) or _other_case(path, _WEIGHTS, _INDEX) or _other_safetensors(path) or _other_formats(path)
    )
    return CheckpointError(what, where=str(path), next_step=next_step)


def _adapter(path: Path) -> tuple[str, str] | None:
    found = [name for name in ("adapter_model.safetensors", "adapter_model.bin") if (path / name).is_file()]
    if not found and not (path / "adapter_config.json").is_file():
        return None
    base = _base_of_adapter(path / "adapter_config.json")
    named = f" of {base}" if base else ""
    file = (found or ["adapter_config.json"])[0]
    return f"The folder contains an adapter (LoRA){named}, {file}, but no model.", _MERGE


def _base_of_adapter(file: Path) -> str | None:
    try:
        base = json.loads(file.read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return str(base) if base else None


def _other_case(path: Path, *names: str) -> tuple[str, str] | None:
    """Return the error for a file whose name differs from an expected one only in capitalization."""
    for file in _files(path):
        for name in names:
            if file.name != name and file.name.lower() == name:
                return f"There is {file.name}, but no {name}.", f"Rename it to {name}."
    return None


def _other_safetensors(path: Path) -> tuple[str, str] | None:
    names = sorted(file.name for file in _files(path) if file.name.lower().endswith(".safetensors"))
    shards = [name for name in names if "-of-" in name]
    if shards:
        return (
            f"There is {shards[0]}, but no {_INDEX}, which lists the shard of each tensor.",
            f"Download {_INDEX} of the same model into the folder.",
        )
    if names and all(name.startswith("consolidated") for name in names):
        return (
            f"{names[0]} contains the weights under the names of the original authors, not those of transformers.",
            f"Use the version for transformers: {_WEIGHTS}, or model-*.safetensors with {_INDEX}.",
        )
    if names:
        rest = names[0] if len(names) == 1 else "the one that contains the whole model"
        return f"There is {', '.join(names[:3])}, but no {_WEIGHTS}.", f"Rename {rest} to {_WEIGHTS}."
    return None


def _other_formats(path: Path) -> tuple[str, str]:
    nothing = f"There is neither {_WEIGHTS} nor {_INDEX}."
    for pattern in _PICKLED:
        if found := sorted(file.name for file in path.glob(pattern)):
            return f"{nothing} There are pickled weights ({pattern}), which are not supported: {found[0]}.", _CONVERT
    for pattern, whose in _OTHER_FORMATS.items():
        if found := sorted(file.name for file in path.glob(pattern)):
            return f"{nothing} {found[0]} is in {whose} format.", _CONVERT
    if [file for file in _files(path) if file.suffix.lower() == ".gguf"]:
        return f"{nothing} There is a .gguf file.", "Use the path of the .gguf file as the source."
    return nothing, (
        "Complete the download. From the hub only *.safetensors weights are downloaded: if the model has none, convert "
        "it, or download its .gguf file and use that."
    )


def _without_config(path: Path) -> tuple[str, str]:
    what = f"There is no {_CONFIG}: this is not a Hugging Face model folder."
    if case := _other_case(path, _CONFIG):
        return case
    inner = _inner_folder(path)
    if inner is not None:
        return f"{what} There is one in {inner.relative_to(path)}.", f"Use {inner}."
    if (path / "params.json").is_file() or [*path.glob("consolidated*")]:
        return (
            f"{what} It contains the original authors' format (params.json).",
            "Use the model's version for transformers.",
        )
    return what, "Use a folder with config.json and *.safetensors, a .gguf file, hf:ORG/NAME or asset:NAME."


def _inner_folder(path: Path) -> Path | None:
    """Return the only folder with a config.json at most two levels below, as snapshots/COMMIT in the hub's cache."""
    found = [file.parent for pattern in (f"*/{_CONFIG}", f"*/*/{_CONFIG}") for file in path.glob(pattern)]
    return found[0] if len(found) == 1 else None


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else []
