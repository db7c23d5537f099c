"""A tokenizer that was made here -> its files in a model folder, the same bytes whatever version of transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.hf.json_file import write_json
from nemo_minitron.hf.side_files import TEMPLATES_DIR
from nemo_minitron.hf.tokenizer_classes import plain_config
from nemo_minitron.hf.tokenizer_files import CONFIG_FILE, TOKENIZER_FILE

TEMPLATE_FILE = "chat_template.jinja"
_DEFAULT = "default"
_NAME = re.compile(r"\w[\w.-]{0,63}", re.ASCII)


def write_tokenizer(
    folder: Path,
    tokenizer: Any,
    special: Mapping[str, str],
    *,
    chat_template: str | Mapping[str, str] | None = None,
    max_length: int | None = None,
) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat templates.

    Args:
        tokenizer: of the tokenizers package; tokens of `special` that it lacks are added to it.
        special: transformers' name -> token, such as eos_token.
        chat_template: a template, or name -> template; one named "default" is that of the folder.
        max_length: tokens that the model was made for.

    Raises:
        ValueError: a template's name is no name of a file.
    """
    from tokenizers import AddedToken

    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special.values()])
    tokenizer.save(str(folder / TOKENIZER_FILE))
    length = {} if max_length is None else {"model_max_length": max_length}
    config = {"clean_up_tokenization_spaces": False, **length, **special}
    write_json(folder / CONFIG_FILE, plain_config(config, {}, {}))
    named = {_DEFAULT: chat_template} if isinstance(chat_template, str) else dict(chat_template or {})
    for name, text in named.items():
        if name == _DEFAULT:
            (folder / TEMPLATE_FILE).write_text(text, encoding="utf-8")
            continue
        if not _NAME.fullmatch(name):
            raise ValueError(f"a chat template is named {name!r}")
        (folder / TEMPLATES_DIR).mkdir(exist_ok=True)
        (folder / TEMPLATES_DIR / f"{name}.jinja").write_text(text, encoding="utf-8")
