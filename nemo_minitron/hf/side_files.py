"""Side files of a model, besides weights and config.json: tokenizer, chat templates, generation config, license."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePath

from nemo_minitron.errors import CheckpointError
from nemo_minitron.hf.file_content import require_content
from nemo_minitron.hf.links import require_inside
from nemo_minitron.hf.tokenizer_files import repairs

_TOKENIZER = ("tokenizer*", "vocab.*", "merges.txt", "*.tiktoken", "tekken.json", "spiece.model", "spm.model")
_SPECIAL = ("sentencepiece*.model", "special_tokens_map.json", "added_tokens.json")
_ENDS = frozenset({".json", ".jinja", ".model", ".txt", ".tiktoken", ".bpe"})
"""Suffixes of tokenizer files and chat templates. Other files with such names, such as tokenizer code, are ignored."""
_NUMBERED = "tokenizer.model.v*"
"""Tokenizer files of Mistral models."""
_CODE = frozenset({".py", ".pyc", ".so", ".sh", ".bin", ".pt", ".pth", ".pkl"})
_LICENSES = ("license*", "licence*", "notice*", "copying*", "use_policy*")
"""License files, compared without regard to case. The other names are case-sensitive, as in transformers."""
SIDE_FILES = (*_TOKENIZER, *_SPECIAL, "chat_template*", "generation_config.json")
"""Files that transformers 4 and 5 load from the folder itself."""
TEMPLATES_DIR = "additional_chat_templates"
"""Folder in which transformers stores named chat templates in addition to the default one."""


def side_files(model_dir: Path) -> Iterator[Path]:
    """Yield the side files of a model folder, sorted; those of the template folder come last.

    Raises:
        CheckpointError: one of them is a link to a target outside of the folder.
    """
    found = [path for path in sorted(model_dir.iterdir()) if is_side_file(path.name) and _is_file_or_link(path)]
    found += sorted(path for path in (model_dir / TEMPLATES_DIR).glob("*.jinja") if path.is_file())
    for path in found:
        if path.exists():
            require_inside(path, model_dir)
        yield path


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy the side files of a model, and repair tokenizer files that versions of transformers read differently.

    Damaged tokenizer files are copied unchanged; loading the tokenizer reports the problem.

    Returns:
        Descriptions of the repairs.

    Raises:
        CheckpointError: a file is a broken link, a Git LFS pointer or a web page, or a JSON file is empty.
    """
    for file in side_files(source):
        require_content(file, may_be_empty=file.suffix != ".json")
        copied = target / file.relative_to(source)
        copied.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copied)
    try:
        found = repairs(source)
    except CheckpointError:
        return []
    found.write(target)
    return found.notes


def _is_file_or_link(path: Path) -> bool:
    """Return whether a path is a file or a link, including broken links, which must be reported."""
    return path.is_file() or (path.is_symlink() and not path.is_dir())


def is_side_file(name: str) -> bool:
    """Return whether a file of this name in a model folder is a side file."""
    end = PurePath(name).suffix.lower()
    if any(fnmatchcase(name, pattern) for pattern in SIDE_FILES):
        return end in _ENDS or fnmatchcase(name, _NUMBERED)
    return end not in _CODE and any(fnmatchcase(name.lower(), pattern) for pattern in _LICENSES)
