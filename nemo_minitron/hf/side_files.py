"""What belongs to a model beside its weights and config.json: tokenizer, chat templates, generation config, licence."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePath

from nemo_minitron.errors import CheckpointError
from nemo_minitron.hf.impostors import require_content
from nemo_minitron.hf.links import require_inside
from nemo_minitron.hf.tokenizer_files import repairs

_TOKENIZER = ("tokenizer*", "vocab.*", "merges.txt", "*.tiktoken", "tekken.json", "spiece.model", "spm.model")
_SPECIAL = ("sentencepiece*.model", "special_tokens_map.json", "added_tokens.json")
_ENDS = frozenset({".json", ".jinja", ".model", ".txt", ".tiktoken", ".bpe"})
"""Of tokenizers' files and chat templates; what else has such a name, code of a tokenizer among it, stays behind."""
_NUMBERED = "tokenizer.model.v*"
"""As in Mistral's folders."""
_CODE = frozenset({".py", ".pyc", ".so", ".sh", ".bin", ".pt", ".pth", ".pkl"})
_LICENSES = ("license*", "licence*", "notice*", "copying*", "use_policy*")
"""In any capitals; the other names are exact, as transformers has them."""
SIDE_FILES = (*_TOKENIZER, *_SPECIAL, "chat_template*", "generation_config.json")
"""What transformers 4 and 5 load from the folder itself."""
TEMPLATES_DIR = "additional_chat_templates"
"""transformers' folder of named chat templates beside the default one."""


def side_files(model_dir: Path) -> Iterator[Path]:
    """The side files of a model folder, sorted; those of a subfolder last.

    Raises:
        CheckpointError: one is a link that leads out of the folder.
    """
    found = [path for path in sorted(model_dir.iterdir()) if _belongs(path.name) and _is_file_or_link(path)]
    found += sorted(path for path in (model_dir / TEMPLATES_DIR).glob("*.jinja") if path.is_file())
    for path in found:
        if path.exists():
            require_inside(path, model_dir)
        yield path


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy everything that belongs to a model beside its weights and config; return what was repaired, in words.

    Tokenizer files are repaired where versions of transformers would read them differently. Damaged ones are copied as
    they are: whoever loads the tokenizer says what is wrong.

    Raises:
        CheckpointError: one is a broken link, a Git LFS pointer or a web page, or a JSON file that is empty.
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
    """A broken link is no file, and must not be passed over in silence."""
    return path.is_file() or (path.is_symlink() and not path.is_dir())


def _belongs(name: str) -> bool:
    end = PurePath(name).suffix.lower()
    if any(fnmatchcase(name, pattern) for pattern in SIDE_FILES):
        return end in _ENDS or fnmatchcase(name, _NUMBERED)
    return end not in _CODE and any(fnmatchcase(name.lower(), pattern) for pattern in _LICENSES)
