"""Resolution of model and text sources: asset:NAME, hf:ORG/NAME, or a path."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from nemo_minitron.errors import CheckpointError, EnvironmentProblem
from nemo_minitron.hf.asset_files import require_expected_files
from nemo_minitron.hf.gguf_parts import split_part
from nemo_minitron.hf.links import require_inside
from nemo_minitron.hf.side_files import TEMPLATES_DIR, is_side_file
from nemo_minitron.hf.weight_files import CONFIG_FILE, INDEX_FILE
from nemo_minitron.system.files import user_path

ASSET = "asset:"
HUB = "hf:"
_PACKAGE = Path(__file__).resolve().parents[1]
_TOY, _CHATS = _PACKAGE / "toy", _PACKAGE / "chats"
BUILT_IN = {
    "toy-llama": _TOY / "model",
    "toy-text": _TOY / "text.jsonl.zst",
    "toy-chats": _TOY / "chats.jsonl",
    "toy-pairs": _TOY / "pairs.jsonl",
    "gsm8k-train": _CHATS / "gsm8k_train.jsonl.zst",
    "fine-grained-pairs": _CHATS / "fine_grained_pairs.jsonl.zst",
    "fine-grained-rated": _CHATS / "fine_grained_rated.jsonl.zst",
    "oasst2-rated": _CHATS / "oasst2_rated.jsonl.zst",
    "instructions": _CHATS / "instructions.jsonl",
}
"""Assets that ship with the package. All others are fetched into the assets folder."""
HUB_FILES = (
    *("*.json", "*.safetensors", "*.model", "tokenizer.model.*", "*.tiktoken", "*.txt", "*.jinja"),
    *("README.md", "LICEN[CS]E*", "licen[cs]e*", "NOTICE*", "COPYING*", "USE_POLICY*"),
)
"""Patterns of files to download from the hub: no pickled weights and no code. `*` also matches subfolders."""


def asset_path(name: str, assets_dir: Path) -> Path:
    """Return the path of an asset, which need not exist."""
    return BUILT_IN.get(name, assets_dir / name)


def hub_copy(name: str, revision: str | None, assets_dir: Path) -> Path:
    """Return the path of a local copy of a hub model; `minitron bundle` puts it there for use without a network."""
    return assets_dir / "hub" / (name if revision is None else f"{name}@{quote(revision, safe='')}")


def source_path(source: str, assets_dir: Path) -> Path:
    """Return the path of a source that is not on the Hugging Face Hub; it may not exist."""
    if source.startswith(ASSET):
        return asset_path(source.removeprefix(ASSET), assets_dir)
    return user_path(source)


def source_folder(source: str, revision: str | None, assets_dir: Path) -> Path:
    """Return the local path of a model, which need not exist; for a hub model, its copy in the assets folder."""
    if source.startswith(HUB):
        return hub_copy(source.removeprefix(HUB), revision, assets_dir)
    return source_path(source, assets_dir)


NOT_FROM_HUB = ("original/*", "consolidated*", "*/*.safetensors")
"""Patterns of duplicate weights in the original authors' formats, which are not downloaded."""
ALLOWED = "asset:NAME, hf:ORG/NAME, a folder with config.json and *.safetensors, a .gguf file"


def resolve_path(source: str, assets_dir: Path) -> Path:
    """Return the local path of an asset or a path with `~` expanded.

    Raises:
        EnvironmentProblem: the asset has not been fetched, or its files differ from the published ones.
    """
    if not source.startswith(ASSET):
        return user_path(source)
    name = source.removeprefix(ASSET)
    path = asset_path(name, assets_dir)
    if not path.exists():
        raise EnvironmentProblem(
            f"Asset {name} has not been fetched.", where=str(path), next_step=f"Run: minitron assets fetch {name}"
        )
    require_expected_files(name, path)
    return path


def resolve_model(source: str, assets_dir: Path, revision: str | None) -> Path:
    """Return the local folder or .gguf file of a model. A hub model is downloaded if there is no local copy.

    Raises:
        CheckpointError: the path does not exist or has several .gguf files, or the download failed.
        EnvironmentProblem: the asset has not been fetched.
    """
    if source.startswith(HUB):
        name = source.removeprefix(HUB)
        copy = hub_copy(name, revision, assets_dir)
        return copy if copy.is_dir() else _from_hub(name, revision)
    path = resolve_path(source, assets_dir)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist.", where=f"source: {source}", allowed=ALLOWED)
    if path.is_file():
        _require_gguf_name(path, source)
    elif not (path / "config.json").is_file():
        return _only_gguf(path, source)
    return path


def model_files(folder: Path) -> list[Path]:
    """List the files that are read of a model folder: config.json, weights with their index, and side files; or GGUF.

    Empty if the folder has neither config.json nor .gguf files.
    """
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    if not (folder / CONFIG_FILE).is_file():
        return [file for file in files if is_gguf(file)]
    names = (CONFIG_FILE, INDEX_FILE)
    read = [file for file in files if file.name in names or file.suffix == ".safetensors" or is_side_file(file.name)]
    return [*read, *sorted((folder / TEMPLATES_DIR).glob("*.jinja"))]


def is_gguf(file: Path) -> bool:
    """Return whether a file has the suffix .gguf, without regard to case."""
    return file.suffix.lower() == ".gguf"


def _require_gguf_name(file: Path, source: str) -> None:
    if is_gguf(file):
        return
    inside = file.suffix in (".safetensors", ".json", ".bin")
    raise CheckpointError(
        f"{file} is not a .gguf file.",
        where=f"source: {source}",
        allowed=ALLOWED,
        next_step=f"Use the folder of the model: {file.parent}." if inside else None,
    )


def _only_gguf(folder: Path, source: str) -> Path:
    """Return the only .gguf file of a folder; the folder itself if it has none."""
    files = sorted(file for file in folder.iterdir() if is_gguf(file))
    models = [file for file in files if not (part := split_part(file.name)) or part[0] == 1]
    if len(models) > 1:
        raise CheckpointError(
            f"{folder} contains {len(models)} .gguf files.",
            where=f"source: {source}",
            allowed=", ".join(file.name for file in models),
            next_step="Use the path of one of them.",
        )
    for file in files:
        require_inside(file, folder)
    return next(iter(models or files), folder)


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from nemo_minitron.hf.transformers_versions import network_errors

    failures: tuple[type[Exception], ...] = (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OSError,
        *network_errors(),
    )
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=list(HUB_FILES), ignore_patterns=list(NOT_FROM_HUB)
            )
        )
    except failures as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{name} could not be fetched from the Hugging Face hub: {reason}",
            where=f"source: {HUB}{name}",
            next_step="Check the name, your access (a token in HF_TOKEN) and the network; or use a local folder.",
        ) from error
